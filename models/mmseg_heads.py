"""The decode heads of mmsegmentation that carry attention, and the names that their parameters have there.

Code: https://github.com/open-mmlab/mmsegmentation, `mmseg/models/decode_heads`, version 1.2.2.

All channels follow from those of the backbone, as in every published configuration. Dropout is left out. Parameters are
called as in mmsegmentation, but those of a block as the block calls them; each head's key map leads from the former to
the latter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from edgeattn.blocks import BLOCKS, CrissCrossAttention
from edgeattn.blocks.adaptive_context import APCHead
from edgeattn.blocks.asymmetric_non_local import AFNB, APNB, PYRAMID
from edgeattn.blocks.dual_attention import DANetHead
from edgeattn.blocks.ema import EMAUnit
from edgeattn.blocks.global_context import ContextBlock
from edgeattn.blocks.non_local import NonLocal
from edgeattn.blocks.psa import PointwiseSpatialAttention


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return `conv`, a 3x3 convolution without bias, `bn` and ReLU: mmcv's ConvModule."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU()))


class AuxiliaryHead(nn.Module):
    """FCNHead with one convolution and without `conv_cat`: `convs.0`, `conv_seg`.

    Args:
        in_channels: channels of the third stage.
        num_classes: number of classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv_norm_relu(in_channels, in_channels // 4))
        self.conv_seg = nn.Conv2d(in_channels // 4, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to logits (batch, num_classes, height, width)."""
        return self.conv_seg(self.convs(x))  # type: ignore[no-any-return]


class _ConcatHead(nn.Module, ABC):
    """A head that joins features with their context: `conv_cat`, `conv_seg`.

    Args:
        in_channels: channels of the fourth stage.
        channels: channels of the context, and of the features that are classified.
        num_classes: number of classes.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_cat = conv_norm_relu(in_channels + channels, channels)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to logits (batch, num_classes, height, width)."""
        return self.conv_seg(self.conv_cat(torch.cat([x, self.context(x)], dim=1)))  # type: ignore[no-any-return]

    @abstractmethod
    def context(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height, width)."""


class _SandwichHead(_ConcatHead):
    """Attention between two convolutions: FCNHead with `convs.0`, `convs.1`, on a quarter of the channels.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        self.channels = in_channels // 4
        super().__init__(in_channels, self.channels, num_classes)
        self.convs = nn.Sequential(
            conv_norm_relu(in_channels, self.channels), conv_norm_relu(self.channels, self.channels)
        )

    def context(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, in_channels // 4, height, width)."""
        before, after = self.convs
        return after(self.attend(before(x)))  # type: ignore[no-any-return]

    @abstractmethod
    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels // 4, height, width) to the same shape."""


class CCHead(_SandwichHead):
    """CCNet: criss-cross attention, applied `recurrence` times with the same weights.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
        recurrence: applications of the attention.
    """

    def __init__(self, in_channels: int, num_classes: int, recurrence: int = 2) -> None:
        super().__init__(in_channels, num_classes)
        self.recurrence = recurrence
        self.cca = CrissCrossAttention(self.channels)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels // 4, height, width) to the same shape."""
        for _ in range(self.recurrence):
            x = self.cca(x)
        return x


class NLHead(_SandwichHead):
    """Non-local network: the embedded Gaussian with scaled energies.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.nl_block = NonLocal(self.channels, dimension=2, sub_sample=False, scale="inner", out_bias=False)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels // 4, height, width) to the same shape."""
        return self.nl_block(x)  # type: ignore[no-any-return]


class GCHead(_SandwichHead):
    """GCNet: one context vector for all positions.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.gc_block = ContextBlock(self.channels, ratio=1 / 4)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels // 4, height, width) to the same shape."""
        return self.gc_block(x)  # type: ignore[no-any-return]


class EMAHead(_ConcatHead):
    """EMANet: the unit on a quarter of the channels, what is joined and classified on an eighth.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
        num_bases: bases of the unit.
        num_stages: its E and M steps.
    """

    def __init__(self, in_channels: int, num_classes: int, num_bases: int = 64, num_stages: int = 3) -> None:
        channels = in_channels // 4
        super().__init__(in_channels, channels // 2, num_classes)
        self.ema_in_conv = conv_norm_relu(in_channels, channels)
        self.ema = EMAUnit(channels, num_bases, num_stages, clamp_norms=True, return_bases=False)
        self.bottleneck = conv_norm_relu(channels, channels // 2)

    def context(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, in_channels // 8, height, width)."""
        return self.bottleneck(self.ema(self.ema_in_conv(x)))  # type: ignore[no-any-return]


class ANNHead(nn.Module):
    """Asymmetric non-local network: the fourth stage attends to the third, the result to itself.

    Args:
        low_channels: channels of the third stage.
        high_channels: channels of the fourth stage.
        num_classes: number of classes.
        key_pool_scales: sides of the grids that keys and values are averaged to.
    """

    def __init__(
        self, low_channels: int, high_channels: int, num_classes: int, key_pool_scales: Sequence[int] = PYRAMID
    ) -> None:
        super().__init__()
        channels, inner = high_channels // 4, high_channels // 8
        self.fusion = AFNB(
            low_channels, high_channels, high_channels, inner, inner, psp_size=key_pool_scales, norm_bias=False
        )
        self.bottleneck = conv_norm_relu(high_channels, channels)
        self.context = APNB(channels, inner, inner, psp_size=key_pool_scales, norm_bias=False)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Map features (batch, low_channels or high_channels, height, width) to logits (batch, num_classes, ...)."""
        return self.conv_seg(self.context(self.bottleneck(self.fusion(low, high))))  # type: ignore[no-any-return]


class PSAHead(nn.Module):
    """PSANet, both directions.

    Args:
        in_channels: channels of the fourth stage.
        num_classes: number of classes.
        mask_size: height and width of the mask.
    """

    def __init__(self, in_channels: int, num_classes: int, mask_size: tuple[int, int] = (97, 97)) -> None:
        super().__init__()
        channels = in_channels // 4
        self.psa = PointwiseSpatialAttention(
            in_channels, channels, mask_h=mask_size[0], mask_w=mask_size[1], proj_padding=1, align_corners=None
        )
        self.bottleneck = conv_norm_relu(2 * in_channels, channels)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to logits (batch, num_classes, height, width)."""
        return self.conv_seg(self.bottleneck(self.psa(x)))  # type: ignore[no-any-return]


def _adaptive_pyramid_context(in_channels: int, num_classes: int, pool_scales: Sequence[int] = (1, 2, 3, 6)) -> APCHead:
    """Return APCNet's head, on a quarter of the channels."""
    return APCHead(in_channels, in_channels // 4, num_classes, pool_scales)


@dataclass(frozen=True)
class Head:
    """A decode head.

    Attributes:
        build: constructs it from the channels of each stage it reads, the number of classes and options of its own; its
            forward takes these stages and returns one logits tensor, or several.
        stages: indices of the stages it reads.
        logits: names of what it returns; training alone uses all but the first.
        key_map: from mmsegmentation's names to ours.
        classifier: our name of the weight with one row for each class.
    """

    build: Callable[..., nn.Module]
    stages: tuple[int, ...] = (3,)
    logits: tuple[str, ...] = ("logits",)
    key_map: Mapping[str, str] = field(default_factory=dict)
    classifier: str = "decode_head.conv_seg.weight"


def _of_block(block: str, variant: str, part: str = "", ours: str = "") -> dict[str, str]:
    """Return the key map of a block that is part of a network.

    Args:
        block: name of the block.
        variant: its published variant.
        part: pattern of where mmsegmentation has the block's parameters below `decode_head`; empty for right there.
        ours: what our names have there before the block's.
    """
    behind = rf"(?<=^decode_head\.{part})"
    key_map = {}
    for pattern, template in BLOCKS.get(block).variant(variant).key_map.items():
        if not template:  # what a block leaves out are other parts of the network
            continue
        if pattern.startswith("^"):
            key_map[behind + pattern.removeprefix("^")] = ours + template
        else:
            key_map[pattern] = template
    return key_map


HEADS: Mapping[str, Head] = {
    "CCHead": Head(CCHead, key_map=_of_block("criss-cross", "mmcv", r"cca\.")),
    "NLHead": Head(NLHead, key_map=_of_block("non-local", "mmseg", r"nl_block\.")),
    "GCHead": Head(GCHead),
    "DAHead": Head(
        DANetHead,
        logits=("logits", "position_logits", "channel_logits"),
        key_map=_of_block("danet-head", "mmseg"),
        classifier="decode_head.conv8.1.weight",
    ),
    "EMAHead": Head(EMAHead, key_map=_of_block("ema", "mmseg", ours="ema.")),
    "ANNHead": Head(
        ANNHead,
        stages=(2, 3),
        key_map={
            **_of_block("asymmetric-fusion-non-local", "mmseg", r"fusion\."),
            **_of_block("asymmetric-pyramid-non-local", "mmseg", r"context\."),
        },
    ),
    "APCHead": Head(_adaptive_pyramid_context),
    "PSAHead": Head(PSAHead, key_map=_of_block("psa", "mmseg", ours="psa.")),
}
"""Decode heads by the name of their class in mmsegmentation."""
