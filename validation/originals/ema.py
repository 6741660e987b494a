"""Expectation-maximisation attention unit of EMANet, original.

Paper: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019, section 3.
Behaviour: XiaLiPKU/EMANet, `network.py`; with clamped norms open-mmlab/mmsegmentation, `decode_heads/ema_head.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class EMAUnit(nn.Module):
    """Expectation (responsibilities Z) and maximisation (bases mu) in turn, then the mixture mu Z^T.

    Args:
        c: channels C.
        k: bases K.
        stage_num: how often both steps are taken.
        clamp_norms: norms below 1e-12 count as 1e-12; otherwise 1e-6 is added to every norm.
        return_bases: whether the result is a pair with the bases.
    """

    def __init__(
        self, c: int, k: int, stage_num: int = 3, clamp_norms: bool = False, return_bases: bool = True
    ) -> None:
        super().__init__()
        self.stage_num = stage_num
        self.clamp_norms = clamp_norms
        self.return_bases = return_bases
        self.register_buffer("mu", torch.zeros(1, c, k))
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the features (B, C, H, W) for x of the same shape, and perhaps the bases (B, C, K)."""
        batch, channels, height, width = x.shape
        features = self.conv1(x).view(batch, channels, height * width)
        bases = self.get_buffer("mu").repeat(batch, 1, 1)
        for _ in range(self.stage_num):
            z = torch.softmax(torch.bmm(features.permute(0, 2, 1), bases), dim=2)  # (B, N, K)
            bases = self._normalised(torch.bmm(features, self._normalised(z, order=1)), order=2)
        mixture = torch.bmm(bases, z.permute(0, 2, 1)).view(batch, channels, height, width)
        result = torch.relu(self.conv2(torch.relu(mixture)) + x)
        return (result, bases) if self.return_bases else result

    def _normalised(self, tensor: torch.Tensor, order: int) -> torch.Tensor:
        """Divide a tensor (B, L, K) by its 1- or 2-norm along L; the responsibilities are not negative."""
        if self.clamp_norms:
            return F.normalize(tensor, p=order, dim=1)
        norm = tensor.sum(dim=1, keepdim=True) if order == 1 else tensor.norm(dim=1, keepdim=True)
        return tensor / (1e-6 + norm)
