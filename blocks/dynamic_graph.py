"""Dynamic graph message passing: every position gathers from nine predicted places at four dilations.

Paper: Zhang et al., "Dynamic Graph Message Passing Networks", CVPR 2020 (arXiv 1908.06955).
Code: https://github.com/lzrobots/dgmn, `maskrcnn_benchmark/layers/dynamic_weight.py`, class ReDynamicWeightsCat33.

For each branch r with dilation d, tap k = 3 i + j of a 3x3 window and position p = (y, x),

    S_k(p) = x at p + d (i - 1, j - 1) + o_k(p), bilinear, zero outside the map       o = off_conv(x), y before x
    f, a   = kernel_conv as a deformable convolution with the same offsets = its weight times S
    m_g(p) = sum_k S_{g,k}(p) f_{g,k}(p) softmax(a(p))_k                              g: group of channels
    y      = x + sum_r gamma_r m_r

The places have FP32 coordinates; what is read there is a gather of the four neighbours of every tap, which one list of
indices and bilinear weights serves for both, the messages and the deformable convolution. That convolution is projected
first and read second, because both are linear: 9 (9 G + 9) channels are fewer than 9 C. Bilinear weights and filters
meet before anything is gathered for the messages: no sample is ever stored, and nine neighbours a position at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, FEATURE_MAP, Arguments, BlockSpec, Overflow, Published, Sizes, Variant
from edgeattn.blocks.taps import taps

TAPS = 9
"""Positions of the 3x3 window, row by row."""

BRANCHES = "abcd"
"""Suffixes of the branches' convolutions."""

FORMS = ("deformatt", "deform", "none")
"""Sampled with affinities, sampled with filters alone, at fixed places."""


def neighbours(offsets: torch.Tensor, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a deformed 3x3 window reads a map with a ring of zeros, and how much of each pixel.

    Args:
        offsets: (batch, 18, height, width), for each tap y before x, in pixels.
        dilation: distance between taps.

    Returns:
        Index of the upper left neighbour (batch, height * width, 9) in the flattened map (height + 3, width + 3), which
        has one row and column of zeros before and two behind; bilinear weights (4, batch, height * width, 9) of the
        neighbours: upper left, upper right, lower left, lower right.
    """
    height, width = offsets.shape[2:]
    tap = torch.arange(3, device=offsets.device) * dilation - dilation + 1  # + 1 is for the ring
    base_y = torch.arange(height, device=offsets.device)[:, None, None, None] + tap[:, None]  # (height, 1, 3, 1)
    base_x = torch.arange(width, device=offsets.device)[:, None, None] + tap  # (width, 1, 3)
    shift = offsets.permute(0, 2, 3, 1).unflatten(3, (3, 3, 2))  # (batch, height, width, 3, 3, 2)
    y = (base_y.to(offsets.dtype) + shift[..., 0]).clamp(0, height + 1).flatten(3).flatten(1, 2)
    x = (base_x.to(offsets.dtype) + shift[..., 1]).clamp(0, width + 1).flatten(3).flatten(1, 2)
    top, left = y.long(), x.long()
    down, right = y - top.to(y.dtype), x - left.to(x.dtype)
    up, across = 1 - down, 1 - right
    return top * (width + 3) + left, torch.stack([up * across, up * right, down * across, down * right])


class SampledConv2d(nn.Module):
    """The 3x3 weight of a deformable convolution without bias: what each tap contributes, before it is read.

    Args:
        in_channels: input channels.
        out_channels: rows of the weight, as published.
        used: rows that have an effect, the first ones.
    """

    def __init__(self, in_channels: int, out_channels: int, used: int) -> None:
        super().__init__()
        self.used = used
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3) / (TAPS * in_channels) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, 9 * used, height, width), tap by tap."""
        return F.conv2d(x, self._tap_by_tap())

    def prepare_for_export(self) -> nn.Conv2d:
        """Return the 1x1 convolution that computes the same."""
        weight = self._tap_by_tap().detach()
        plain = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1, bias=False)
        plain.weight = nn.Parameter(weight.clone())
        return plain

    def _tap_by_tap(self) -> torch.Tensor:
        return self.weight[: self.used].permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None]


class DynamicGraphMessagePassing(nn.Module):
    """Dynamic graph message passing in the form that the published models use, and its two simpler forms.

    State names and shapes are the official ones. Sampled forms: `off_conva` to `off_convd` (18, C, 3, 3) and
    `kernel_conva` to `kernel_convd` (9 group + 9, C, 3, 3), or 9 group rows for "deform". "none": `cata` to `catd`
    (9 group, C, 3, 3). All: `gamma1` to `gamma4` (1,). No convolution has a bias.

    A slip in the published code is part of the trained models: in the last branch of "deformatt" the affinity is read
    from the last nine filter channels, that is, from the filters of the last group; the last nine rows of
    `kernel_convd` have no effect. In "deform" and "none" the filters are normalised by softmax over the taps; in
    "deformatt" they are not.

    Args:
        channels: channels C of the input, a multiple of `group`.
        group: number of channel groups, each with filters of its own; 4 in the published models.
        dilation: distance between taps for each of the four branches.
        deform: one of `FORMS`.

    Raises:
        ValueError: an unknown form, other than four dilations, or channels that groups do not divide.
    """

    def __init__(
        self,
        channels: int,
        group: int = 1,
        dilation: Sequence[int] = (1, 4, 8, 12),
        deform: str = "deformatt",
    ) -> None:
        super().__init__()
        if deform not in FORMS:
            raise ValueError(f"deform is {deform!r}. Give one of {', '.join(FORMS)}.")
        if len(dilation) != len(BRANCHES):
            raise ValueError(
                f"dilation has {len(dilation)} entries. Give one for each of the {len(BRANCHES)} branches."
            )
        if channels % group:
            raise ValueError(f"channels is {channels}, which group = {group} does not divide. Change either.")
        self.group = group
        self.deform = deform
        self.dilation = tuple(dilation)
        filters = TAPS * group
        for index, (branch, rate) in enumerate(zip(BRANCHES, dilation, strict=True)):
            if deform == "none":
                self.add_module(f"cat{branch}", _dilated(channels, filters, rate))
            else:
                rows = filters + TAPS if deform == "deformatt" else filters
                used = filters if branch == BRANCHES[-1] else rows
                self.add_module(f"off_conv{branch}", _dilated(channels, 2 * TAPS, rate))
                self.add_module(f"kernel_conv{branch}", SampledConv2d(channels, rows, used))
            self.register_parameter(f"gamma{index + 1}", nn.Parameter(torch.ones(1)))
        self.neighbours = nn.ModuleList(Fp32Step(functools.partial(neighbours, dilation=rate)) for rate in dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape, for any height and width."""
        return self._fixed(x) if self.deform == "none" else self._sampled(x)

    def _sampled(self, x: torch.Tensor) -> torch.Tensor:
        """Pass messages from predicted places."""
        ringed = F.pad(x, (1, 2, 1, 2))
        stride = x.shape[3] + 3  # from a pixel of the ringed map to the one below
        pixels = ringed.flatten(2).transpose(1, 2)  # (batch, pixels, channels)
        first = torch.arange(x.shape[0], device=x.device)[:, None, None] * pixels.shape[1]
        group = torch.arange(self.group, device=x.device)[:, None]
        tap = torch.arange(TAPS, device=x.device)
        messages = []
        for index, branch in enumerate(BRANCHES):
            place, share = self.neighbours[index](getattr(self, f"off_conv{branch}")(x))
            place = place + first
            taps_of = getattr(self, f"kernel_conv{branch}")(ringed).flatten(2).transpose(1, 2)
            per_pixel = taps_of.unflatten(2, (TAPS, -1)).flatten(0, 2)  # a row for each pixel and tap
            dynamic = _read(per_pixel, place * TAPS + tap, stride * TAPS, TAPS, share)
            filters = self._weights(dynamic, index)
            per_group = pixels.unflatten(2, (self.group, -1)).flatten(0, 2)  # a row for each pixel and group
            rows = place[:, :, None] * self.group + group
            messages.append(_read(per_group, rows, stride * self.group, self.group, filters * share[:, :, :, None]))
        gathered = messages[0] + messages[1] + messages[2] + messages[3]
        return x + gathered.flatten(2).transpose(1, 2).reshape(x.shape)

    def _weights(self, dynamic: torch.Tensor, index: int) -> torch.Tensor:
        """Return the weights of the taps (batch, positions, group, 9) from the convolution's result, gamma included."""
        filters = dynamic[:, :, : TAPS * self.group].unflatten(2, (self.group, TAPS))
        gamma = getattr(self, f"gamma{index + 1}")
        if self.deform == "deform":
            return filters.softmax(dim=3) * gamma
        # In the last branch the last rows in use are the last group's filters.
        return filters * (dynamic[:, :, -TAPS:].softmax(dim=2) * gamma)[:, :, None]

    def _fixed(self, x: torch.Tensor) -> torch.Tensor:
        """Pass messages from the undeformed places."""
        result = x
        for index, (branch, rate) in enumerate(zip(BRANCHES, self.dilation, strict=True)):
            filters = getattr(self, f"cat{branch}")(x).unflatten(1, (self.group, TAPS)).softmax(dim=2)
            filters = filters * getattr(self, f"gamma{index + 1}")
            windows = taps(F.pad(x, (rate, rate, rate, rate)), 3, dilation=rate)
            for tap, window in enumerate(windows):
                message = window.unflatten(1, (self.group, -1)) * filters[:, :, tap, None]
                result = result + message.flatten(1, 2)
        return result


def _read(rows: torch.Tensor, index: torch.Tensor, below: int, beside: int, weights: torch.Tensor) -> torch.Tensor:
    """Return weighted sums over the four neighbours of nine taps.

    One neighbour after the other, so that no more than nine rows a position are ever gathered.

    Args:
        rows: (number, channels).
        index: row of the upper left neighbour of each tap, (..., 9).
        below: distance to the row of the pixel below.
        beside: distance to the row of the pixel to the right.
        weights: (4, ..., 9): upper left, upper right, lower left, lower right.

    Returns:
        (..., channels).
    """
    parts = [
        torch.matmul(weights[corner].unsqueeze(-2), F.embedding(index + step, rows)).squeeze(-2)
        for corner, step in enumerate((0, beside, below, below + beside))
    ]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _dilated(in_channels: int, out_channels: int, rate: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=rate, dilation=rate, bias=False)


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of nine neighbours at every position, or of every tap's contributions on the ringed map."""
    positions, ringed = sizes["height"] * sizes["width"], (sizes["height"] + 3) * (sizes["width"] + 3)
    predicted = TAPS * (arguments["group"] + 1)
    return sizes["batch"] * TAPS * max(positions * arguments["channels"], ringed * predicted)


BLOCKS.add(
    BlockSpec(
        name="dynamic-graph",
        title="dynamic graph message passing",
        paper="Dynamic Graph Message Passing Networks, CVPR 2020",
        year=2020,
        code="https://github.com/lzrobots/dgmn",
        build=DynamicGraphMessagePassing,
        original="edgeattn.validation.originals.dynamic_graph:DynamicGraphMessagePassing",
        variants=(
            Variant(
                "official",
                {"channels": 8, "group": 4, "dilation": (1, 2, 3, 4)},
                references={"dgmn_deformatt": {"channels": 8, "group": 4, "dilation": (1, 2, 3, 4)}},
                published=Published(
                    "Mask R-CNN, ResNet-50-FPN, res5, COCO 800x1333",
                    {"channels": 512, "group": 4},
                    {"batch": 1, "height": 25, "width": 42},
                ),
                overflow=Overflow(1.0, {"batch": 1, "height": 2, "width": 2600}),
            ),
            Variant(
                "deform",
                {"channels": 4, "group": 2, "dilation": (1, 2, 3, 4), "deform": "deform"},
                references={"dgmn_deform": {"channels": 4, "group": 2, "dilation": (1, 2, 3, 4), "deform": "deform"}},
            ),
            Variant(
                "none",
                {"channels": 4, "group": 2, "dilation": (1, 2, 3, 4), "deform": "none"},
                references={"dgmn_none": {"channels": 4, "group": 2, "dilation": (1, 2, 3, 4), "deform": "none"}},
            ),
        ),
        largest=_largest,
        precision="places (offsets plus positions) and bilinear weights stay in FP32, because FP16 has no half pixels "
        "beyond 1024; so do the affinities up to their softmax; what is read runs in FP16",
        int8="the convolutions of the taps; offset convolutions stay in floating point, as their errors move places",
        int8_exclude=tuple(f"off_conv{branch}" for branch in BRANCHES),
        inputs=(FEATURE_MAP,),
    )
)
