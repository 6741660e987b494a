"""The dilated ResNet that the segmentation networks share, output stride 8.

Source: He et al., "Deep Residual Learning", CVPR 2016; dilation as in CCNet's and COSNet's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Norm = Callable[[int], nn.Module]

EXPANSION = 4
"""Output channels of a bottleneck over its inner channels."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual.

    Args:
        in_channels: input channels.
        planes: inner channels; the output has `EXPANSION` times as many.
        norm: makes a normalisation layer for a number of channels.
        stride: spatial stride.
        stride_on_first: stride on the first 1x1 (COSNet's DeepLab) instead of the 3x3 convolution (CCNet).
        dilation: dilation and padding of the 3x3 convolution.
        downsample: whether the residual passes a 1x1 convolution and normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        norm: Norm,
        *,
        stride: int,
        stride_on_first: bool,
        dilation: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_on_first else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, stride=first, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=second, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn3 = norm(planes * EXPANSION)
        self.relu = nn.ReLU()
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, planes * EXPANSION, 1, stride=stride, bias=False), norm(planes * EXPANSION)
            )
            if downsample
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, 4 * planes, height / stride, width / stride)."""
        residual = x if self.downsample is None else self.downsample(x)
        out: torch.Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + residual
        return self.relu(out)  # type: ignore[no-any-return]


def make_stages(
    in_channels: int,
    base_width: int,
    blocks: Sequence[int],
    norm: Norm,
    *,
    strides: Sequence[int] = (1, 2, 1, 1),
    dilations: Sequence[int | Sequence[int]] = (1, 1, 2, 4),
    stride_on_first: bool = False,
) -> list[nn.Sequential]:
    """Build the four residual stages, of output stride 8 unless said otherwise.

    Args:
        in_channels: channels after the stem.
        base_width: inner channels of the first stage; the others have 2, 4 and 8 times as many.
        blocks: number of bottlenecks of each stage.
        norm: makes a normalisation layer for a number of channels.
        strides: of the first bottleneck of each stage.
        dilations: of all bottlenecks of each stage, or one number for each of them.
        stride_on_first: see `Bottleneck`.
    """
    stages = []
    for index, (count, stride, dilated) in enumerate(zip(blocks, strides, dilations, strict=True)):
        planes = base_width * 2**index
        layers = []
        for position, dilation in enumerate([dilated] * count if isinstance(dilated, int) else dilated):
            layers.append(
                Bottleneck(
                    in_channels,
                    planes,
                    norm,
                    stride=stride if position == 0 else 1,
                    stride_on_first=stride_on_first,
                    dilation=dilation,
                    downsample=position == 0 and (stride != 1 or in_channels != planes * EXPANSION),
                )
            )
            in_channels = planes * EXPANSION
        stages.append(nn.Sequential(*layers))
    return stages


def deep_stem(widths: Sequence[int], norm: Norm) -> list[nn.Module]:
    """Build a stem of 3x3 convolutions, the first of stride 2, each with normalisation and ReLU.

    Args:
        widths: channels of each convolution.
        norm: makes a normalisation layer for a number of channels.
    """
    layers: list[nn.Module] = []
    before, stride = 3, 2
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False), norm(width), nn.ReLU()]
        before, stride = width, 1
    return layers


def contracted(dilation: int, blocks: int) -> list[int]:
    """Return the dilations of a stage that keeps its resolution by `dilation`, but halves it in the first bottleneck.

    The first bottleneck sees the stage before it, whose dilation is half of this stage's.
    """
    return [dilation // 2, *[dilation] * (blocks - 1)]
