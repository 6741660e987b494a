"""Dual attention of DANet, original: position attention, channel attention and the head that joins them.

Paper: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019.
Behaviour: junfu1115/DANet, `encoding/nn/da_att.py` and `encoding/models/sseg/danet.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class PAM(nn.Module):
    """Position attention: y_i = gamma * sum over j of softmax_j(query_i . key_j) value_j + x_i, energies not scaled.

    Args:
        in_dim: channels C of the input; query and key have C // 8 channels.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; x and the result are (B, C, H, W)."""
        queries = self.query_conv(x).flatten(2).transpose(1, 2)  # (B, N, C / 8)
        keys = self.key_conv(x).flatten(2)  # (B, C / 8, N)
        attention = torch.softmax(torch.bmm(queries, keys), dim=-1)
        values = self.value_conv(x).flatten(2)
        attended = torch.bmm(values, attention.transpose(1, 2)).reshape(x.shape)
        return self.gamma * attended + x


class CAM(nn.Module):
    """Channel attention: E = X X^T (C, C), A = softmax over rows of (row maximum - E), y = gamma * A X + x.

    The energy is subtracted, so a channel attends to the channels that are least like it.

    Args:
        in_dim: channels of the input; not used, there are no projections.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; x and the result are (B, C, H, W)."""
        flat = x.flatten(2)
        energy = torch.bmm(flat, flat.transpose(1, 2))
        distance = energy.max(dim=-1, keepdim=True).values.expand_as(energy) - energy
        attended = torch.bmm(torch.softmax(distance, dim=-1), flat).reshape(x.shape)
        return self.gamma * attended + x


class DANetHead(nn.Module):
    """Two branches, convolution, attention and convolution each, whose features are added and classified.

    Args:
        in_channels: channels of the backbone's features; the branches have a quarter of them.
        out_channels: number of classes K.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        inner = in_channels // 4
        self.conv5a = _conv_norm_relu(in_channels, inner)
        self.conv5c = _conv_norm_relu(in_channels, inner)
        self.sa = PAM(inner)
        self.sc = CAM(inner)
        self.conv51 = _conv_norm_relu(inner, inner)
        self.conv52 = _conv_norm_relu(inner, inner)
        self.conv6 = _classifier(inner, out_channels)
        self.conv7 = _classifier(inner, out_channels)
        self.conv8 = _classifier(inner, out_channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits of both branches together, of position and of channel attention, each (B, K, H, W)."""
        position = self.conv51(self.sa(self.conv5a(x)))
        channel = self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)

    def forward_main(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first output alone, as evaluation uses it."""
        return self.forward(x)[0]


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(inputs: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Conv2d(inputs, classes, 1))  # dropout in training
