"""Self-calibrated convolution, original.

Paper: Liu et al., "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020, equations 3 to 5.
Behaviour: MCG-NKU/SCNet, `scnet.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SCConv(nn.Module):
    """F4(F3(x) * sigmoid(x + Up(F2(AvgPool_r(x))))).

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: stride of F4.
        padding: padding of F2, F3 and F4; None for their dilation.
        dilation: dilation of F2, F3 and F4.
        groups: groups of F2, F3 and F4.
        pooling_r: r.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        pooling_r: int = 4,
    ) -> None:
        super().__init__()
        pad = dilation if padding is None else padding

        def conv(step: int) -> nn.Module:
            return nn.Conv2d(
                inplanes, planes, kernel_size=3, stride=step, padding=pad, dilation=dilation, groups=groups, bias=False
            )

        pool = nn.AvgPool2d(kernel_size=pooling_r, stride=pooling_r)
        self.k2 = nn.Sequential(pool, conv(1), nn.BatchNorm2d(planes))
        self.k3 = nn.Sequential(conv(1), nn.BatchNorm2d(planes))
        self.k4 = nn.Sequential(conv(stride), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        coarse = F.interpolate(self.k2(x), x.size()[2:])
        calibrated: torch.Tensor = self.k4(torch.mul(self.k3(x), torch.sigmoid(torch.add(x, coarse))))
        return calibrated


class SCBottleneck(nn.Module):
    """Two halves a and b: k1 on a, self-calibration on b, joined by a 1x1 convolution, plus the shortcut.

    Args:
        inplanes: channels of the input.
        planes: quarter of the output's channels.
        stride: stride.
        cardinality: groups.
        bottleneck_width: width per 64 planes and group.
        avd: average pooling instead of strided convolutions.
        dilation: dilation.
        is_first: first block of its stage.
        downsample: projected shortcut.
        avg_down: the projection is pooled instead of strided.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        cardinality: int = 1,
        bottleneck_width: int = 32,
        avd: bool = False,
        dilation: int = 1,
        is_first: bool = False,
        downsample: bool = False,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        group_width = int(planes * (bottleneck_width / 64.0)) * cardinality
        self.conv1_a = nn.Conv2d(inplanes, group_width, kernel_size=1, bias=False)
        self.conv1_b = nn.Conv2d(inplanes, group_width, kernel_size=1, bias=False)
        self.bn1_a, self.bn1_b = nn.BatchNorm2d(group_width), nn.BatchNorm2d(group_width)
        self.avd = avd and (stride > 1 or is_first)
        self.avd_layer = nn.AvgPool2d(3, stride, padding=1)
        step = 1 if self.avd else stride
        self.k1 = nn.Sequential(
            nn.Conv2d(
                group_width,
                group_width,
                kernel_size=3,
                stride=step,
                padding=dilation,
                dilation=dilation,
                groups=cardinality,
                bias=False,
            ),
            nn.BatchNorm2d(group_width),
        )
        self.scconv = SCConv(group_width, group_width, step, dilation, dilation, cardinality, 4)
        self.conv3 = nn.Conv2d(group_width * 2, planes * 4, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.projected = downsample
        if downsample and avg_down:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(kernel_size=stride, stride=stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(inplanes, planes * 4, kernel_size=1, bias=False),
                nn.BatchNorm2d(planes * 4),
            )
        elif downsample:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * 4),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inplanes, H, W) to (B, 4 planes, H', W')."""
        a = F.relu(self.bn1_a(self.conv1_a(x)))
        b = F.relu(self.bn1_b(self.conv1_b(x)))
        a, b = F.relu(self.k1(a)), F.relu(self.scconv(b))
        if self.avd:
            a, b = self.avd_layer(a), self.avd_layer(b)
        out = self.bn3(self.conv3(torch.cat([a, b], dim=1)))
        residual = self.downsample(x) if self.projected else x
        return F.relu(out + residual)
