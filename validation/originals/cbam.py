"""Convolutional block attention module, original.

Paper: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to 3.
Behaviour: Jongchan/attention-module, `MODELS/cbam.py`; with convolutions timm, `layers/cbam.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class _Channels(nn.Module):
    """Gate of the channels."""

    def __init__(self, channels: int, hidden: int, pool_types: Sequence[str], bias: bool, convolutions: bool) -> None:
        super().__init__()
        self.pool_types = pool_types
        self.convolutions = convolutions
        if convolutions:
            first: nn.Module = nn.Conv2d(channels, hidden, 1, bias=bias)
            second: nn.Module = nn.Conv2d(hidden, channels, 1, bias=bias)
            self.mlp = nn.Sequential(nn.Identity(), first, nn.ReLU(), second)
        else:
            first, second = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, channels, bias=bias)
            self.mlp = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = [self.mlp(self._pooled(x, name)) for name in self.pool_types]
        total = logits[0]
        for other in logits[1:]:
            total = total + other
        if self.convolutions:
            return x * torch.sigmoid(total)
        return x * torch.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)

    def _pooled(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return (B, C, 1, 1) or, for log-sum-exp, (B, C, 1)."""
        kernel = (x.shape[2], x.shape[3])
        if name == "avg":
            return x.mean((2, 3), keepdim=True) if self.convolutions else F.avg_pool2d(x, kernel)
        if name == "max":
            return x.amax((2, 3), keepdim=True) if self.convolutions else F.max_pool2d(x, kernel)
        if name == "lp":
            return F.lp_pool2d(x, 2, kernel)
        positions = x.view(x.shape[0], x.shape[1], -1)
        peak = positions.max(dim=2, keepdim=True).values
        return peak + torch.log(torch.exp(positions - peak).sum(dim=2, keepdim=True))


class _Positions(nn.Module):
    """Gate of the positions."""

    def __init__(self, mean_first: bool) -> None:
        super().__init__()
        self.mean_first = mean_first
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.spatial.add_module("bn", nn.BatchNorm2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        peak = torch.max(x, dim=1).values.unsqueeze(1)
        mean = torch.mean(x, dim=1).unsqueeze(1)
        both = (mean, peak) if self.mean_first else (peak, mean)
        return x * torch.sigmoid(self.spatial(torch.cat(both, dim=1)))


class CBAM(nn.Module):
    """Channel gate, then spatial gate.

    Args:
        gate_channels: channels C.
        reduction_ratio: C over the hidden channels.
        pool_types: pools of the channel gate: "avg", "max", "lp", "lse".
        no_spatial: without the spatial gate.
        bias: whether the layers of the channel gate have biases.
        convolutions: whether they are 1x1 convolutions.
        mean_first: whether the spatial gate stacks mean, maximum and not maximum, mean.
    """

    def __init__(
        self,
        gate_channels: int,
        reduction_ratio: int = 16,
        pool_types: Sequence[str] = ("avg", "max"),
        no_spatial: bool = False,
        *,
        bias: bool = True,
        convolutions: bool = False,
        mean_first: bool = False,
    ) -> None:
        super().__init__()
        hidden = gate_channels // reduction_ratio
        self.ChannelGate = _Channels(gate_channels, hidden, pool_types, bias, convolutions)
        self.SpatialGate = None if no_spatial else _Positions(mean_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape."""
        scaled: torch.Tensor = self.ChannelGate(x)
        return scaled if self.SpatialGate is None else self.SpatialGate(scaled)
