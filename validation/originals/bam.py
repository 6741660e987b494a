"""Bottleneck attention module, original.

Paper: Park et al., "BAM: Bottleneck Attention Module", BMVC 2018; the published code multiplies the two branches
that the paper adds. Behaviour: Jongchan/attention-module, `MODELS/bam.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Channels(nn.Module):
    """Branch of the channels."""

    def __init__(self, channels: int, hidden: int, square_pool: bool) -> None:
        super().__init__()
        self.square_pool = square_pool
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("flatten", nn.Flatten())
        self.gate_c.add_module("gate_c_fc_0", nn.Linear(channels, hidden))
        self.gate_c.add_module("gate_c_bn_1", nn.BatchNorm1d(hidden))
        self.gate_c.add_module("gate_c_relu_1", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", nn.Linear(hidden, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool2d(x, x.shape[2]) if self.square_pool else F.adaptive_avg_pool2d(x, 1)
        return self.gate_c(pooled)[:, :, None, None].expand_as(x)


class _Positions(nn.Module):
    """Branch of the positions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_s = nn.Sequential()
        self.gate_s.add_module("gate_s_conv_reduce0", nn.Conv2d(channels, hidden, 1))
        self.gate_s.add_module("gate_s_bn_reduce0", nn.BatchNorm2d(hidden))
        self.gate_s.add_module("gate_s_relu_reduce0", nn.ReLU())
        for name in ("di_0", "di_1"):
            self.gate_s.add_module(f"gate_s_conv_{name}", nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4))
            self.gate_s.add_module(f"gate_s_bn_{name}", nn.BatchNorm2d(hidden))
            self.gate_s.add_module(f"gate_s_relu_{name}", nn.ReLU())
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(hidden, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_s(x).expand_as(x)


class BAM(nn.Module):
    """Product of both branches, a sigmoid, one added, scale.

    Args:
        gate_channel: channels C.
        reduction_ratio: C over the hidden channels.
        square_pool: the pool's window is H x H.
    """

    def __init__(self, gate_channel: int, reduction_ratio: int = 16, *, square_pool: bool = True) -> None:
        super().__init__()
        hidden = gate_channel // reduction_ratio
        self.channel_att = _Channels(gate_channel, hidden, square_pool)
        self.spatial_att = _Positions(gate_channel, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape; with `square_pool` where H <= W < 2 H."""
        return (torch.sigmoid(self.channel_att(x) * self.spatial_att(x)) + 1) * x
