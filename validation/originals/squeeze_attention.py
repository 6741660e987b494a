"""Squeeze-and-attention, original.

Paper: Zhong et al., "Squeeze-and-Attention Networks for Semantic Segmentation", CVPR 2020, section 3.
Behaviour: third-party blocks named `SqueezeAttentionBlock`; the official code is not public.
"""

from __future__ import annotations

import torch
from torch import nn


class _Branch(nn.Module):
    """Convolution, normalisation, ReLU, several times."""

    def __init__(self, ch_in: int, ch_out: int, depth: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for index in range(depth):
            self.conv.append(nn.Conv2d(ch_in if index == 0 else ch_out, ch_out, 3, stride=1, padding=1))
            self.conv.append(nn.BatchNorm2d(ch_out))
            self.conv.append(nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class SqueezeAttention(nn.Module):
    """Main branch R, attention branch A on the pooled map, U = upsampled A, result U R + U.

    Args:
        ch_in: channels of the input.
        ch_out: channels of the output.
        pool: window of the average pool and factor of the upsampling.
        depth: convolutions per branch.
        gate: sigmoid behind the attention branch.
        upsampling: "nearest" or "bilinear" (corners not aligned).
    """

    def __init__(
        self, ch_in: int, ch_out: int, *, pool: int = 2, depth: int = 2, gate: bool = False, upsampling: str = "nearest"
    ) -> None:
        super().__init__()
        self.avg_pool = nn.AvgPool2d(kernel_size=pool, stride=pool)
        self.upsample = nn.Upsample(scale_factor=pool, mode=upsampling)
        self.conv = _Branch(ch_in, ch_out, depth)
        self.conv_atten = _Branch(ch_in, ch_out, depth)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, ch_in, H, W) to (B, ch_out, H, W)."""
        main = self.conv(x)
        attention = self.conv_atten(self.avg_pool(x))
        if self.gate:
            attention = torch.sigmoid(attention)
        upsampled: torch.Tensor = self.upsample(attention)
        return upsampled * main + upsampled
