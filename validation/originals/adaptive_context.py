"""Adaptive context module and adaptive pyramid context head, original.

Paper: He et al., "Adaptive Pyramid Context Network for Semantic Segmentation", CVPR 2019, section 3.
Behaviour: Junjun2016/APCNet and mmseg, `decode_heads/apc_head.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class _ConvModule(nn.Module):
    """relu(bn(conv(x))), the convolution without bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class ACM(nn.Module):
    """Context of one scale.

    Args:
        in_channels: channels of the input.
        channels: channels of the result.
        pool_scale: regions per side.
        fusion: whether a last projection follows.
    """

    def __init__(self, in_channels: int, channels: int, pool_scale: int, fusion: bool = True) -> None:
        super().__init__()
        self.pool_scale = pool_scale
        self.pooled_redu_conv = _ConvModule(in_channels, channels)
        self.input_redu_conv = _ConvModule(in_channels, channels)
        self.global_info = _ConvModule(channels, channels)
        self.gla = nn.Conv2d(channels, pool_scale * pool_scale, 1)
        self.residual_conv = _ConvModule(channels, channels)
        if fusion:
            self.fusion_conv = _ConvModule(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, channels, H, W) from (B, in_channels, H, W)."""
        regions = self.pooled_redu_conv(F.adaptive_avg_pool2d(x, self.pool_scale))
        regions = regions.flatten(2).permute(0, 2, 1).contiguous()  # (B, s * s, C)
        x = self.input_redu_conv(x)
        batch, channels, height, width = x.shape
        information = F.interpolate(self.global_info(F.adaptive_avg_pool2d(x, 1)), size=(height, width))
        affinity = self.gla(x + information).permute(0, 2, 3, 1).reshape(batch, height * width, -1)
        context = torch.matmul(torch.sigmoid(affinity), regions).permute(0, 2, 1).contiguous()
        context = self.residual_conv(context.view(batch, channels, height, width))
        context = F.relu(context + x)
        return self.fusion_conv(context) if hasattr(self, "fusion_conv") else context


class APCHead(nn.Module):
    """The input joined with its contexts of all scales, a 3x3 projection and a classifier.

    Args:
        in_channels: channels of the input.
        channels: channels of each context and of the 3x3 projection.
        num_classes: channels of the result.
        pool_scales: regions per side, one number per context.
        fusion: whether the contexts have their last projection.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        fusion: bool = True,
    ) -> None:
        super().__init__()
        self.acm_modules = nn.ModuleList([ACM(in_channels, channels, size, fusion) for size in pool_scales])
        self.bottleneck = _ConvModule(in_channels + channels * len(pool_scales), channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, num_classes, H, W) from (B, in_channels, H, W)."""
        outputs = [x] + [module(x) for module in self.acm_modules]
        scores: torch.Tensor = self.conv_seg(self.dropout(self.bottleneck(torch.cat(outputs, dim=1))))
        return scores
