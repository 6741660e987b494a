"""Criss-cross attention, original.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, section 3.2.
Behaviour: speedinghzl/CCNet, `cc_attention/functions.py`: columns and rows are folded into the batch of 3-D products,
and an infinite diagonal removes the position itself from its column.
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
        batch, channels, height, width = x.shape
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        along_column = torch.bmm(_columns(query).transpose(1, 2), _columns(key))  # (B W, H, H)
        self_mask = torch.diag(x.new_full((height,), float("-inf")))
        along_column = (along_column + self_mask).reshape(batch, width, height, height).permute(0, 2, 1, 3)
        along_row = torch.bmm(_rows(query).transpose(1, 2), _rows(key)).reshape(batch, height, width, width)
        attention = torch.softmax(torch.cat([along_column, along_row], dim=3), dim=3)  # (B, H, W, H + W)
        to_column = attention[..., :height].permute(0, 2, 1, 3).reshape(batch * width, height, height)
        to_row = attention[..., height:].reshape(batch * height, width, width)
        from_column = torch.bmm(_columns(value), to_column.transpose(1, 2)).reshape(batch, width, channels, height)
        from_row = torch.bmm(_rows(value), to_row.transpose(1, 2)).reshape(batch, height, channels, width)
        attended = from_column.permute(0, 2, 3, 1) + from_row.permute(0, 2, 1, 3)
        return self.gamma * attended + x


def _columns(maps: torch.Tensor) -> torch.Tensor:
    """Return every column of maps (B, C, H, W) as an entry of a batch: (B W, C, H)."""
    return maps.permute(0, 3, 1, 2).flatten(0, 1)


def _rows(maps: torch.Tensor) -> torch.Tensor:
    """Return every row of maps (B, C, H, W) as an entry of a batch: (B H, C, W)."""
    return maps.permute(0, 2, 1, 3).flatten(0, 1)
