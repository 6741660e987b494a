"""Criss-cross attention in three dimensions, original.

Behaviour: speedinghzl/CCNet, `cc_attention/functions3d.py`, after Huang et al., "CCNet: Criss-Cross Attention for
Semantic Segmentation", ICCV 2019. The lines along each axis are folded into the batch of 3-D products.
"""

from __future__ import annotations

import torch
from torch import nn


class CrissCrossAttention3D(nn.Module):
    """Every voxel attends to its three axis-parallel lines; only the first line leaves the voxel itself out.

    y = gamma * sum over the lines of softmax(query . key) * value + x: the voxel itself has two terms.

    The published code mixes the weights along W up: their axes are brought to (B, H, W', W, D), W' the line, and the
    numbers are then taken as (B H D, W, W').

    Args:
        in_dim: channels C of the input; query and key have C // 8 channels.
        published_order: mix the weights along W up as published.
    """

    def __init__(self, in_dim: int, *, published_order: bool = True) -> None:
        super().__init__()
        self.published_order = published_order
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv3d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv3d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv3d(in_dim, in_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend once; x and the result are (B, C, H, W, D), for any sizes from 1 on."""
        b, c, h, w, d = x.shape
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        # Energies, each brought to (B, H, W, D, positions on the line).
        energy_h = torch.bmm(_along_h(query).transpose(1, 2), _along_h(key))
        energy_h = energy_h + torch.diag(x.new_full((h,), float("-inf")))
        energy_h = energy_h.reshape(b, w, d, h, h).permute(0, 3, 1, 2, 4)
        energy_w = torch.bmm(_along_w(query).transpose(1, 2), _along_w(key))
        energy_w = energy_w.reshape(b, h, d, w, w).permute(0, 1, 3, 2, 4)
        energy_d = torch.bmm(_along_d(query).transpose(1, 2), _along_d(key)).reshape(b, h, w, d, d)
        attention = torch.softmax(torch.cat([energy_h, energy_w, energy_d], dim=4), dim=4)
        attention_h = attention[..., :h].permute(0, 2, 3, 1, 4).reshape(b * w * d, h, h)
        order = (0, 1, 4, 2, 3) if self.published_order else (0, 1, 3, 2, 4)
        attention_w = attention[..., h : h + w].permute(*order).reshape(b * h * d, w, w)
        attention_d = attention[..., h + w :].reshape(b * h * w, d, d)
        out_h = torch.bmm(_along_h(value), attention_h.transpose(1, 2)).reshape(b, w, d, c, h)
        out_w = torch.bmm(_along_w(value), attention_w.transpose(1, 2)).reshape(b, h, d, c, w)
        out_d = torch.bmm(_along_d(value), attention_d.transpose(1, 2)).reshape(b, h, w, c, d)
        attended = out_h.permute(0, 3, 4, 1, 2) + out_w.permute(0, 3, 1, 4, 2) + out_d.permute(0, 3, 1, 2, 4)
        return self.gamma * attended + x


def _along_h(volume: torch.Tensor) -> torch.Tensor:
    """Return the lines along the first axis of (B, C, H, W, D): (B W D, C, H)."""
    return volume.permute(0, 3, 4, 1, 2).flatten(0, 2)


def _along_w(volume: torch.Tensor) -> torch.Tensor:
    """Return the lines along the second axis of (B, C, H, W, D): (B H D, C, W)."""
    return volume.permute(0, 2, 4, 1, 3).flatten(0, 2)


def _along_d(volume: torch.Tensor) -> torch.Tensor:
    """Return the lines along the third axis of (B, C, H, W, D): (B H W, C, D)."""
    return volume.permute(0, 2, 3, 1, 4).flatten(0, 2)
