"""Asymmetric non-local blocks: fusion of two stages (AFNB) and pyramid context of one map (APNB).

Paper: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019 (arXiv 1908.07678).
Code: https://github.com/MendelXu/ANN, `models/seg/utils/afnb.py` and `apnb.py`.

    psp(m)  = [mean over each bin of 1x1, 3x3, 6x6 and 8x8 grids], S = 110 columns
    context = W . psp(f_value(low)) . softmax_S(psp(f_key(low))^T f_query(high) / sqrt(key_channels))
    y       = norm(conv([context, high]))
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.pooling import pyramid_pool
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

PYRAMID = (1, 3, 6, 8)
"""Sides of the grids that keys and values are averaged to: 110 cells."""


def _projection(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    """Return 1x1 convolution, batch normalisation and ReLU under the names `0`, `1.0`, `1.1`."""
    norm = nn.Sequential(nn.BatchNorm2d(out_channels), nn.ReLU())
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias), norm)


def _refuse_unequal_projections(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:  # the signature is that of torch's hook
    """Refuse a state whose copies of the one projection for queries and keys differ."""
    for name, value in state_dict.items():
        if not name.startswith(f"{prefix}f_query."):
            continue
        twin = f"{prefix}f_key.{name.removeprefix(f'{prefix}f_query.')}"
        other = state_dict.get(twin, value)
        if other.shape == value.shape and not value.is_meta and not torch.equal(other, value):
            raise UserError(
                f"the checkpoint's {twin} and {name} differ, but APNB has one projection for keys and queries. "
                "Check which code wrote the checkpoint; with two projections it is no APNB."
            )


class PyramidAttention(nn.Module):
    """One stage: every position of `high` attends to the pyramid averages of `low`.

    Keys are averaged after normalisation and ReLU. Values are averaged before their projection, which computes the same
    on S columns instead of all positions, because it is affine and the weights of every average sum to one.

    State names are the official ones: `f_key`, `f_query` (each convolution `0` and batch normalisation `1.0`),
    `f_value`, `W`. A shared projection stands in the state under both names; unequal copies are refused on loading.

    Args:
        low_channels: channels of the keys' and values' map.
        high_channels: channels of the queries' map.
        key_channels: channels of queries and keys.
        value_channels: channels of values.
        out_channels: output channels.
        psp_size: sides of the grids.
        shared: whether queries and keys have one projection.
        norm_bias: whether convolutions before a batch normalisation have a bias.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        psp_size: Sequence[int],
        *,
        shared: bool,
        norm_bias: bool,
    ) -> None:
        super().__init__()
        self.f_key = _projection(low_channels, key_channels, norm_bias)
        self.f_query = self.f_key if shared else _projection(high_channels, key_channels, norm_bias)
        self.f_value = nn.Conv2d(low_channels, value_channels, kernel_size=1)
        self.W: nn.Conv2d | None = nn.Conv2d(value_channels, out_channels, kernel_size=1)
        self.psp_size = tuple(psp_size)
        self.scale: float | None = key_channels**-0.5
        self.core = PixelAttentionCore()
        if shared:
            self.register_load_state_dict_pre_hook(_refuse_unequal_projections)

    @property
    def shared(self) -> bool:
        """Whether queries and keys have one projection."""
        return self.f_query is self.f_key

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            low: (batch, low_channels, any height, any width).
            high: (batch, high_channels, height, width); `low` itself where the projection is shared.

        Returns:
            (batch, out_channels, height, width).
        """
        key = self.f_key(low)
        query = key if self.shared else self.f_query(high)
        if self.scale is not None:
            query = query * self.scale
        value = self.f_value(pyramid_pool(low, self.psp_size).unsqueeze(3)).squeeze(3)
        attended = self.core(query.flatten(2), pyramid_pool(key, self.psp_size), value).unflatten(2, high.shape[2:])
        return attended if self.W is None else self.W(attended)

    def prepare_for_export(self) -> PyramidAttention:
        """Return a copy whose projections carry the scale (exact: ReLU commutes with a positive factor)."""
        folded = copy.deepcopy(self)
        if folded.scale is None:
            return folded
        norm = cast("nn.BatchNorm2d", cast("nn.Sequential", folded.f_query[1])[0])
        with torch.no_grad():  # a shared projection carries its half of the scale on either side
            for parameter in (norm.weight, norm.bias):
                parameter.mul_(folded.scale**0.5 if folded.shared else folded.scale)
        folded.scale = None
        return folded


class _AsymmetricNonLocal(nn.Module):
    """What both blocks share: stages whose contexts are added, and the fusion of their sum with the queries' map.

    Args:
        stages: the attention stages.
        fusion: `conv_bn_dropout`, a convolution of [context, high] and what follows it.
    """

    def __init__(self, stages: Sequence[PyramidAttention], fusion: nn.Sequential) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.conv_bn_dropout = fusion
        self.merged = False

    def _attend(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Attend in every stage and fuse the result with `high`."""
        contexts = [stage(low, high) for stage in self.stages]
        joined = contexts if self.merged else [functools.reduce(torch.add, contexts)]
        return self.conv_bn_dropout(torch.cat([*joined, high], dim=1))

    def prepare_for_export(self) -> _AsymmetricNonLocal:
        """Return a copy whose fusing convolution takes in the output projections of the stages (exact: both linear)."""
        folded = copy.deepcopy(self)
        if folded.merged:
            return folded
        conv = cast("nn.Conv2d", folded.conv_bn_dropout[0])
        stages = [cast("PyramidAttention", stage) for stage in folded.stages]
        projections = [cast("nn.Conv2d", stage.W) for stage in stages]
        with torch.no_grad():
            context, high = conv.weight.flatten(1).tensor_split([projections[0].out_channels], dim=1)
            weight = torch.cat([*(context @ projection.weight.flatten(1) for projection in projections), high], dim=1)
            biases = torch.stack([cast("nn.Parameter", projection.bias) for projection in projections])
            bias = context @ biases.sum(dim=0)
            merged = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1)
            merged.weight = nn.Parameter(weight[:, :, None, None])
            merged.bias = nn.Parameter(bias if conv.bias is None else bias + conv.bias)
        folded.conv_bn_dropout[0] = merged
        for stage in stages:
            stage.W = None
        folded.merged = True
        return folded


def _check(block: str, stages: int, psp_size: Sequence[int]) -> None:
    """Refuse numbers of stages and grids that mean nothing."""
    if stages < 1:
        raise ValueError(f"{block} needs stages >= 1, got {stages}; published networks have 1")
    if not psp_size or min(psp_size) < 1:
        raise ValueError(f"{block} needs psp_size with sides of at least 1, got {tuple(psp_size)}; give {PYRAMID}")


class AFNB(_AsymmetricNonLocal):
    """Asymmetric fusion non-local block: a high-level map attends to a low-level one. No ReLU at the end.

    State names are the official ones: `stages.N` (see `PyramidAttention`) and `conv_bn_dropout` with the convolution
    `0` and the batch normalisation `1`.

    Args:
        low_in_channels: channels of the low-level map.
        high_in_channels: channels of the high-level map.
        out_channels: output channels.
        key_channels: channels of queries and keys.
        value_channels: channels of values.
        stages: number of stages whose contexts are added; the length of the official `sizes`, whose values have no
            effect there.
        psp_size: sides of the grids.
        norm_bias: whether convolutions before a batch normalisation have a bias: official yes, mmseg no.

    Raises:
        ValueError: no stage, or grids without cells.
    """

    def __init__(
        self,
        low_in_channels: int,
        high_in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        stages: int = 1,
        psp_size: Sequence[int] = PYRAMID,
        norm_bias: bool = True,
    ) -> None:
        _check("AFNB", stages, psp_size)
        widths = (low_in_channels, high_in_channels, key_channels, value_channels, out_channels)
        super().__init__(
            [PyramidAttention(*widths, psp_size, shared=False, norm_bias=norm_bias) for _ in range(stages)],
            nn.Sequential(
                nn.Conv2d(out_channels + high_in_channels, out_channels, kernel_size=1, bias=norm_bias),
                nn.BatchNorm2d(out_channels),
            ),
        )

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Fuse (batch, low_in_channels, any height, any width) into (batch, high_in_channels, height, width).

        Returns:
            (batch, out_channels, height, width).
        """
        return self._attend(low, high)


class APNB(_AsymmetricNonLocal):
    """Asymmetric pyramid non-local block: a map attends to its own pyramid; queries and keys have one projection.

    State names are the official ones: `stages.N` (see `PyramidAttention`; `f_query` repeats `f_key`) and
    `conv_bn_dropout` with the convolution `0` and the batch normalisation `1.0`, which a ReLU follows.

    Args:
        channels: input and output channels; the official `in_channels` and `out_channels` have to be equal.
        key_channels: channels of queries and keys.
        value_channels: channels of values.
        stages: number of stages whose contexts are added; the length of the official `sizes`, which must all be 1 (the
            official code fails on others when it joins maps of different sizes).
        psp_size: sides of the grids.
        norm_bias: whether convolutions before a batch normalisation have a bias: official yes, mmseg no.

    Raises:
        ValueError: no stage, or grids without cells.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int,
        value_channels: int,
        stages: int = 1,
        psp_size: Sequence[int] = PYRAMID,
        norm_bias: bool = True,
    ) -> None:
        _check("APNB", stages, psp_size)
        widths = (channels, channels, key_channels, value_channels, channels)
        super().__init__(
            [PyramidAttention(*widths, psp_size, shared=True, norm_bias=norm_bias) for _ in range(stages)],
            _projection(2 * channels, channels, norm_bias),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape, for any height and width."""
        return self._attend(x, x)


def _largest(low_channels: int, high_channels: int, arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of attention, joined maps and the pooling's steps."""
    height, width = sizes["height"], sizes["width"]
    grids = arguments.get("psp_size", PYRAMID)
    cells = sum(side * side for side in grids)
    values = arguments["value_channels"] * arguments.get("stages", 1)
    pooled = max(low_channels, arguments["key_channels"]) * max(cells, height * sum(grids))
    return sizes["batch"] * max(height * width * max(cells, values + high_channels), pooled)


def _mmseg(norm: str) -> dict[str, str]:
    """Return the key map of mmseg, where the last batch normalisation has this name with us."""
    return {
        r"\.key_project\.conv\.": ".f_key.0.",
        r"\.key_project\.bn\.": ".f_key.1.0.",
        r"\.query_project\.conv\.": ".f_query.0.",
        r"\.query_project\.bn\.": ".f_query.1.0.",
        r"\.value_project\.": ".f_value.",
        r"\.out_project\.": ".W.",
        r"^bottleneck\.conv\.": "conv_bn_dropout.0.",
        r"^bottleneck\.bn\.": f"conv_bn_dropout.{norm}.",
    }


_ANN = "Asymmetric Non-local Neural Networks for Semantic Segmentation, ICCV 2019"
_CODE = "https://github.com/MendelXu/ANN, https://github.com/open-mmlab/mmsegmentation"
_PRECISION = "energies and softmax stay in FP32 (dot products overflow); averages and the sum over values run in FP16"
_INT8 = "all convolutions; the pooling and the attention products stay in FP16"
_AFNB_OFFICIAL = {
    "low_in_channels": 1024,
    "high_in_channels": 2048,
    "out_channels": 2048,
    "key_channels": 256,
    "value_channels": 256,
}
_APNB_OFFICIAL = {"channels": 512, "key_channels": 256, "value_channels": 256}
_AFNB_SMALL = {"low_in_channels": 6, "high_in_channels": 10, "out_channels": 8, "key_channels": 4, "value_channels": 5}
_APNB_SMALL = {"channels": 8, "key_channels": 4, "value_channels": 5}
_CITYSCAPES = {"batch": 1, "height": 97, "width": 97}
_NETWORK = "ANN, ResNet-101 (dilated), Cityscapes 769x769"

BLOCKS.add(
    BlockSpec(
        name="asymmetric-fusion-non-local",
        title="asymmetric fusion non-local block (AFNB)",
        paper=_ANN,
        year=2019,
        code=_CODE,
        build=AFNB,
        original="edgeattn.validation.originals.asymmetric_non_local:AFNB",
        variants=(
            Variant(
                "official",
                _AFNB_SMALL,
                listings={"ann_afnb": _AFNB_OFFICIAL},
                references={"ann_afnb": _AFNB_SMALL, "ann_afnb_two": _AFNB_SMALL | {"stages": 2}},
                published=Published(_NETWORK, _AFNB_OFFICIAL, _CITYSCAPES),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "mmseg",
                _AFNB_SMALL | {"value_channels": 4, "stages": 2, "norm_bias": False},
                key_map=_mmseg("1"),
                references={"mmseg_ann_afnb": _AFNB_SMALL | {"value_channels": 4, "norm_bias": False}},
            ),
        ),
        largest=lambda arguments, sizes: _largest(
            arguments["low_in_channels"], arguments["high_in_channels"], arguments, sizes
        ),
        precision=_PRECISION,
        int8=_INT8,
        inputs=(
            TensorInput("low", ("batch", "low_in_channels", "height", "width")),
            TensorInput("high", ("batch", "high_in_channels", "height", "width")),
        ),
    )
)

BLOCKS.add(
    BlockSpec(
        name="asymmetric-pyramid-non-local",
        title="asymmetric pyramid non-local block (APNB)",
        paper=_ANN,
        year=2019,
        code=_CODE,
        build=APNB,
        original="edgeattn.validation.originals.asymmetric_non_local:APNB",
        variants=(
            Variant(
                "official",
                _APNB_SMALL,
                listings={"ann_apnb": _APNB_OFFICIAL},
                published=Published(_NETWORK, _APNB_OFFICIAL, _CITYSCAPES),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "mmseg", _APNB_SMALL | {"value_channels": 4, "stages": 2, "norm_bias": False}, key_map=_mmseg("1.0")
            ),
        ),
        largest=lambda arguments, sizes: _largest(arguments["channels"], arguments["channels"], arguments, sizes),
        precision=_PRECISION,
        int8=_INT8,
    )
)
