"""Criss-cross attention, original.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, section 3.2.
Behaviour: speedinghzl/CCNet, `cc_attention/functions.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class CrissCrossAttention(nn.Module):
    """Every position attends to the H + W - 1 positions of its own column and row, itself counted once.

    y = gamma * sum over the cross of softmax(query . key) * value + x, without scaling of the energies.

    Args:
        in_dim: channels C of the input; query and key have C // 8 channels.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend once; x and the result are (B, C, H, W), for any H and W from 1 on."""
        height, width = x.shape[2:]
        query = self.query_conv(x).flatten(2)
        key = self.key_conv(x).flatten(2)
        value = self.value_conv(x).flatten(2)
        attended = []
        for row in range(height):
            for column in range(width):
                cross = _cross(row, column, height, width)
                energy = (query[:, :, row * width + column, None] * key[:, :, cross]).sum(dim=1)  # (B, H + W - 1)
                attention = torch.softmax(energy, dim=1)
                attended.append((value[:, :, cross] * attention[:, None, :]).sum(dim=2))  # (B, C)
        return self.gamma * torch.stack(attended, dim=2).reshape(x.shape) + x


def _cross(row: int, column: int, height: int, width: int) -> list[int]:
    """Return the flat indices of the column without (row, column) itself, then of the whole row."""
    vertical = [other * width + column for other in range(height) if other != row]
    horizontal = [row * width + other for other in range(width)]
    return vertical + horizontal
