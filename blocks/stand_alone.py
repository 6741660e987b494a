"""Stand-alone self-attention: attention within the window of each position in place of a convolution.

Paper: Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019 (arXiv 1906.05909).
Code: the authors released none. Widely used: https://github.com/leaderj1001/Stand-Alone-Self-Attention, `attention.py`,
and https://github.com/MerHS/SASA-pytorch, `model/sa_layer.py`. Each computes something of its own:

    paper         logit(p, d) = sum over the head's channels of q(p) (k(p + d) + r(d)), softmax over d per head
    leaderj1001   logit_c(p, d) = q_c(p) (k_c(p + d) + r_c(d)), softmax over d per channel
    MerHS         logit(p, d) = sum over all channels of q(p) (k(p + d) + r(d)), one softmax for all heads

Both ports have a stem whose values mix m projections: leaderj1001's by the place in the window, MerHS's by the place in
the image.

Positions outside the image have zero keys and values and are not masked: they still receive the logit q . r.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.taps import tap_softmax, taps, weighted_sum
from edgeattn.foundation import UserError


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
        """Return the embeddings as `_attend` takes them."""
        return _shared_relative(self.relative_x, self.relative_y, self.groups)


def _shared_relative(columns: torch.Tensor, rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Return MerHS's embeddings (d / 2, k), which all groups share, as `_attend` takes them for one head of all."""
    half = columns.shape[0]
    padded_rows = nn.functional.pad(rows.transpose(0, 1), (half, 0))
    padded_columns = nn.functional.pad(columns.transpose(0, 1), (0, half))
    return torch.cat([padded_rows, padded_columns]).repeat(1, groups)[None]


_PLACES = "its embeddings have a number for every row and column"


class PlaceMixtureStem(nn.Module):
    """MerHS's `SAMixtureConv2d`: its attention with values that mix `mix` projections by their place in the image.

    The mixture is a softmax over the projections of emb_m emb_x (column) + emb_m emb_y (row). An even window, padded by
    half of it on all sides as in the port's stem, gives a map larger by one, whose first row and column have the query
    zero. The padded places have embeddings too, without an effect, as what they weight is zero.

    State names and shapes are the port's: `weight_query`, `weight_key`, `weight_values.{0..mix-1}` (grouped, no bias),
    `relative_x`, `relative_y` (d / 2, k), `bias` (1, out_channels, 1, 1), `emb_x` (d, in_width + 2 padding), `emb_y`
    (d, in_height + 2 padding), `emb_m` (mix, d), with d = out_channels / groups.

    The projections are one: that of `mix` scaled copies of the input, which has fewer channels in a stem.

    Args:
        in_height: height of the input.
        in_width: width of the input.
        in_channels: input channels, a multiple of the groups.
        out_channels: output channels, a multiple of twice the groups.
        kernel_size: window size; the padding is half of it.
        stride: distance between window centres.
        groups: groups of the projections, each with the same embeddings.
        mix: projections of the values.
        bias: whether the result gets a bias.

    Raises:
        ValueError: channels that do not divide.
    """

    def __init__(
        self,
        in_height: int,
        in_width: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 4,
        stride: int = 1,
        groups: int = 1,
        mix: int = 4,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % (2 * groups):
            raise ValueError(
                f"in_channels ({in_channels}) must be a multiple of groups ({groups}) and out_channels "
                f"({out_channels}) of twice the groups; choose other groups"
            )
        self.size = (in_height, in_width)
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        width, reach = out_channels // groups, 2 * (kernel_size // 2)
        project = functools.partial(nn.Conv2d, kernel_size=1, groups=groups, bias=False)
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1)) if bias else None
        self.relative_x = nn.Parameter(torch.randn(width // 2, kernel_size))
        self.relative_y = nn.Parameter(torch.randn(width // 2, kernel_size))
        self.weight_query = project(in_channels, out_channels)
        self.weight_key = project(in_channels, out_channels)
        self.weight_values = nn.ModuleList(project(in_channels, out_channels) for _ in range(mix))
        self.emb_x: nn.Parameter | None = nn.Parameter(torch.randn(width, in_width + reach))
        self.emb_y: nn.Parameter | None = nn.Parameter(torch.randn(width, in_height + reach))
        self.emb_m: nn.Parameter | None = nn.Parameter(torch.randn(mix, width))
        self.mixture: torch.Tensor | None
        self.register_buffer("mixture", None, persistent=False)
        self.weight_value: nn.Conv2d | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend in x (batch, in_channels, in_height, in_width).

        Returns:
            (batch, out_channels, height, width); without stride the size of x, or one more for an even window.

        Raises:
            UserError: another size than the constructor's, or a dynamic one.
        """
        for axis, size, wanted in zip(("height", "width"), x.shape[2:], self.size, strict=True):
            require_static("this stem", axis, size, _PLACES)
            if size != wanted:
                raise UserError(f"the {axis} of the stem's input must be {wanted}, got {size}: {_PLACES}. Resize it.")
        # An even window: (height + 1) windows, the first of them centred on the row before the first.
        extra = 1 - self.kernel_size % 2
        query = nn.functional.pad(self.weight_query(x), (extra, 0, extra, 0))
        if self.stride > 1:
            query = query[:, :, :: self.stride, :: self.stride]
        key, value = (nn.functional.pad(part, (0, extra, 0, extra)) for part in (self.weight_key(x), self._value(x)))
        relative = _shared_relative(self.relative_x, self.relative_y, self.groups)
        attended = _attend(query, key, value, relative, self.kernel_size, self.stride)
        return attended if self.bias is None else attended + self.bias

    def _value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mixed values (batch, out_channels, in_height, in_width)."""
        mixture = self._mixture() if self.mixture is None else self.mixture
        copies = x.unflatten(1, (self.groups, 1, -1)) * mixture
        scaled = copies.flatten(1, 3)
        if self.weight_value is not None:
            result: torch.Tensor = self.weight_value(scaled)
            return result
        return nn.functional.conv2d(scaled, self._projection(), groups=self.groups)

    def _mixture(self) -> torch.Tensor:
        """Return the weight of each projection at each place, (mix, 1, in_height, in_width)."""
        assert self.emb_x is not None
        assert self.emb_y is not None
        assert self.emb_m is not None
        before = self.kernel_size // 2
        height, width = self.size
        columns = torch.matmul(self.emb_m, self.emb_x[:, before : before + width])
        rows = torch.matmul(self.emb_m, self.emb_y[:, before : before + height])
        return (rows[:, :, None] + columns[:, None, :]).softmax(dim=0).unsqueeze(1)

    def _projection(self) -> torch.Tensor:
        """Return the projections side by side, (out_channels, mix * in_channels / groups, 1, 1)."""
        return torch.cat([convolution.get_parameter("weight") for convolution in self.weight_values], dim=1)

    def prepare_for_export(self) -> PlaceMixtureStem:
        """Return a copy with a constant mixture and one projection of the values."""
        folded = copy.deepcopy(self)
        if folded.emb_m is not None:
            with torch.no_grad():
                weight = self._projection()
                folded.mixture = self._mixture()
            channels = self.groups * weight.shape[1]
            folded.weight_value = nn.Conv2d(
                channels, weight.shape[0], kernel_size=1, groups=self.groups, bias=False, device=weight.device
            )
            folded.weight_value.weight = nn.Parameter(weight)
            folded.weight_values = nn.ModuleList()
            folded.emb_x = folded.emb_y = folded.emb_m = None
        return folded


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


def _largest_mixed(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of the logits, a padded map and the scaled copies of the input."""
    kernel, mix = arguments["kernel_size"], arguments.get("mix", 4)
    height, width = (sizes[axis] + 2 * (kernel // 2) for axis in ("height", "width"))
    positions = (height - kernel + 1) * (width - kernel + 1)
    copies = mix * arguments["in_channels"] * sizes["height"] * sizes["width"]
    return int(sizes["batch"] * max(kernel**2 * positions, arguments["out_channels"] * height * width, copies))


_SMALL_MIXED = {"in_height": 5, "in_width": 7, "in_channels": 3, "out_channels": 8, "kernel_size": 4, "mix": 3}
_SMALL_MIXED_GROUPS = {
    **_SMALL_MIXED,
    "in_channels": 4,
    "kernel_size": 3,
    "stride": 2,
    "groups": 2,
    "bias": False,
}
_FIXED_MAP = {"height": _PLACES, "width": _PLACES}

BLOCKS.add(
    BlockSpec(
        name="sasa-merhs-stem",
        title="attention stem, MerHS",
        paper=_PAPER,
        year=2019,
        code="https://github.com/MerHS/SASA-pytorch",
        build=PlaceMixtureStem,
        original="edgeattn.validation.originals.stand_alone:PlaceMixtureStem",
        variants=(
            Variant(
                "port",
                _SMALL_MIXED,
                references={"sasa_merhs_stem": _SMALL_MIXED},
                published=Published(
                    "SA-ResNet-50, ImageNet 224x224, stem",
                    {"in_height": 224, "in_width": 224, "in_channels": 3, "out_channels": 64, "bias": False}
                    | {"kernel_size": 4, "groups": 1, "mix": 4},
                    {"batch": 1, "height": 224, "width": 224},
                ),
                fixed=_FIXED_MAP,
                overflow=_OVERFLOW,
            ),
            Variant(
                "port-odd-strided",
                _SMALL_MIXED_GROUPS,
                references={"sasa_merhs_stem_odd": _SMALL_MIXED_GROUPS},
                fixed=_FIXED_MAP,
            ),
        ),
        largest=_largest_mixed,
        precision=_PRECISION,
        int8=_INT8,
        inputs=_INPUT,
        sizes=tuple({"batch": batch, "height": 5, "width": 7} for batch in (2, 1, 3)),
    )
)
