"""Stand-alone self-attention: attention within the window of each position in place of a convolution.

Paper: Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019 (arXiv 1906.05909).
Code: the authors released none. Widely used: https://github.com/leaderj1001/Stand-Alone-Self-Attention, `attention.py`,
and https://github.com/MerHS/SASA-pytorch, `model/sa_layer.py`. Each computes something of its own:

    paper         logit(p, d) = sum over the head's channels of q(p) (k(p + d) + r(d)), softmax over d per head
    leaderj1001   logit_c(p, d) = q_c(p) (k_c(p + d) + r_c(d)), softmax over d per channel
    MerHS         logit(p, d) = sum over all channels of q(p) (k(p + d) + r(d)), one softmax for all heads

Positions outside the image have zero keys and values and are not masked: they still receive the logit q . r.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.taps import tap_softmax, taps, weighted_sum


def _padded(features: torch.Tensor, kernel: int) -> torch.Tensor:
    """Continue a map with zeros so that each position has a window; an even one reaches further to the top left."""
    before, after = kernel // 2, (kernel - 1) // 2
    return nn.functional.pad(features, (before, after, before, after))


def _check(kernel_size: int, out_channels: int, groups: int = 1) -> None:
    """Refuse an even window and channels that do not divide into heads of an even number of channels."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"stand-alone attention needs an odd kernel_size, got {kernel_size}")
    if out_channels % (2 * groups):
        raise ValueError(
            f"out_channels ({out_channels}) must be a multiple of twice the heads ({groups}), because half of each "
            "head's channels gets the row offset and half the column offset"
        )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, relative: torch.Tensor, kernel: int, stride: int
) -> torch.Tensor:
    """Attend within windows.

    Args:
        query: (batch, channels, ceil(height / stride), ceil(width / stride)).
        key: (batch, channels, height, width).
        value: (batch, channels, height, width).
        relative: embeddings (heads, 2 * kernel, channels / heads) of the row offsets, then of the column offsets.
        kernel: window size.
        stride: distance between window centres.

    Returns:
        (batch, channels, ceil(height / stride), ceil(width / stride)).
    """
    heads = relative.shape[0]
    grouped = query.unflatten(1, (heads, -1))
    bias = torch.matmul(relative, grouped.flatten(3)).unflatten(3, query.shape[2:])
    rows = [bias[:, :, offset : offset + 1] for offset in range(kernel)]
    columns = [bias[:, :, kernel + offset : kernel + offset + 1] for offset in range(kernel)]
    keys = taps(_padded(key, kernel), kernel, stride=stride)
    offsets = [(row, column) for row in rows for column in columns]
    logits = [
        (grouped * tap.unflatten(1, (heads, -1))).sum(dim=2, keepdim=True) + row + column
        for tap, (row, column) in zip(keys, offsets, strict=True)
    ]
    values = [tap.unflatten(1, (heads, -1)) for tap in taps(_padded(value, kernel), kernel, stride=stride)]
    return weighted_sum(tap_softmax(logits, dim=2), values).flatten(1, 2)


class StandAloneAttention(nn.Module):
    """The paper's layer: one softmax over the window per head.

    State names and shapes are those of leaderj1001's `AttentionConv` (the authors released none): `query_conv`,
    `key_conv`, `value_conv` without bias, `rel_h` (out_channels / 2, 1, 1, k, 1), `rel_w` (out_channels / 2, 1, 1, 1,
    k). The first half of each head's channels gets the row offset `rel_h`, the second half the column offset `rel_w`.
    The paper strides by a 2x2 average pooling behind the layer, which is not part of it.

    Args:
        in_channels: input channels.
        out_channels: output channels, a multiple of twice the heads.
        kernel_size: window size, odd.
        groups: heads.

    Raises:
        ValueError: an even window, or channels that do not divide.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7, groups: int = 8) -> None:
        super().__init__()
        _check(kernel_size, out_channels, groups)
        self.kernel_size = kernel_size
        self.groups = groups
        self.rel_h = nn.Parameter(torch.randn(out_channels // 2, 1, 1, kernel_size, 1))
        self.rel_w = nn.Parameter(torch.randn(out_channels // 2, 1, 1, 1, kernel_size))
        self.key_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.query_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return _attend(
            self.query_conv(x), self.key_conv(x), self.value_conv(x), self._relative(), self.kernel_size, stride=1
        )

    def _relative(self) -> torch.Tensor:
        """Return the embeddings as `_attend` takes them; a row offset is zero in the column half, and vice versa."""
        rows, columns = (
            table.reshape(self.groups, -1, self.kernel_size).transpose(1, 2) for table in (self.rel_h, self.rel_w)
        )
        half = rows.shape[2]
        return torch.cat([nn.functional.pad(rows, (0, half)), nn.functional.pad(columns, (half, 0))], dim=1)


class SharedMapAttention(nn.Module):
    """MerHS's layer: the logits are summed over the channels of all heads, so that all share one map.

    State names and shapes are the port's: `weight_query`, `weight_key`, `weight_value` (grouped, no bias), `relative_x`
    (d / 2, k), the column offset of the first half of each group's channels, `relative_y` (d / 2, k), the row offset of
    the second half, with d = out_channels / groups; `bias` (1, out_channels, 1, 1). The port fails with an odd d.

    Args:
        in_channels: input channels, a multiple of the groups.
        out_channels: output channels, a multiple of twice the groups.
        kernel_size: window size, odd; the padding is half of it.
        stride: distance between window centres.
        groups: groups of the projections, each with the same relative embeddings.
        bias: whether the result gets a bias.

    Raises:
        ValueError: an even window, or channels that do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        groups: int = 8,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check(kernel_size, out_channels, groups)
        if in_channels % groups:
            raise ValueError(f"in_channels ({in_channels}) is not a multiple of groups ({groups}); choose a divisor")
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        half = out_channels // groups // 2
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1)) if bias else None
        self.relative_x = nn.Parameter(torch.randn(half, kernel_size))
        self.relative_y = nn.Parameter(torch.randn(half, kernel_size))
        self.weight_query = nn.Conv2d(
            in_channels, out_channels, kernel_size=1, stride=stride, groups=groups, bias=False
        )
        self.weight_key = nn.Conv2d(in_channels, out_channels, kernel_size=1, groups=groups, bias=False)
        self.weight_value = nn.Conv2d(in_channels, out_channels, kernel_size=1, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend in x (batch, in_channels, height, width).

        Returns:
            (batch, out_channels, ceil(height / stride), ceil(width / stride)).
        """
        query, key, value = self.weight_query(x), self.weight_key(x), self.weight_value(x)
        attended = _attend(query, key, value, self._relative(), self.kernel_size, self.stride)
        return attended if self.bias is None else attended + self.bias

    def _relative(self) -> torch.Tensor:
        """Return the embeddings as `_attend` takes them for one head that has all the channels."""
        half = self.relative_x.shape[0]
        rows = nn.functional.pad(self.relative_y.transpose(0, 1), (half, 0))
        columns = nn.functional.pad(self.relative_x.transpose(0, 1), (0, half))
        return torch.cat([rows, columns]).repeat(1, self.groups)[None]


def _attend_by_channel(
    query: torch.Tensor,
    logits_over_query: Sequence[torch.Tensor],
    upper: torch.Tensor,
    lower: torch.Tensor,
    values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Attend in each channel alone: softmax over the taps of query * key, without a stack of taps.

    The largest logit is known beforehand from the largest and smallest key in the window, so one pass suffices. The
    exponentials carry the factor 1 / taps, which the division removes: their sum is at most 1 and no sum of values
    exceeds the largest value.

    Args:
        query: (batch, channels, height, width).
        logits_over_query: the factor of the query in the logit of each tap, shaped as the query.
        upper: the largest of these factors over the taps.
        lower: the smallest.
        values: the values of each tap.

    Returns:
        (batch, channels, height, width).
    """
    peak = torch.maximum(query * upper, query * lower) + math.log(len(values))
    weights = [(query * factor - peak).exp() for factor in logits_over_query]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    return weighted_sum(weights, values) / total


class ChannelwiseAttention(nn.Module):
    """leaderj1001's `AttentionConv`: a softmax over the window in every channel, without a sum over a head's channels.

    The port's `groups` has no effect on the result (known there as issues 10, 16 and 24) and is left out; its padding
    is half the window and its stride 1, with others it fails.

    State names and shapes are the port's: `query_conv`, `key_conv`, `value_conv` without bias, `rel_h`
    (out_channels / 2, 1, 1, k, 1), the row offset of the first half of all channels, and `rel_w` (out_channels / 2, 1,
    1, 1, k), the column offset of the second half.

    Args:
        in_channels: input channels.
        out_channels: output channels, even.
        kernel_size: window size, odd.

    Raises:
        ValueError: an even window, or an odd number of channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        _check(kernel_size, out_channels)
        self.kernel_size = kernel_size
        self.rel_h = nn.Parameter(torch.randn(out_channels // 2, 1, 1, kernel_size, 1))
        self.rel_w = nn.Parameter(torch.randn(out_channels // 2, 1, 1, 1, kernel_size))
        self.key_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.query_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        # Rounding the largest logit apart from the others would make exp(logit - largest) meaningless.
        self.rows_spread = Fp32Step(functools.partial(_spread, window=(1, kernel_size)))
        self.columns_spread = Fp32Step(functools.partial(_spread, window=(kernel_size, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        query = self.query_conv(x)
        key, value = _padded(self.key_conv(x), self.kernel_size), _padded(self.value_conv(x), self.kernel_size)
        half = query.shape[1] // 2
        halves = ((slice(None, half), self.rel_h, 2), (slice(half, None), self.rel_w, 3))
        return torch.cat(
            [
                _attend_by_channel(
                    query[:, part],
                    *self._keys(key[:, part], table, dim),
                    taps(value[:, part], self.kernel_size),
                )
                for part, table, dim in halves
            ],
            dim=1,
        )

    def _keys(
        self, key: torch.Tensor, table: torch.Tensor, dim: int
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return key plus relative embedding of each tap, and the largest and smallest of them.

        Args:
            key: padded keys (batch, channels, height + k - 1, width + k - 1).
            table: the embedding (channels, 1, 1, k, 1) of row offsets or (channels, 1, 1, 1, k) of column offsets.
            dim: the axis of these offsets, 2 for rows and 3 for columns.
        """
        size = self.kernel_size
        embedding = table.reshape(-1, 1, 1, size)
        # The embedding depends on one offset only: it is added to a slice that holds all offsets along the other axis.
        lines = [_along(key, dim, offset, size) + embedding[..., offset] for offset in range(size)]
        across = 5 - dim
        cut = [[_along(line, across, offset, size) for offset in range(size)] for line in lines]
        if dim == 3:
            cut = [list(row) for row in zip(*cut, strict=True)]
        spread = self.rows_spread if dim == 2 else self.columns_spread
        return [tap for row in cut for tap in row], *spread(*lines)


def _along(features: torch.Tensor, dim: int, offset: int, kernel: int) -> torch.Tensor:
    """Return the slice of a padded map that lies at an offset of the window along one axis."""
    end = offset - (kernel - 1) or None
    return features[:, :, offset:end] if dim == 2 else features[..., offset:end]


def _spread(*maps: torch.Tensor, window: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest and the smallest number of all maps in each window."""
    upper = lower = maps[0]
    for other in maps[1:]:
        upper, lower = torch.maximum(upper, other), torch.minimum(lower, other)
    pool = functools.partial(nn.functional.max_pool2d, kernel_size=window, stride=1)
    return pool(upper), -pool(-lower)


class ChannelwiseStem(nn.Module):
    """leaderj1001's `AttentionStem`: per-channel attention whose values mix m projections by their place in the window.

    The mixture is a softmax over m of (emb_mix emb_a)(row offset) + (emb_mix emb_b)(column offset); queries and keys
    have no relative embedding. An even window reaches one further to the top left.

    State names and shapes are the port's: `query_conv`, `key_conv`, `value_conv.{0..m-1}` without bias, `emb_a` and
    `emb_b` (out_channels / groups, k), `emb_mix` (m, out_channels / groups). Beyond these, `groups` has no effect.

    Args:
        in_channels: input channels.
        out_channels: output channels, a multiple of the groups.
        kernel_size: window size; the padding is half of it and the stride 1.
        groups: divides the width of the embeddings.
        m: projections of the values.

    Raises:
        ValueError: channels that do not divide into groups.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 4, groups: int = 1, m: int = 4) -> None:
        super().__init__()
        if out_channels % groups:
            raise ValueError(
                f"out_channels ({out_channels}) is not a multiple of groups ({groups}); choose groups that divide it"
            )
        self.kernel_size = kernel_size
        self.emb_a: nn.Parameter | None = nn.Parameter(torch.randn(out_channels // groups, kernel_size))
        self.emb_b: nn.Parameter | None = nn.Parameter(torch.randn(out_channels // groups, kernel_size))
        self.emb_mix: nn.Parameter | None = nn.Parameter(torch.randn(m, out_channels // groups))
        self.key_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.query_conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.value_conv = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False) for _ in range(m)
        )
        self.spread = Fp32Step(functools.partial(_spread, window=(kernel_size, kernel_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        size = self.kernel_size
        key = _padded(self.key_conv(x), size)
        upper, lower = self.spread(key)
        return _attend_by_channel(self.query_conv(x), taps(key, size), upper, lower, self._values(x))

    def _values(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the values of each tap: the mixture of the projections is one projection per tap."""
        neighbours = taps(_padded(x, self.kernel_size), self.kernel_size)
        if self.emb_mix is None:
            return [convolution(tap) for convolution, tap in zip(self.value_conv, neighbours, strict=True)]
        return [nn.functional.conv2d(tap, weight) for tap, weight in zip(neighbours, self._mixed(), strict=True)]

    def _mixed(self) -> list[torch.Tensor]:
        """Return the projection of each tap, (out_channels, in_channels, 1, 1)."""
        assert self.emb_a is not None
        assert self.emb_b is not None
        assert self.emb_mix is not None
        rows, columns = torch.matmul(self.emb_mix, self.emb_a), torch.matmul(self.emb_mix, self.emb_b)
        mixture = (rows[:, :, None] + columns[:, None, :]).flatten(1).softmax(dim=0)
        projections = torch.stack(list(self.value_conv.parameters()), dim=-1)
        return [torch.matmul(projections, mixture[:, tap]) for tap in range(mixture.shape[1])]

    def prepare_for_export(self) -> ChannelwiseStem:
        """Return a copy with one constant projection of the values per tap (exact: mixing is linear)."""
        folded = copy.deepcopy(self)
        if folded.emb_mix is not None:
            with torch.no_grad():
                folded.value_conv = nn.ModuleList(_convolution(weight) for weight in folded._mixed())
            folded.emb_a = folded.emb_b = folded.emb_mix = None
        return folded


def _convolution(weight: torch.Tensor) -> nn.Conv2d:
    """Return the pointwise convolution that has a weight (out, in, 1, 1)."""
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1, bias=False)
    convolution.weight = nn.Parameter(weight.detach())
    return convolution


def _logits(heads: int, arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the logits (batch, heads, window, positions)."""
    return int(sizes["batch"] * heads * arguments["kernel_size"] ** 2 * sizes["height"] * sizes["width"])


def _padded_map(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of a padded feature map."""
    reach = arguments["kernel_size"] - 1
    return int(sizes["batch"] * arguments["out_channels"] * (sizes["height"] + reach) * (sizes["width"] + reach))


_PAPER = "Stand-Alone Self-Attention in Vision Models, NeurIPS 2019"
_INPUT = (TensorInput("x", ("batch", "in_channels", "height", "width")),)
_PRECISION = "logits with their relative term and the softmax stay in FP32 (dot products overflow); values run in FP16"
_CHANNELWISE_PRECISION = (
    "logits, their maximum, exponentials and their sum stay in FP32 (products overflow); weighted values run in FP16, "
    "where the exponentials' factor 1 / taps keeps their sum in range"
)
_INT8 = "the projections; the products of the window stay in FP16"
_LEADERJ = "https://github.com/leaderj1001/Stand-Alone-Self-Attention"
_SMALL_STEM = {"in_channels": 3, "out_channels": 8, "kernel_size": 4, "groups": 2, "m": 3}
_SMALL_SHARED = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "groups": 2}
_SMALL_STRIDED = {**_SMALL_SHARED, "stride": 2, "bias": False}
_OVERFLOW = Overflow(300.0, {"batch": 1, "height": 5, "width": 7})


def _resnet(channels: int, **arguments: int) -> Published:
    """Return the first stage of the ResNet-26 of the CIFAR ports."""
    return Published(
        "ResNet-26, CIFAR 32x32, first stage",
        {"in_channels": channels, "out_channels": channels, "kernel_size": 7, **arguments},
        {"batch": 1, "height": 32, "width": 32},
    )


BLOCKS.add(
    BlockSpec(
        name="sasa",
        title="stand-alone self-attention",
        paper=_PAPER,
        year=2019,
        code="none released by the authors",
        build=StandAloneAttention,
        original="edgeattn.validation.originals.stand_alone:StandAloneAttention",
        variants=(
            Variant(
                "paper",
                {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "groups": 2},
                published=Published(
                    "ResNet-26, ImageNet 224x224, second stage",
                    {"in_channels": 128, "out_channels": 128, "kernel_size": 7, "groups": 8},
                    {"batch": 1, "height": 28, "width": 28},
                ),
                overflow=_OVERFLOW,
            ),
        ),
        largest=lambda arguments, sizes: max(
            _logits(arguments["groups"], arguments, sizes), _padded_map(arguments, sizes)
        ),
        precision=_PRECISION,
        int8=_INT8,
        inputs=_INPUT,
    )
)
BLOCKS.add(
    BlockSpec(
        name="sasa-leaderj1001",
        title="stand-alone self-attention, leaderj1001",
        paper=_PAPER,
        year=2019,
        code=_LEADERJ,
        build=ChannelwiseAttention,
        original="edgeattn.validation.originals.stand_alone:ChannelwiseAttention",
        variants=(
            Variant(
                "port",
                {"in_channels": 6, "out_channels": 8, "kernel_size": 3},
                listings={"sasa_leaderj": {"in_channels": 64, "out_channels": 64, "kernel_size": 7}},
                references={"sasa_leaderj_conv": {"in_channels": 6, "out_channels": 8, "kernel_size": 3}},
                published=_resnet(64),
                overflow=Overflow(400.0, {"batch": 1, "height": 5, "width": 7}),
            ),
        ),
        largest=_padded_map,
        precision=_CHANNELWISE_PRECISION,
        int8=_INT8,
        inputs=_INPUT,
    )
)
BLOCKS.add(
    BlockSpec(
        name="sasa-leaderj1001-stem",
        title="attention stem, leaderj1001",
        paper=_PAPER,
        year=2019,
        code=_LEADERJ,
        build=ChannelwiseStem,
        original="edgeattn.validation.originals.stand_alone:ChannelwiseStem",
        variants=(
            Variant(
                "port",
                _SMALL_STEM,
                references={"sasa_leaderj_stem": _SMALL_STEM},
                published=Published(
                    "ResNet-26, CIFAR 32x32, stem",
                    {"in_channels": 3, "out_channels": 64, "kernel_size": 4, "groups": 1, "m": 4},
                    {"batch": 1, "height": 32, "width": 32},
                ),
                overflow=_OVERFLOW,
            ),
        ),
        largest=_padded_map,
        precision=_CHANNELWISE_PRECISION,
        int8=_INT8,
        inputs=_INPUT,
    )
)
BLOCKS.add(
    BlockSpec(
        name="sasa-merhs",
        title="stand-alone self-attention, MerHS",
        paper=_PAPER,
        year=2019,
        code="https://github.com/MerHS/SASA-pytorch",
        build=SharedMapAttention,
        original="edgeattn.validation.originals.stand_alone:SharedMapAttention",
        variants=(
            Variant(
                "port",
                _SMALL_SHARED,
                references={"sasa_merhs_conv": _SMALL_SHARED},
                listings={"sasa_merhs": {"in_channels": 64, "out_channels": 64, "kernel_size": 7, "groups": 8}},
                published=_resnet(64, groups=8),
                overflow=_OVERFLOW,
            ),
            Variant(
                "port-strided-without-bias",
                _SMALL_STRIDED,
                references={"sasa_merhs_strided": _SMALL_STRIDED},
            ),
        ),
        largest=lambda arguments, sizes: max(_logits(1, arguments, sizes), _padded_map(arguments, sizes)),
        precision=_PRECISION,
        int8=_INT8,
        inputs=_INPUT,
    )
)
