"""Object context of OCNet: self-attention on the whole map (base), in tiles (pyramid), beside dilated branches (ASP).

Paper: Yuan et al., "OCNet: Object Context Network for Scene Parsing", arXiv 1809.00916 (IJCV 2021).
Code: https://github.com/openseg-group/OCNet.pytorch, `oc_module/{base,pyramid,asp}_oc_block.py`.

    context = W (V softmax(c^-0.5 K^T K)^T)     K (c, N) are queries and keys at once, softmax over the keys

What is called `base_oc_block` in the later openseg.pytorch is another module with other state names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.abn import ABN
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


class SelfAttentionStage(nn.Module):
    """Context of every position, without a residual.

    State names are the official ones: `f_key.{0,1}` (convolution, `ABN`), `f_value`, `W`. `f_query` is the same module
    as `f_key`; the state_dict holds both names, and they have to agree.

    Args:
        in_channels: channels of the features.
        key_channels: channels of queries and keys.
        value_channels: channels of the values.
        out_channels: channels of the context.
        scale: the attention works on the features max-pooled by this factor, and its context is interpolated back.
    """

    def __init__(
        self, in_channels: int, key_channels: int, value_channels: int, out_channels: int, scale: int = 1
    ) -> None:
        super().__init__()
        self.scale = scale
        self.energy_scale: float | None = key_channels**-0.5
        self.f_key = nn.Sequential(nn.Conv2d(in_channels, key_channels, kernel_size=1), ABN(key_channels))
        self.f_query = self.f_key
        self.f_value = nn.Conv2d(in_channels, value_channels, kernel_size=1)
        self.W: nn.Module = nn.Conv2d(value_channels, out_channels, kernel_size=1)
        self.core = PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to their context (batch, out_channels, height, width).

        Raises:
            UserError: height or width is below `scale`.
        """
        _refuse_smaller(x, self.scale, "max-pooled", "leaves nothing of it")
        if self.scale == 1:
            return self.W(self.attend(self.f_key(x), self.f_value(x)))
        pooled = F.max_pool2d(x, self.scale)
        context = self.W(self.attend(self.f_key(pooled), self.f_value(pooled)))
        return F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=True)

    def attend(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend inside one map.

        Args:
            key: (batch, key_channels, height, width).
            value: (batch, value_channels, height, width).

        Returns:
            Attended values (batch, value_channels, height, width).
        """
        return self._gather(key.flatten(2), value.flatten(2)).unflatten(2, value.shape[2:])

    def _gather(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend between flat positions."""
        return self.core(key if self.energy_scale is None else key * self.energy_scale, key, value)

    def prepare_for_export(self) -> SelfAttentionStage:
        """Return a copy whose keys carry the energies' scale: both factors of a product get its square root.

        Exact, because the normalisation's activation is linear for positive factors.
        """
        folded = copy.deepcopy(self)
        if self.energy_scale is None:
            return folded
        plain = _plain(folded.f_key[1])
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(self.energy_scale**0.5)
        folded.f_key[1] = plain
        folded.energy_scale = None
        return folded

    def projected(self, weight: torch.Tensor, bias: torch.Tensor) -> SelfAttentionStage:
        """Return a prepared copy whose context has passed a 1x1 convolution.

        Everything behind the softmax is linear and every row of weights sums to one, so that the projection goes into
        `W`, and with it into the values where that does not widen them.

        Args:
            weight: (new channels, out_channels), FP64.
            bias: (new channels,), FP64.
        """
        folded = self.prepare_for_export()
        inner, inner_bias = _matrix(folded.W)
        weight, bias = weight @ inner, weight @ inner_bias + bias
        if len(weight) <= folded.f_value.out_channels:
            inner, inner_bias = _matrix(folded.f_value)
            folded.f_value = _convolution(weight @ inner, weight @ inner_bias + bias, self.f_value)
            folded.W = nn.Identity()
        else:
            folded.W = _convolution(weight, bias, self.f_value)
        return folded

    def _load_from_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse a state_dict whose two names of the one module disagree."""
        for name in state_dict:
            twin = name.replace(f"{prefix}f_query.", f"{prefix}f_key.", 1)
            known = twin in state_dict and not state_dict[twin].is_meta  # without values, names and shapes count
            if known and not torch.equal(state_dict[name], state_dict[twin]):
                raise UserError(
                    f"{name} and {twin} differ, but the queries and keys of OCNet are one module under two names. "
                    "Check that the checkpoint is OCNet's; openseg.pytorch has a later module with separate queries."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TiledSelfAttentionStage(SelfAttentionStage):
    """Context within each of scale x scale tiles of the map; arguments and state names as `SelfAttentionStage`.

    Tiles have floor(height / scale) rows and floor(width / scale) columns; the last ones also take the remainder.
    Tiles of equal size are attended to as one batch.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to their context (batch, out_channels, height, width).

        Raises:
            UserError: height or width is below `scale`.
        """
        _refuse_smaller(x, self.scale, "cut into tiles", "leaves empty tiles")
        key, value = self.f_key(x), self.f_value(x)
        rows = []
        for band in _bands(x.shape[2], self.scale):
            groups = [(band, other) for other in _bands(x.shape[3], self.scale)]
            rows.append(torch.cat([self._attend_tiles(key, value, *group) for group in groups], dim=3))
        return self.W(torch.cat(rows, dim=2))

    def _attend_tiles(self, key: torch.Tensor, value: torch.Tensor, rows: _Band, columns: _Band) -> torch.Tensor:
        """Return the attended values of a group of equal tiles, put together again."""
        attended = self._gather(_tiles(key, rows, columns), _tiles(value, rows, columns))
        tiles = attended.unflatten(2, (rows[2], columns[2])).unflatten(0, (value.shape[0], rows[1], columns[1]))
        return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


_Band = tuple[int, int, int]
"""Begin, number of tiles and size of each, along one axis."""


def _bands(length: int, tiles: int) -> list[_Band]:
    """Return the tiles along an axis, those of equal size together; of a symbolic length, the last is by itself."""
    size = length // tiles
    if isinstance(length, int) and length % tiles == 0:
        return [(0, tiles, size)]
    begin = (tiles - 1) * size
    return [(0, tiles - 1, size), (begin, 1, length - begin)]


def _tiles(x: torch.Tensor, rows: _Band, columns: _Band) -> torch.Tensor:
    """Return tiles of a map (batch, channels, height, width) as (batch * tiles, channels, positions of a tile)."""
    (top, down, height), (left, across, width) = rows, columns
    part = x[:, :, top : top + down * height, left : left + across * width]
    tiles = part.unflatten(3, (across, width)).unflatten(2, (down, height)).permute(0, 2, 4, 1, 3, 5)
    return tiles.flatten(4).flatten(0, 2)


def _refuse_smaller(x: torch.Tensor, smallest: int, what: str, why: str) -> None:
    """Refuse a map with fewer than `smallest` rows or columns; a symbolic size is not looked at.

    Raises:
        UserError: height or width is too small.
    """
    for axis, size in zip(("height", "width"), x.shape[2:], strict=True):
        if isinstance(size, int) and size < smallest:
            raise UserError(
                f"the {axis} of object context is {size}, but the map is {what} by {smallest}, which {why}. "
                f"Give features of {smallest} x {smallest} or more, such as a larger image."
            )


class _LinearSum(nn.Module):
    """Export form of `BaseOC` and `PyramidOC`: leaky ReLU of the sum of projected features and contexts.

    Up to its activation, `conv_bn_dropout` is linear, so that each part of its input has its own share of it and no
    concatenation is stored. Of two terms, ONNX Runtime computes the one that was traced last first. The stages are
    traced in reverse, so that it begins with the first one, the attention over the most positions, whose memory the
    others then reuse.
    """

    def __init__(self, features: nn.Module | None, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.features = features
        self.stages = nn.ModuleList(stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        features = None if self.features is None else self.features(x)
        contexts = [stage(x) for stage in reversed(self.stages)]
        if features is not None:
            contexts[0] = features + contexts[0]
        total = contexts.pop()
        while contexts:
            total = total + contexts.pop()
        return F.leaky_relu(total, 0.01)


class BaseOC(nn.Module):
    """Object context of the whole map, of one or several scales, that are added up.

    State names are the official ones: `stages.N` and `conv_bn_dropout.{0,1}`, a 1x1 convolution of the context, which
    comes first, and the features. Normalisation is `ABN` (leaky 0.01).

    Args:
        in_channels: channels of the features.
        out_channels: channels of context and output, as many.
        key_channels: channels of queries and keys.
        value_channels: channels of the values.
        sizes: scale of each self-attention.
        concat: False for the official `BaseOC_Context_Module`, whose convolution takes the context alone.

    Raises:
        ValueError: no size, a size below 1, or in_channels and out_channels that differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        sizes: Sequence[int] = (1,),
        concat: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(in_channels, out_channels, sizes)
        self.concat = concat
        self.stages = nn.ModuleList(
            SelfAttentionStage(in_channels, key_channels, value_channels, out_channels, size) for size in sizes
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(2 * in_channels if concat else in_channels, out_channels, kernel_size=1),
            ABN(out_channels),
            nn.Dropout2d(0.05),
        )

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to (batch, out_channels, height, width).

        Raises:
            UserError: height or width is below the largest of `sizes`.
        """
        first, *others = self.stages
        context = first(feats)
        for stage in others:
            context = context + stage(feats)
        return self.conv_bn_dropout(torch.cat([context, feats], dim=1) if self.concat else context)

    def prepare_for_export(self) -> nn.Module:
        """Return the sum form, see `_LinearSum`."""
        weight, bias = _matrix(self.conv_bn_dropout[0], self.conv_bn_dropout[1])
        channels = len(weight)
        features = None
        if self.concat:
            features = _convolution(weight[:, channels:], bias, self.conv_bn_dropout)
            bias = torch.zeros_like(bias)
        share = bias / len(self.stages)
        stages = (cast("SelfAttentionStage", stage) for stage in self.stages)
        return _LinearSum(features, [stage.projected(weight[:, :channels], share) for stage in stages])


class PyramidOC(nn.Module):
    """Object context in tiles of several sizes, joined with features of as many channels.

    State names are the official ones: `stages.N`, `up_dr.{0,1}`, a 1x1 convolution that widens the features, and
    `conv_bn_dropout.{0,1}`, a 1x1 convolution of the widened features, which come first, and the contexts.
    Normalisation is `ABN` (leaky 0.01).

    Args:
        in_channels: channels of the features and values; the keys have half of them.
        out_channels: channels of each context and of the output, as many.
        sizes: number of tiles per axis of each self-attention; 1 is the whole map.

    Raises:
        ValueError: no size, a size below 1, or in_channels and out_channels that differ.
    """

    def __init__(self, in_channels: int, out_channels: int, sizes: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        _check_arguments(in_channels, out_channels, sizes)
        self.stages = nn.ModuleList(
            (TiledSelfAttentionStage if size > 1 else SelfAttentionStage)(
                in_channels, in_channels // 2, in_channels, out_channels, size
            )
            for size in sizes
        )
        wide = in_channels * len(sizes)
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(2 * wide, out_channels, kernel_size=1), ABN(out_channels), nn.Dropout2d(0.05)
        )
        self.up_dr = nn.Sequential(nn.Conv2d(in_channels, wide, kernel_size=1), ABN(wide))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to (batch, out_channels, height, width).

        Raises:
            UserError: height or width is below the largest of `sizes`.
        """
        return self.conv_bn_dropout(torch.cat([self.up_dr(feats), *(stage(feats) for stage in self.stages)], dim=1))

    def prepare_for_export(self) -> nn.Module:
        """Return the sum form, see `_LinearSum`."""
        weight, bias = _matrix(self.conv_bn_dropout[0], self.conv_bn_dropout[1])
        wide = weight.shape[1] // 2
        shares = weight[:, wide:].chunk(len(self.stages), dim=1)
        stages = [
            cast("SelfAttentionStage", stage).projected(share, torch.zeros_like(bias))
            for stage, share in zip(self.stages, shares, strict=True)
        ]
        features = nn.Sequential(*copy.deepcopy(self.up_dr), _convolution(weight[:, :wide], bias, self.conv_bn_dropout))
        return _LinearSum(features, stages)


class ASPOC(nn.Module):
    """Object context beside a 1x1 and three dilated 3x3 convolutions, as in ASPP.

    State names are the official ones: `context.{0,1,2}` (3x3 convolution, `ABN`, `BaseOC` at scale 2 without
    concatenation), `conv2` to `conv5`, and `conv_bn_dropout`, which joins the five. Normalisation is `ABN`.

    Args:
        features: channels of the features.
        out_features: channels of each branch, at least 2; the output has twice as many.
        dilations: of the three dilated convolutions.

    Raises:
        ValueError: fewer than 2 out_features, or a number of dilations other than 3.
    """

    def __init__(self, features: int, out_features: int = 256, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        if out_features < 2:
            raise ValueError(f"out_features={out_features} is too small: the keys have half of them. Give 2 or more.")
        if len(dilations) != 3:
            raise ValueError(f"dilations={tuple(dilations)} must be three, for conv3, conv4 and conv5.")
        self.context = nn.Sequential(
            nn.Conv2d(features, out_features, kernel_size=3, padding=1),
            ABN(out_features),
            BaseOC(out_features, out_features, out_features // 2, out_features, sizes=(2,), concat=False),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(features, out_features, kernel_size=1, bias=False), ABN(out_features))
        self.conv3, self.conv4, self.conv5 = (_dilated(features, out_features, dilation) for dilation in dilations)
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(5 * out_features, 2 * out_features, kernel_size=1, bias=False),
            ABN(2 * out_features),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, features, height, width) to (batch, 2 * out_features, height, width).

        Raises:
            UserError: height or width is 1.
        """
        branches = [self.context(x), self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)]
        return self.conv_bn_dropout(torch.cat(branches, dim=1))


def _check_arguments(in_channels: int, out_channels: int, sizes: Sequence[int]) -> None:
    """Refuse what the published modules cannot run."""
    if in_channels != out_channels:
        raise ValueError(
            f"in_channels={in_channels} and out_channels={out_channels} differ, but the last convolution takes the "
            "context as if it had in_channels. Give both the same number."
        )
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={tuple(sizes)} must hold one number or more, each at least 1.")


def _dilated(inputs: int, outputs: int, dilation: int) -> nn.Sequential:
    """Return a dilated 3x3 convolution that keeps the size, and its normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=dilation, dilation=dilation, bias=False), ABN(outputs)
    )


def _plain(norm: nn.Module) -> nn.Sequential:
    """Return batch normalisation and activation of an `ABN`, which may have been prepared for export already."""
    return cast("nn.Sequential", norm.prepare_for_export() if isinstance(norm, ABN) else norm)


def _matrix(convolution: nn.Module, norm: nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (out, in) and bias (out,) in FP64 of a 1x1 convolution and the normalisation behind it."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach().double().flatten(1), convolution.bias.detach().double()
    if norm is None:
        return weight, bias
    batch_norm = _plain(norm)[0]
    assert isinstance(batch_norm, nn.BatchNorm2d)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    gain = batch_norm.weight.detach().double() / (batch_norm.running_var.double() + batch_norm.eps).sqrt()
    shift = batch_norm.bias.detach().double() - gain * batch_norm.running_mean.double()
    return gain[:, None] * weight, gain * bias + shift


def _convolution(weight: torch.Tensor, bias: torch.Tensor, like: nn.Module) -> nn.Conv2d:
    """Return the 1x1 convolution of a weight (out, in) and a bias (out,), in the type and on the device of a module."""
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1).to(next(like.parameters()))
    convolution.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    return convolution


_OCNET = "OCNet: Object Context Network for Scene Parsing, arXiv 2018"
_CODE = "https://github.com/openseg-group/OCNet.pytorch"
_NETWORK = "OCNet, ResNet-101, Cityscapes 769x769"
_MAP = {"batch": 1, "height": 97, "width": 97}
_PRECISION = "energies and softmax stay in FP32 (dot products overflow); the sum over values runs in FP16"
_INT8 = "all convolutions; the attention products stay in FP16"
_HALVED: tuple[Sizes, ...] = (
    {"batch": 2, "height": 5, "width": 7},
    {"batch": 1, "height": 9, "width": 4},
    {"batch": 3, "height": 3, "width": 11},
    {"batch": 1, "height": 2, "width": 2},
)
"""Test sizes down to the smallest that max-pooling by 2 leaves something of."""
_TILED: tuple[Sizes, ...] = (
    {"batch": 2, "height": 13, "width": 15},
    {"batch": 1, "height": 12, "width": 17},
    {"batch": 3, "height": 9, "width": 6},
    {"batch": 1, "height": 6, "width": 6},
)
"""Test sizes down to the smallest that has 6 x 6 tiles."""


def _largest(channels: int, positions: int, sizes: Sizes) -> int:
    """Return the elements of the larger of the weights (batch, positions, positions) and a map of some channels."""
    return sizes["batch"] * max(positions**2, channels * sizes["height"] * sizes["width"])


def _largest_base(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest tensor of `BaseOC`; the smallest scale has the most positions."""
    scale = min(arguments["sizes"])
    positions = (sizes["height"] // scale) * (sizes["width"] // scale)
    return _largest(max(arguments[f"{name}_channels"] for name in ("in", "key", "value")), positions, sizes)


BLOCKS.add(
    BlockSpec(
        name="ocnet-base",
        title="object context, base form",
        paper=_OCNET,
        year=2018,
        code=_CODE,
        build=BaseOC,
        original="edgeattn.validation.originals.object_context:BaseOC",
        variants=(
            Variant(
                "official",
                {"in_channels": 8, "out_channels": 8, "key_channels": 4, "value_channels": 4, "sizes": (1,)},
                listings={
                    "ocnet_base": {"in_channels": 512, "out_channels": 512, "key_channels": 256, "value_channels": 256}
                },
                published=Published(
                    _NETWORK,
                    {
                        "in_channels": 512,
                        "out_channels": 512,
                        "key_channels": 256,
                        "value_channels": 256,
                        "sizes": (1,),
                    },
                    _MAP,
                ),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "context",
                {
                    "in_channels": 8,
                    "out_channels": 8,
                    "key_channels": 4,
                    "value_channels": 8,
                    "sizes": (2,),
                    "concat": False,
                },
                listings={
                    "ocnet_base_scale2": {
                        "in_channels": 256,
                        "out_channels": 256,
                        "key_channels": 128,
                        "value_channels": 256,
                        "sizes": (2,),
                        "concat": False,
                    }
                },
                sizes=_HALVED,
            ),
            Variant(
                "several-scales",
                {"in_channels": 8, "out_channels": 8, "key_channels": 4, "value_channels": 6, "sizes": (1, 2)},
                sizes=_HALVED,
            ),
        ),
        largest=_largest_base,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("feats", ("batch", "in_channels", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="ocnet-pyramid",
        title="object context in a pyramid of tiles",
        paper=_OCNET,
        year=2018,
        code=_CODE,
        build=PyramidOC,
        original="edgeattn.validation.originals.object_context:PyramidOC",
        variants=(
            Variant(
                "official",
                {"in_channels": 8, "out_channels": 8, "sizes": (1, 2, 3, 6)},
                listings={"ocnet_pyramid": {"in_channels": 512, "out_channels": 512}},
                published=Published(_NETWORK, {"in_channels": 512, "out_channels": 512, "sizes": (1, 2, 3, 6)}, _MAP),
                overflow=Overflow(300.0, {"batch": 1, "height": 6, "width": 7}),
            ),
        ),
        largest=lambda arguments, sizes: _largest(
            arguments["in_channels"] * len(arguments["sizes"]), sizes["height"] * sizes["width"], sizes
        ),
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("feats", ("batch", "in_channels", "height", "width")),),
        sizes=_TILED,
    )
)

BLOCKS.add(
    BlockSpec(
        name="ocnet-asp",
        title="object context with atrous spatial pyramid",
        paper=_OCNET,
        year=2018,
        code=_CODE,
        build=ASPOC,
        original="edgeattn.validation.originals.object_context:ASPOC",
        variants=(
            Variant(
                "official",
                {"features": 6, "out_features": 4, "dilations": (2, 3, 5)},
                listings={"ocnet_asp": {"features": 2048, "out_features": 256}},
                published=Published(_NETWORK, {"features": 512, "out_features": 256}, _MAP),
                overflow=Overflow(
                    100.0, {"batch": 1, "height": 8, "width": 9}, {"out_features": 8}, {r"f_key\.1\.weight": 20.0}
                ),
            ),
        ),
        largest=lambda arguments, sizes: _largest(
            5 * arguments["out_features"], (sizes["height"] // 2) * (sizes["width"] // 2), sizes
        ),
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("x", ("batch", "features", "height", "width")),),
        sizes=_HALVED,
    )
)
