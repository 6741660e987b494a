"""The ResNet that the attention classifiers share, output stride 32: stem, four stages of residual blocks, one layer.

Source: He et al., "Deep Residual Learning", CVPR 2016, with the stride on the 3x3 convolution as in torchvision; deep
stem and pooled shortcuts as in He et al., "Bag of Tricks for Image Classification", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

from edgeattn.models.resnet import EXPANSION, deep_stem


@dataclass(frozen=True)
class Place:
    """Where a residual block stands.

    Attributes:
        stage: number of the stage, from 0.
        in_channels: channels of the input.
        planes: inner channels before groups and the like; the output has `EXPANSION` times as many.
        stride: spatial stride.
    """

    stage: int
    in_channels: int
    planes: int
    stride: int

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.planes * EXPANSION

    @property
    def projected(self) -> bool:
        """Whether the shortcut needs a convolution, because its shape changes."""
        return self.stride != 1 or self.in_channels != self.out_channels

    def width(self, group_width: int, groups: int) -> int:
        """Return the inner channels of a block with groups, given as their width in the first stage of ResNet-50."""
        return int(self.planes * group_width / 64) * groups


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut, and attention before they are added.

    State names are those of torchvision, `conv1..3`, `bn1..3`, `downsample`, and the name of the attention.

    Args:
        place: channels and stride.
        attention: name and module of what the output of `bn3` passes, if anything.
        middle: replaces the 3x3 convolution with its normalisation and ReLU; it has the channels of `place.width`.
        groups: groups of the 3x3 convolution.
        group_width: see `Place.width`.
        stride_on_first: stride on the first 1x1 (Caffe) instead of the 3x3 convolution.
        avg_down: whether a strided shortcut is an average pool (partial windows at the border) before its convolution.
    """

    def __init__(
        self,
        place: Place,
        *,
        attention: tuple[str, nn.Module] | None = None,
        middle: nn.Module | None = None,
        groups: int = 1,
        group_width: int = 64,
        stride_on_first: bool = False,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        width, stride = place.width(group_width, groups), place.stride
        first, second = (stride, 1) if stride_on_first else (1, stride)
        self.conv1 = nn.Conv2d(place.in_channels, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if middle is None:
            self.conv2: nn.Module = nn.Conv2d(width, width, 3, stride=second, padding=1, groups=groups, bias=False)
            self.bn2: nn.Module | None = nn.BatchNorm2d(width)
        else:
            self.conv2, self.bn2 = middle, None
        self.conv3 = nn.Conv2d(width, place.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(place.out_channels)
        self.attention = ""
        if attention is not None:
            self.attention, module = attention
            self.add_module(self.attention, module)
        self.downsample = _projection(place, avg_down) if place.projected else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height / stride, width / stride)."""
        hidden = self.conv2(self.bn1(self.conv1(x)).relu())
        if self.bn2 is not None:
            hidden = self.bn2(hidden).relu()
        out: torch.Tensor = self.bn3(self.conv3(hidden))
        if self.attention:
            out = self.get_submodule(self.attention)(out)
        shortcut: torch.Tensor = x if self.downsample is None else self.downsample(x)
        return (out + shortcut).relu()


def _projection(place: Place, avg_down: bool) -> nn.Sequential:
    """Return the shortcut of a block that changes the shape."""
    stride = place.stride
    convolution = nn.Conv2d(place.in_channels, place.out_channels, 1, stride=1 if avg_down else stride, bias=False)
    norm = nn.BatchNorm2d(place.out_channels)
    if not avg_down:
        return nn.Sequential(convolution, norm)
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, convolution, norm)


class Shape(TypedDict, total=False):
    """The arguments of `ClassifierResNet` that every network shares."""

    num_classes: int
    blocks: Sequence[int]
    base_width: int
    stem: Sequence[int]
    ceil_pool: bool


class ClassifierResNet(nn.Module):
    """Classifier with torchvision's state names: `conv1`, `bn1`, `layer1..4`, `fc`; a deep stem is `conv1.0..6`.

    Args:
        block: makes the residual block of a place.
        num_classes: number of classes.
        blocks: residual blocks per stage; (3, 4, 6, 3) is ResNet-50.
        base_width: channels of the stem, and inner channels of the first stage; the others have 2, 4 and 8 times as
            many.
        stem: channels of the 3x3 convolutions of a deep stem before the last one, two numbers; none for the single 7x7
            convolution.
        ceil_pool: the stem's max pool has no padding but partial windows at the right and at the bottom (Caffe).
        between: name, and maker for a number of channels, of modules behind the first three stages; numbered from 1.
    """

    def __init__(
        self,
        block: Callable[[Place], nn.Module],
        *,
        num_classes: int = 1000,
        blocks: Sequence[int] = (3, 4, 6, 3),
        base_width: int = 64,
        stem: Sequence[int] = (),
        ceil_pool: bool = False,
        between: tuple[str, Callable[[int], nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = (
            nn.Sequential(*deep_stem((*stem, base_width), nn.BatchNorm2d)[:-2])
            if stem
            else nn.Conv2d(3, base_width, 7, 2, 3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if ceil_pool else 1, ceil_mode=ceil_pool)
        self.trunk: list[str] = []
        channels = base_width
        for stage, count in enumerate(blocks):
            planes = base_width * 2**stage
            layers = []
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(block(Place(stage, channels, planes, stride)))
                channels = planes * EXPANSION
            self._append(f"layer{stage + 1}", nn.Sequential(*layers))
            if between is not None and stage + 1 < len(blocks):
                name, make = between
                self._append(f"{name}{stage + 1}", make(channels))
        self.fc = nn.Linear(channels, num_classes)

    def _append(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
        self.trunk.append(name)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Scores (batch, num_classes).
        """
        x = self.maxpool(self.bn1(self.conv1(image)).relu())
        for name in self.trunk:
            x = self.get_submodule(name)(x)
        scores: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores
