"""CBAM: a gate for every channel, then a gate for every position.

Paper: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018 (arXiv 1807.06521).
Code: https://github.com/Jongchan/attention-module, `MODELS/cbam.py`; https://github.com/implus/PytorchInsight,
`classification/models/imagenet/resnet_cbam.py`; https://github.com/huggingface/pytorch-image-models,
`timm/layers/cbam.py`.

    x' = x sigmoid(sum_pool MLP(pool_hw x))    pools: mean and maximum
    y = x' sigmoid(BN(conv7x7([max_c x'; mean_c x'])))
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant
from edgeattn.blocks.squeeze_excitation import channel_layer, reduced_channels


def _average(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


def _maximum(x: torch.Tensor) -> torch.Tensor:
    return x.amax(dim=(2, 3), keepdim=True)


def _root_of_squares(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum(dim=(2, 3), keepdim=True).sqrt()


def _log_sum_exp(x: torch.Tensor) -> torch.Tensor:
    highest = _maximum(x)
    return highest + (x - highest).exp().sum(dim=(2, 3), keepdim=True).log()


POOLS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "avg": _average,
    "max": _maximum,
    "lp": _root_of_squares,
    "lse": _log_sum_exp,
}
"""Pools of a map (batch, channels, height, width) to (batch, channels, 1, 1)."""


class ChannelGate(nn.Module):
    """Gate for every channel: one small network for every pooled vector, their results summed.

    State names are the official ones: `mlp.1` and `mlp.3`.

    Args:
        channels: channels of input and output.
        hidden: hidden channels.
        pool_types: some of `POOLS`.
        bias: whether the layers have biases.
        convolutions: whether the state holds 1x1 convolutions and not linear layers.
    """

    def __init__(
        self, channels: int, hidden: int, pool_types: Sequence[str], *, bias: bool, convolutions: bool
    ) -> None:
        super().__init__()
        self.pools = tuple(POOLS[name] for name in pool_types)
        self.mlp = nn.Sequential(
            nn.Identity(),
            channel_layer(channels, hidden, bias=bias, convolution=convolutions),
            nn.ReLU(),
            channel_layer(hidden, channels, bias=bias, convolution=convolutions),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of (batch, channels, height, width); the network sees the pools side by side, once."""
        pooled = torch.cat([pool(x) for pool in self.pools], dim=3)
        return x * self.mlp(pooled).sum(dim=3, keepdim=True).sigmoid()


class SpatialGate(nn.Module):
    """Gate for every position: a 7x7 convolution of the maximum and the mean over the channels.

    State names are the official ones: `spatial.conv` (1, 2, 7, 7) and `spatial.bn`.

    Args:
        channels: channels of input and output.
        mean_first: whether the convolution's first input is the mean.
    """

    def __init__(self, channels: int, *, mean_first: bool) -> None:
        super().__init__()
        # Reductions of groups of about sqrt(C) channels and then of the groups are five times as fast in ONNX Runtime
        # as of all channels.
        self.groups = max(divisor for divisor in range(1, math.isqrt(channels) + 1) if channels % divisor == 0)
        self.mean_first = mean_first
        layers = {"conv": nn.Conv2d(2, 1, 7, padding=3, bias=False), "bn": nn.BatchNorm2d(1)}
        self.spatial = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the positions of (batch, channels, height, width)."""
        grouped = x.unflatten(1, (self.groups, -1))
        pooled = [grouped.amax(dim=2).amax(dim=1, keepdim=True), grouped.mean(dim=2).mean(dim=1, keepdim=True)]
        if self.mean_first:
            pooled.reverse()
        return x * self.spatial(torch.cat(pooled, dim=1)).sigmoid()


class CBAM(nn.Module):
    """Convolutional block attention module.

    State names are the official ones: `ChannelGate.mlp.1` (hidden, gate_channels) and `.3` with biases,
    `SpatialGate.spatial.conv.weight` (1, 2, 7, 7) and `SpatialGate.spatial.bn`. PytorchInsight has the same. timm holds
    `channel.fc1` and `.fc2` as 1x1 convolutions, without biases by default, and gives the 7x7 convolution the mean
    first: an official state loaded there, or the other way round, computes something else without any error.

    Args:
        gate_channels: channels of input and output.
        reduction_ratio: channels per hidden channel.
        pool_types: pools of the channel gate, some of `POOLS`.
        no_spatial: leave the gate of the positions out.
        bias: whether the two layers of the channel gate have biases.
        convolutions: whether the state holds them as 1x1 convolutions.
        mean_first: whether the 7x7 convolution's first input is the mean.

    Raises:
        ValueError: no or unknown pools, or no hidden channel is left.
    """

    def __init__(
        self,
        gate_channels: int,
        reduction_ratio: int = 16,
        pool_types: Sequence[str] = ("avg", "max"),
        no_spatial: bool = False,
        *,
        bias: bool = True,
        convolutions: bool = False,
        mean_first: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(pool_types, str) or not pool_types or not set(pool_types) <= POOLS.keys():
            raise ValueError(f"pool_types of CBAM is {pool_types!r}. Give some of {tuple(POOLS)}.")
        hidden = reduced_channels("CBAM", gate_channels, reduction_ratio)
        self.ChannelGate = ChannelGate(gate_channels, hidden, pool_types, bias=bias, convolutions=convolutions)
        self.SpatialGate: nn.Module = nn.Identity() if no_spatial else SpatialGate(gate_channels, mean_first=mean_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels and then the positions of (batch, gate_channels, height, width)."""
        return self.SpatialGate(self.ChannelGate(x))


_ALL_POOLS = {"pool_types": ("avg", "max", "lp", "lse")}
_TIMM = {"bias": False, "convolutions": True, "mean_first": True}

BLOCKS.add(
    BlockSpec(
        name="cbam",
        title="convolutional block attention module",
        paper="CBAM: Convolutional Block Attention Module, ECCV 2018",
        year=2018,
        code="https://github.com/Jongchan/attention-module, https://github.com/implus/PytorchInsight, "
        "https://github.com/huggingface/pytorch-image-models",
        build=CBAM,
        original="edgeattn.validation.originals.cbam:CBAM",
        variants=(
            Variant(
                "official",
                {"gate_channels": 8, "reduction_ratio": 4},
                listings={"cbam": {"gate_channels": 256}},
                references={
                    "cbam": {"gate_channels": 16, "reduction_ratio": 4},
                    "cbam_no_spatial": {"gate_channels": 16, "reduction_ratio": 4, "no_spatial": True},
                    "cbam_insight": {"gate_channels": 16, "reduction_ratio": 4},
                },
                published=Published(
                    "CBAM-ResNet-50, ImageNet 224x224, first stage",
                    {"gate_channels": 256},
                    {"batch": 1, "height": 56, "width": 56},
                ),
            ),
            Variant(
                "all-pools",
                {"gate_channels": 8, "reduction_ratio": 4, **_ALL_POOLS},
                listings={"cbam_lse_lp": {"gate_channels": 256, **_ALL_POOLS}},
                references={"cbam_lse_lp": {"gate_channels": 16, "reduction_ratio": 4, **_ALL_POOLS}},
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}, state={r"mlp\.3\.weight": 0.01}),
            ),
            Variant(
                "timm",
                {"gate_channels": 8, "reduction_ratio": 4, **_TIMM},
                key_map={
                    r"\bchannel\.fc1\.": "ChannelGate.mlp.1.",
                    r"\bchannel\.fc2\.": "ChannelGate.mlp.3.",
                    r"\bspatial\.conv\.(conv|bn)\.": r"SpatialGate.spatial.\1.",
                },
                listings={"timm_cbam": {"gate_channels": 256, **_TIMM}},
                references={"cbam_timm": {"gate_channels": 16, "reduction_ratio": 4, **_TIMM}},
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["gate_channels"] * sizes["height"] * sizes["width"],
        precision=(
            "means, sums of squares and of exponentials stay in FP32, also the means over channels; maxima, the layers "
            "and the 7x7 convolution run in FP16"
        ),
        int8="nothing: the convolutions see one vector per image or two channels, and the block is bound by memory",
        int8_exclude=("ChannelGate", "SpatialGate"),
        inputs=(TensorInput("x", ("batch", "gate_channels", "height", "width")),),
    )
)
