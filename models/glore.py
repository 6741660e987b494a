"""GloRe networks: a pre-activation ResNet with graph-based global reasoning units between its residual blocks.

Paper: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019 (arXiv 1811.12814).
Code: https://github.com/facebookresearch/GloRe, `network/resnet50_3d_gcn_x5.py`, `resnet101_3d_gcn_x5.py` (videos). The
networks of the paper for ImageNet were published in MXNet only; the image form here is the published video network
without its time axis, as its own ImageNet initialisation is ("resnet50-lite").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from edgeattn.blocks.glore import GloReUnit

FRAMES = 8
"""Frames of a clip."""

PLACES: Mapping[int, Sequence[int]] = {3: (1, 3), 4: (1, 3, 5)}
"""Of ResNet-50, by stage, counted from 2: the residual blocks, counted from 1, that a unit stands behind."""

_EPS = 1e-4
_EXPANSION = 4
_CONV: Mapping[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: Mapping[int, type[nn.BatchNorm2d | nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL: Mapping[int, type[nn.MaxPool2d | nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


def _size(dimensions: int, time: int, space: int) -> tuple[int, ...]:
    """Return a kernel size, stride or padding of square windows; images have no time."""
    return (time, space, space)[3 - dimensions :]


def _activated(
    dimensions: int, in_channels: int, channels: int, *, time: int = 1, space: int = 1, stride: tuple[int, int] = (1, 1)
) -> nn.Sequential:
    """Return batch normalisation `bn`, ReLU, and a convolution `conv` that keeps the size but for its stride."""
    convolution = _CONV[dimensions](
        in_channels,
        channels,
        _size(dimensions, time, space),  # type: ignore[arg-type]
        stride=_size(dimensions, *stride),  # type: ignore[arg-type]
        padding=_size(dimensions, time // 2, space // 2),  # type: ignore[arg-type]
        bias=False,
    )
    norm = _NORM[dimensions](in_channels, eps=_EPS)
    return nn.Sequential(OrderedDict([("bn", norm), ("relu", nn.ReLU()), ("conv", convolution)]))


class ResidualBlock(nn.Module):
    """Three convolutions behind their activations: `conv_m1` (over time), `conv_m2` (3x3), `conv_m3`, plus the input.

    Args:
        dimensions: 2 for images, 3 for videos.
        in_channels: input channels.
        planes: inner channels.
        stride: over time and over space, of `conv_m2`.
        first: whether the residual passes a convolution, `conv_w1`.
        temporal: whether `conv_m1` sees three frames.
    """

    def __init__(
        self, dimensions: int, in_channels: int, planes: int, stride: tuple[int, int], first: bool, temporal: bool
    ) -> None:
        super().__init__()
        channels = _EXPANSION * planes
        self.conv_m1 = _activated(dimensions, in_channels, planes, time=3 if temporal else 1)
        self.conv_m2 = _activated(dimensions, planes, planes, space=3, stride=stride)
        self.conv_m3 = _activated(dimensions, planes, channels)
        self.conv_w1 = _activated(dimensions, in_channels, channels, stride=stride) if first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, [frames,] height, width) to the strided size and 4 * planes channels."""
        out: torch.Tensor = self.conv_m3(self.conv_m2(self.conv_m1(x)))
        return out + (x if self.conv_w1 is None else self.conv_w1(x))


def _temporal(stage: int, number: int) -> bool:
    """Say whether a block, counted from 1, of a stage, counted from 2, sees three frames."""
    if stage == 2:
        return True
    return number == 2 if stage == 5 else number % 2 == 1


class GloReResNet(nn.Module):
    """The official layout: `conv1.{conv,bn}`, `conv2..5.BNN.conv_{m1,m2,m3,w1}`, `convN.BNN_extra`, `tail.bn`.

    Args:
        num_classes: number of classes.
        dimensions: 2 for images, 3 for clips of `FRAMES` frames.
        blocks: residual blocks of the four stages; (3, 4, 6, 3) is ResNet-50.
        places: see `PLACES`.
        stem_width: channels of the stem.
        base_width: inner channels of the first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(
        self,
        num_classes: int = 400,
        dimensions: int = 3,
        blocks: Sequence[int] = (3, 4, 6, 3),
        places: Mapping[int, Sequence[int]] = PLACES,
        stem_width: int = 32,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        stem = _CONV[dimensions](
            3,
            stem_width,
            _size(dimensions, 3, 5),  # type: ignore[arg-type]
            stride=_size(dimensions, 1, 2),  # type: ignore[arg-type]
            padding=_size(dimensions, 1, 2),  # type: ignore[arg-type]
            bias=False,
        )
        pool = _POOL[dimensions](
            _size(dimensions, 1, 3),
            stride=_size(dimensions, 1, 2),
            padding=_size(dimensions, 0, 1),
        )
        norm = _NORM[dimensions](stem_width, eps=_EPS)
        self.conv1 = nn.Sequential(OrderedDict([("conv", stem), ("bn", norm), ("relu", nn.ReLU()), ("max_pool", pool)]))
        channels = stem_width
        for stage, count in enumerate(blocks, start=2):
            planes = base_width * 2 ** (stage - 2)
            layers: list[tuple[str, nn.Module]] = []
            for number in range(1, count + 1):
                stride = ((2 if stage == 3 else 1), (1 if stage == 2 else 2)) if number == 1 else (1, 1)
                layer = ResidualBlock(dimensions, channels, planes, stride, number == 1, _temporal(stage, number))
                layers.append((f"B{number:02d}", layer))
                channels = _EXPANSION * planes
                if number in places.get(stage, ()):
                    layers.append((f"B{number:02d}_extra", GloReUnit(channels, planes, dimensions)))
            self.add_module(f"conv{stage}", nn.Sequential(OrderedDict(layers)))
        self.tail = nn.Sequential(OrderedDict([("bn", _NORM[dimensions](channels, eps=_EPS)), ("relu", nn.ReLU())]))
        self.classifier = nn.Linear(channels, num_classes)
        self.stages = len(blocks)

    def forward(self, *frames: torch.Tensor) -> torch.Tensor:
        """Classify images or clips.

        Args:
            frames: the image, or the frames of a clip in order, each (batch, 3, height, width), preprocessed.

        Returns:
            Scores (batch, num_classes).
        """
        x = frames[0] if self.dimensions == 2 else torch.stack(frames, dim=2)
        x = self.conv1(x)
        for stage in range(2, 2 + self.stages):
            x = self.get_submodule(f"conv{stage}")(x)
        scores: torch.Tensor = self.classifier(self.tail(x).flatten(2).mean(dim=2))
        return scores
