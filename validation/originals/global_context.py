"""Global context block, original.

Paper: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCVW 2019, equation 8.
Behaviour: xvjiarui/GCNet, `mmdet/ops/gcb/context_block.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ContextBlock(nn.Module):
    """One context vector for all positions, transformed through a bottleneck, scales the input and is added to it.

    Args:
        inplanes: channels of the input.
        ratio: channels of the bottleneck relative to `inplanes`.
        pooling_type: "att" (softmax over positions) or "avg".
        fusion_types: "channel_mul", "channel_add" or both.
    """

    def __init__(
        self,
        inplanes: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
    ) -> None:
        super().__init__()
        planes = int(inplanes * ratio)
        self.conv_mask = nn.Conv2d(inplanes, 1, 1) if pooling_type == "att" else None
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.channel_add_conv = _transform(inplanes, planes) if "channel_add" in fusion_types else None
        self.channel_mul_conv = _transform(inplanes, planes) if "channel_mul" in fusion_types else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, inplanes, H, W) to the same shape."""
        context = self._context(x)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out

    def _context(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of all positions, (B, inplanes, 1, 1)."""
        if self.conv_mask is None:
            pooled: torch.Tensor = self.avg_pool(x)
            return pooled
        batch, channels, height, width = x.shape
        attention = self.conv_mask(x).view(batch, 1, height * width).softmax(dim=2)
        features = x.view(batch, channels, height * width).unsqueeze(1)
        return torch.matmul(features, attention.unsqueeze(-1)).view(batch, channels, 1, 1)


def _transform(inplanes: int, planes: int) -> nn.Sequential:
    """Return the bottleneck: reduce, normalise over its channels, rectify, expand."""
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, 1),
        nn.LayerNorm([planes, 1, 1]),
        nn.ReLU(),
        nn.Conv2d(planes, inplanes, 1),
    )
