"""ResNet classifiers with attention between residual blocks: CGNL, its plain non-local twin, and A2-Net.

Papers: Yue et al., "Compact Generalized Non-local Network", NeurIPS 2018; Chen et al., "A2-Nets: Double Attention
Networks", NeurIPS 2018.
Code: https://github.com/KaiyuYue/cgnl-network.pytorch, `model/resnet.py`. The authors of A2-Net published none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgeattn.blocks.cgnl import CGNL, SpatialNL
from edgeattn.blocks.double_attention import DoubleAttention
from edgeattn.models.classifier_resnet import Bottleneck, ClassifierResNet, Shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS: Mapping[str, Callable[[int], nn.Module]] = {
    "nl": lambda channels: SpatialNL(channels, channels // 2, use_scale=True),
    "cgnl": lambda channels: CGNL(channels, channels // 2, groups=8),
    "cgnlx": lambda channels: CGNL(channels, channels // 2, groups=8, order=3),
}
"""Makers of the blocks of the CGNL repository, for a number of channels, by the repository's names."""

A2_PLACES: Mapping[int, Sequence[int]] = {2: (1, 3), 3: (1, 3, 5)}
"""By stage, counted from 1, after how many residual blocks a double attention of A2-Net stands."""

_REDUCTION = 4
"""Channels of the map over those of A2-Net's descriptors, and over their number."""


class ResidualDoubleAttention(DoubleAttention):
    """Double attention added to its input, as the paper plugs it in; arguments and state are those of the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to the same shape."""
        return x + super().forward(x)


def cgnl_resnet(*, kind: str = "cgnl", **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build the ResNet of the CGNL repository: one block stands before the last residual block of the third stage.

    The block takes a number in `layer3`, and moves that of the last residual block by one.

    Args:
        kind: a name of `KINDS`.
        shape: see `ClassifierResNet`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    network = ClassifierResNet(Bottleneck, **shape)
    _insert(network, 3, [len(list(network.get_submodule("layer3").children())) - 1], KINDS[kind])
    return network


def a2_resnet(*, places: Mapping[int, Sequence[int]] = A2_PLACES, **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build an A2-Net: double attention, added to its input, behind residual blocks of the second and third stage.

    The paper gives their number, five, and the stages; the places are those that its first author's code has for GloRe
    units. Without an official network this one is the paper's definition, and its names are our own.

    Args:
        places: see `A2_PLACES`.
        shape: see `ClassifierResNet`.
    """
    network = ClassifierResNet(Bottleneck, **shape)
    for stage, positions in places.items():
        _insert(network, stage, positions, _double_attention)
    return network


def _double_attention(channels: int) -> nn.Module:
    """Return double attention with a quarter of the channels in each descriptor, and as many descriptors."""
    return ResidualDoubleAttention(channels, channels // _REDUCTION, channels // _REDUCTION, reconstruct=True)


def _insert(network: ClassifierResNet, stage: int, positions: Sequence[int], make: Callable[[int], nn.Module]) -> None:
    """Put modules into a stage, each after a number of its residual blocks."""
    blocks = list(network.get_submodule(f"layer{stage}").children())
    last = blocks[-1]
    assert isinstance(last, Bottleneck)
    channels = last.conv3.out_channels
    layers: list[nn.Module] = []
    for count, block in enumerate(blocks, start=1):
        layers.append(block)
        if count in positions:
            layers.append(make(channels))
    setattr(network, f"layer{stage}", nn.Sequential(*layers))
