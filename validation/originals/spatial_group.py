"""Spatial group-wise enhancement, original.

Paper: Li et al., "Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks",
arXiv 1905.09646, equations 1 to 5. Behaviour: implus/PytorchInsight, `classification/models/imagenet/resnet_sge.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class SpatialGroupEnhance(nn.Module):
    """Similarity of each position with its group's mean, standardised over the positions, as a gate.

    Args:
        channels: channels C.
        groups: number G of groups of neighbouring channels.
    """

    def __init__(self, channels: int, groups: int = 64) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape."""
        batch, channels, height, width = x.shape
        group = x.view(batch * self.groups, channels // self.groups, height, width)
        similarity = (group * self.mean(group)).sum(dim=1).view(batch * self.groups, height * width)
        centred = similarity - similarity.mean(dim=1, keepdim=True)
        deviation = centred.std(dim=1, unbiased=True, keepdim=True)
        standard = (centred / (deviation + 1e-5)).view(batch, self.groups, height, width)
        gate = torch.sigmoid(standard * self.weight + self.bias)
        return (group * gate.view(batch * self.groups, 1, height, width)).view(x.shape)
