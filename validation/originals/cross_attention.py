"""Cross attention module of few-shot classification, original.

Paper: Hou et al., "Cross Attention Network for Few-shot Classification", NeurIPS 2019, section 4.
Behaviour: blue-blue272/fewshot-CAN, `torchFewShot/models/cam.py` and the evaluation in `net.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _ConvBlock(nn.Module):
    """Batch normalisation of a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.bn(self.conv(x))
        return result


class CAM(nn.Module):
    """Attention of every prototype to every query and back, from the matrix of all cosines.

    Args:
        height: H of the maps.
        width: W of the maps.
        reduction: positions per hidden channel of the meta learner.
        scale_cls: factor of the scores.
    """

    def __init__(self, height: int = 6, width: int = 6, reduction: int = 6, scale_cls: float = 7.0) -> None:
        super().__init__()
        self.scale_cls = scale_cls
        self.conv1 = _ConvBlock(height * width, height * width // reduction)
        self.conv2 = nn.Conv2d(height * width // reduction, height * width, 1)

    def forward(self, prototypes: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both weighted features, (B, n2, n1, C, H, W), from (B, n1, C, H, W) and (B, n2, C, H, W)."""
        batch, n1, channels, height, width = prototypes.shape
        n2 = queries.shape[1]
        first = prototypes.flatten(3)
        second = queries.flatten(3)
        unit_first = F.normalize(first, p=2, dim=2, eps=1e-12).transpose(2, 3)  # (B, n1, N, C)
        unit_second = F.normalize(second, p=2, dim=2, eps=1e-12)  # (B, n2, C, N)
        cosines = torch.matmul(unit_first.unsqueeze(2), unit_second.unsqueeze(1))  # (B, n1, n2, N, N)
        attention_first = self._attention(cosines)
        attention_second = self._attention(cosines.transpose(3, 4))
        shape = (batch, n1, n2, channels, height, width)
        weighted_first = (first.unsqueeze(2) * attention_first.unsqueeze(3)).view(shape)
        weighted_second = (second.unsqueeze(1) * attention_second.unsqueeze(3)).view(shape)
        return weighted_first.transpose(1, 2), weighted_second.transpose(1, 2)

    def scores(self, prototypes: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return (B, n2, n1): the scaled cosine of the spatial means of both weighted features."""
        weighted_prototypes, weighted_queries = self.forward(prototypes, queries)
        mean_prototypes = F.normalize(weighted_prototypes.mean(4).mean(4), p=2, dim=3, eps=1e-12)
        mean_queries = F.normalize(weighted_queries.mean(4).mean(4), p=2, dim=3, eps=1e-12)
        return self.scale_cls * torch.sum(mean_queries * mean_prototypes, dim=-1)

    def _attention(self, cosines: torch.Tensor) -> torch.Tensor:
        """Return (B, n1, n2, N) over the fourth axis of the cosines (B, n1, n2, N, M)."""
        guide = cosines.mean(dim=3).transpose(1, 3)  # (B, M, n2, n1)
        weight = self.conv2(F.relu(self.conv1(guide))).transpose(1, 3)  # (B, n1, n2, M)
        energy = (cosines * weight.unsqueeze(3)).mean(dim=4)
        return F.softmax(energy / 0.025, dim=-1) + 1
