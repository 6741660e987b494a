"""ResNeSt's split attention, original.

Paper: Zhang et al., "ResNeSt: Split-Attention Networks", CVPRW 2022, section 3.1 and appendix (radix-major form).
Behaviour: zhanghang1989/ResNeSt, `resnest/torch/models/splat.py` and `resnet.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SplitAttention(nn.Module):
    """A grouped convolution whose output is R feature maps, summed with weights r-softmax(fc2 relu bn fc1 gap).

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        kernel_size: kernel.
        stride: stride.
        padding: padding; None for the same size.
        dilation: dilation.
        groups: cardinality.
        bias: bias of the convolution.
        radix: R.
        reduction_factor: ratio of the hidden layer.
        inter_channels: hidden channels, or None for the ratio with at least 32.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        radix: int = 2,
        reduction_factor: int = 4,
        inter_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, groups
        inner = max(in_channels * radix // reduction_factor, 32) if inter_channels is None else inter_channels
        pad = (kernel_size - 1) // 2 * dilation if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels,
            radix * channels,
            kernel_size,
            stride=stride,
            padding=pad,
            dilation=dilation,
            groups=radix * groups,
            bias=bias,
        )
        self.bn0 = nn.BatchNorm2d(radix * channels)
        self.fc1 = nn.Conv2d(channels, inner, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, radix * channels, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H', W')."""
        x = F.relu(self.bn0(self.conv(x)))
        batch, all_channels = x.shape[:2]
        maps = torch.split(x, all_channels // self.radix, dim=1)
        total = maps[0]
        for value in maps[1:]:
            total = total + value
        gap = F.adaptive_avg_pool2d(total, 1)
        scores = self.fc2(F.relu(self.bn1(self.fc1(gap))))
        if self.radix == 1:
            return torch.sigmoid(scores) * x
        scores = scores.view(batch, self.cardinality, self.radix, -1).transpose(1, 2)
        attention = F.softmax(scores, dim=1).reshape(batch, -1, 1, 1)
        weights = torch.split(attention, all_channels // self.radix, dim=1)
        out = weights[0] * maps[0]
        for weight, value in zip(weights[1:], maps[1:], strict=True):
            out = out + weight * value
        return out


class ResNeStBottleneck(nn.Module):
    """Bottleneck with split attention in the middle and average pooling where a stride or a stage begins.

    Args:
        inplanes: channels of the input.
        planes: quarter of the output's channels.
        stride: stride.
        radix: splits.
        cardinality: groups.
        bottleneck_width: width per 64 planes and group.
        avd: average pooling instead of a strided convolution.
        avd_first: pool in front of the split attention.
        dilation: dilation.
        is_first: first block of its stage.
        downsample: pooled and projected shortcut.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        radix: int = 2,
        cardinality: int = 1,
        bottleneck_width: int = 64,
        avd: bool = True,
        avd_first: bool = False,
        dilation: int = 1,
        is_first: bool = False,
        downsample: bool = False,
    ) -> None:
        super().__init__()
        group_width = int(planes * (bottleneck_width / 64.0)) * cardinality
        self.avd = avd and (stride > 1 or is_first)
        self.avd_first = avd_first
        self.avd_layer = nn.AvgPool2d(3, stride, padding=1)
        self.conv1 = nn.Conv2d(inplanes, group_width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(group_width)
        self.conv2 = SplitAttention(
            group_width,
            group_width,
            3,
            stride=1 if self.avd else stride,
            padding=dilation,
            dilation=dilation,
            groups=cardinality,
            radix=radix,
        )
        self.conv3 = nn.Conv2d(group_width, planes * 4, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.has_downsample = downsample
        if downsample:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(kernel_size=stride, stride=stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(inplanes, planes * 4, kernel_size=1, stride=1, bias=False),
                nn.BatchNorm2d(planes * 4),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inplanes, H, W) to (B, 4 planes, H', W')."""
        residual = self.downsample(x) if self.has_downsample else x
        out = F.relu(self.bn1(self.conv1(x)))
        if self.avd and self.avd_first:
            out = self.avd_layer(out)
        out = self.conv2(out)
        if self.avd and not self.avd_first:
            out = self.avd_layer(out)
        out = self.bn3(self.conv3(out))
        return F.relu(out + residual)
