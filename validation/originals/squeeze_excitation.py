"""Squeeze-and-excitation, original.

Paper: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4.
Behaviour: moskomule/senet.pytorch, `senet/se_module.py`; with convolutions timm, `layers/squeeze_excite.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class SqueezeExcitation(nn.Module):
    """Squeeze (global average), excite (two layers and a sigmoid), scale.

    Args:
        channel: channels C.
        reduction: C over the hidden channels.
        hidden: hidden channels, C // reduction when None.
        bias: whether the layers have biases.
        convolutions: 1x1 convolutions instead of linear layers.
    """

    def __init__(
        self,
        channel: int,
        reduction: int = 16,
        *,
        hidden: int | None = None,
        bias: bool = False,
        convolutions: bool = False,
    ) -> None:
        super().__init__()
        width = channel // reduction if hidden is None else hidden
        self.convolutions = convolutions
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        if convolutions:
            first: nn.Module = nn.Conv2d(channel, width, 1, bias=bias)
            second: nn.Module = nn.Conv2d(width, channel, 1, bias=bias)
        else:
            first, second = nn.Linear(channel, width, bias=bias), nn.Linear(width, channel, bias=bias)
        self.fc = nn.Sequential(first, nn.ReLU(), second, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape."""
        if self.convolutions:
            gate: torch.Tensor = self.fc(x.mean((2, 3), keepdim=True))
            return x * gate
        batch, channels = x.shape[:2]
        vector = self.squeeze(x).view(batch, channels)
        return x * self.fc(vector).view(batch, channels, 1, 1).expand_as(x)
