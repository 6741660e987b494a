"""SAN: self-attention as the operator of an image network, pairwise and patchwise.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020 (arXiv 2004.13621).
Code: https://github.com/hszhao/SAN, `model/san.py`; the window operators are CUDA code, `lib/sa/functions`.

    pairwise    w(p, d) = softmax over d of conv_w([conv1(x)(p) - conv2(x)(p + d), position(p) - position(p + d)])
    patchwise   w(p, .) = conv_w([conv1(x)(p), conv2(x)(p + d) for all d])
    y_c(p)      = sum over d of w_(c mod groups)(p, d) conv3(x)_c(p + d)

with positions outside the image reflected at its border.

A window is stacked by slices, first of columns, then of the rows of that stack: 2 k slices for k * k taps, which no
INT8 form can mistake for a convolution. The relation is stacked whole, so that `conv_w` and the softmax are one node
each whatever the window; the values, which have more channels, one row of taps at a time: a whole stack is k times
their columns. Per layer with a 7x7 window: 80 nodes at most, and no tensor above the relation's on large maps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


class _WindowAttention(nn.Module):
    """What the pairwise and the patchwise form share: three projections and the sum over the window.

    Args:
        in_planes: input channels.
        rel_planes: channels of the relation.
        out_planes: output channels, a multiple of `share_planes`.
        share_planes: output channels that share a weight; those of equal remainder modulo out_planes / share_planes.
        kernel_size: window size, odd and at least 3.

    Raises:
        ValueError: an even or too small window, or channels that do not divide.
    """

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"SAN's attention needs an odd kernel_size of 3 or more, got {kernel_size}")
        if out_planes % share_planes:
            raise ValueError(
                f"out_planes ({out_planes}) is not a multiple of share_planes ({share_planes}); choose a divisor"
            )
        self.kernel_size = kernel_size
        self.groups = out_planes // share_planes
        self.conv1 = nn.Conv2d(in_planes, rel_planes, kernel_size=1)
        self.conv2 = nn.Conv2d(in_planes, rel_planes, kernel_size=1)
        self.conv3 = nn.Conv2d(in_planes, out_planes, kernel_size=1)

    def _columns(self, features: torch.Tensor) -> torch.Tensor:
        """Return each column of taps of a map that is reflected at its border.

        Args:
            features: (batch, channels, height, width).

        Returns:
            (batch, channels, kernel_size, height + kernel_size - 1, width), of which `_row` cuts a row of taps.
        """
        reach = self.kernel_size // 2
        for axis, size in zip(("height", "width"), features.shape[2:], strict=True):
            if isinstance(size, int) and size <= reach:
                raise UserError(
                    f"SAN's attention with a {self.kernel_size}x{self.kernel_size} window cannot take {axis} {size}: "
                    f"reflection at the border needs {reach + 1} or more. Use a larger input or a smaller window."
                )
        padded = nn.functional.pad(features, (reach, reach, reach, reach), mode="reflect").unsqueeze(2)
        return torch.cat([padded[..., _shifted(tap, self.kernel_size)] for tap in range(self.kernel_size)], dim=2)

    def _row(self, columns: torch.Tensor, tap: int) -> torch.Tensor:
        """Return a row of taps (..., kernel_size, height, width) of what `_columns` gives."""
        return columns[..., _shifted(tap, self.kernel_size), :]

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """Return the window of every position, (batch, channels, taps, height, width), row by row."""
        columns = self._columns(features)
        return torch.cat([self._row(columns, tap) for tap in range(self.kernel_size)], dim=2)

    def _aggregate(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the values.

        Args:
            weights: (batch, groups, taps, height, width); channel c has the weight of group c mod groups.
            x: the block's input.
        """
        size = self.kernel_size
        values = self._columns(self.conv3(x)).unflatten(1, (-1, self.groups))
        grouped = weights.unsqueeze(1)
        total = (self._row(values, 0) * grouped.narrow(3, 0, size)).sum(dim=3)
        for tap in range(1, size):
            total = total + (self._row(values, tap) * grouped.narrow(3, tap * size, size)).sum(dim=3)
        return total.flatten(1, 2)


def _shifted(tap: int, kernel: int) -> slice:
    """Return where a tap sees a padded axis; counted from the end, so that it is constant for dynamic sizes."""
    return slice(tap, tap - (kernel - 1) or None)


class PairwiseAttention(_WindowAttention):
    """Weights from the difference of a position to each neighbour, with a softmax over the window.

    State names and shapes are the official ones: `conv1`, `conv2`, `conv3`, `conv_w.{0,2,3,5}` (batch normalisation,
    convolution, batch normalisation, convolution, with a ReLU before each convolution), `conv_p` (2, 2, 1, 1).
    Positions are (x, y), each from -1 to 1 over the map.

    Args:
        in_planes: input channels.
        rel_planes: channels of the relation.
        out_planes: output channels, a multiple of `share_planes`.
        share_planes: output channels that share a weight; those of equal remainder modulo out_planes / share_planes.
        kernel_size: window size, odd and at least 3; height and width have to exceed half of it.

    Raises:
        ValueError: an even or too small window, or channels that do not divide.
    """

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__(in_planes, rel_planes, out_planes, share_planes, kernel_size)
        self.conv_w = nn.Sequential(
            nn.BatchNorm2d(rel_planes + 2),
            nn.ReLU(),
            nn.Conv2d(rel_planes + 2, rel_planes, kernel_size=1, bias=False),
            nn.BatchNorm2d(rel_planes),
            nn.ReLU(),
            nn.Conv2d(rel_planes, self.groups, kernel_size=1),
        )
        self.conv_p = nn.Conv2d(2, 2, kernel_size=1)
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.zeros(rel_planes + 2, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_planes, height, width) to (batch, out_planes, height, width)."""
        position = self.conv_p(_positions(x)).expand(x.shape[0], -1, -1, -1)
        centre = torch.cat([self.conv1(x), position], dim=1) + self.shift
        relation = centre.unsqueeze(2) - self._windows(torch.cat([self.conv2(x), position], dim=1))
        weights = self.conv_w(relation.flatten(3)).softmax(dim=2)
        return self._aggregate(weights.unflatten(3, x.shape[2:]), x)

    def prepare_for_export(self) -> PairwiseAttention:
        """Return a copy whose projections carry the first batch normalisation.

        Exact: an affine map of a difference is the difference of two maps with its gain, plus its shift.
        """
        folded = copy.deepcopy(self)
        norm = folded.conv_w[0]
        if not isinstance(norm, nn.BatchNorm2d):
            return folded
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            parts = (gain[:-2], gain[:-2], gain[-2:])
            for convolution, factor in zip((folded.conv1, folded.conv2, folded.conv_p), parts, strict=True):
                assert convolution.bias is not None
                convolution.weight.mul_(factor[:, None, None, None])
                convolution.bias.mul_(factor)
            folded.shift = (norm.bias - gain * norm.running_mean)[:, None, None]
        folded.conv_w[0] = nn.Identity()
        return folded


def _positions(x: torch.Tensor) -> torch.Tensor:
    """Return the positions (1, 2, height, width) of a map: x, then y, each from -1 to 1."""
    height, width = x.shape[2:]
    columns = torch.arange(width, device=x.device, dtype=x.dtype) * (2 / (width - 1)) - 1
    rows = torch.arange(height, device=x.device, dtype=x.dtype) * (2 / (height - 1)) - 1
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])[None]


class PatchwiseAttention(_WindowAttention):
    """Weights from the whole window at once; no softmax and no positions.

    State names and shapes are the official ones: `conv1`, `conv2`, `conv3`, `conv_w.{0,2,3,5}` (batch normalisation,
    convolution, batch normalisation, convolution, with a ReLU before each convolution). `conv_w` reads the channels of
    `conv1`, then those of `conv2` with all taps of a channel in a row, and gives all taps of a group in a row.

    Args:
        in_planes: input channels.
        rel_planes: channels of the relation.
        out_planes: output channels, a multiple of `share_planes`.
        share_planes: output channels that share a weight; those of equal remainder modulo out_planes / share_planes.
        kernel_size: window size, odd and at least 3; height and width have to exceed half of it.

    Raises:
        ValueError: an even or too small window, or channels that do not divide.
    """

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__(in_planes, rel_planes, out_planes, share_planes, kernel_size)
        window = kernel_size**2
        self.conv_w = nn.Sequential(
            nn.BatchNorm2d(rel_planes * (window + 1)),
            nn.ReLU(),
            nn.Conv2d(rel_planes * (window + 1), self.groups, kernel_size=1, bias=False),
            nn.BatchNorm2d(self.groups),
            nn.ReLU(),
            nn.Conv2d(self.groups, window * self.groups, kernel_size=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_planes, height, width) to (batch, out_planes, height, width)."""
        window = self._windows(self.conv2(x)).flatten(1, 2)
        weights = self.conv_w(torch.cat([self.conv1(x), window], dim=1))
        return self._aggregate(weights.unflatten(1, (self.groups, -1)), x)


class SanBottleneck(nn.Module):
    """The residual unit of SAN: conv(ReLU(bn2(sam(ReLU(bn1(x)))))) + x.

    State names and shapes are the official ones: `bn1`, `sam.*`, `bn2`, `conv`.

    Args:
        form: "pairwise" or "patchwise".
        in_planes: input and output channels.
        rel_planes: channels of the relation.
        mid_planes: channels of the attention's result.
        share_planes: channels that share a weight.
        kernel_size: window size, odd and at least 3.

    Raises:
        ValueError: an unknown form, an even or too small window, or channels that do not divide.
    """

    FORMS: ClassVar[Mapping[str, type[_WindowAttention]]] = {
        "pairwise": PairwiseAttention,
        "patchwise": PatchwiseAttention,
    }

    def __init__(
        self,
        form: str,
        in_planes: int,
        rel_planes: int,
        mid_planes: int,
        share_planes: int = 8,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        if form not in self.FORMS:
            raise ValueError(f"SAN's attention has the forms {', '.join(self.FORMS)}, not {form!r}; choose one of them")
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.sam = self.FORMS[form](in_planes, rel_planes, mid_planes, share_planes, kernel_size)
        self.bn2 = nn.BatchNorm2d(mid_planes)
        self.conv = nn.Conv2d(mid_planes, in_planes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_planes, height, width) to the same shape."""
        attended = self.sam(torch.relu(self.bn1(x)))
        return self.conv(torch.relu(self.bn2(attended))) + x


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the relation, (batch, rel_planes + 2, taps, positions), or of the columns of a map."""
    kernel, height, width = arguments["kernel_size"], sizes["height"], sizes["width"]
    related = arguments["rel_planes"] + 2
    relation = related * kernel**2 * height * width
    channels = max(related, arguments.get("out_planes", arguments.get("mid_planes", 0)))
    return int(sizes["batch"] * max(relation, channels * kernel * (height + kernel - 1) * width))


_SIZES_3: tuple[Sizes, ...] = (
    {"batch": 2, "height": 5, "width": 7},
    {"batch": 1, "height": 9, "width": 4},
    {"batch": 3, "height": 3, "width": 11},
    {"batch": 1, "height": 2, "width": 2},
)
_SIZES_7: tuple[Sizes, ...] = (
    {"batch": 2, "height": 5, "width": 7},
    {"batch": 1, "height": 9, "width": 4},
    {"batch": 3, "height": 4, "width": 6},
    {"batch": 1, "height": 4, "width": 4},
)
_SMALL = {"in_planes": 6, "rel_planes": 4, "out_planes": 6, "share_planes": 3, "kernel_size": 3}
_SMALL_UNIT = {"in_planes": 6, "rel_planes": 4, "mid_planes": 6, "share_planes": 3, "kernel_size": 3}
_FIRST_STAGE = {"in_planes": 256, "rel_planes": 16, "out_planes": 64, "share_planes": 8, "kernel_size": 7}
_FIRST_UNIT = {"in_planes": 256, "rel_planes": 16, "mid_planes": 64, "share_planes": 8, "kernel_size": 7}
_MAP = {"batch": 1, "height": 56, "width": 56}
_PAPER = "Exploring Self-attention for Image Recognition, CVPR 2020"
_CODE = "https://github.com/hszhao/SAN"
_INPUT = (TensorInput("x", ("batch", "in_planes", "height", "width")),)
_PRECISION_PAIRWISE = "the softmax stays in FP32; convolutions, differences and the sum over values run in FP16"
_PRECISION_PATCHWISE = "all of it runs in FP16: there is no softmax"
_INT8 = "the three projections; conv_w, whose results are the attention's weights, stays in FP16"

BLOCKS.add(
    BlockSpec(
        name="san-pairwise",
        title="pairwise self-attention",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=PairwiseAttention,
        original="edgeattn.validation.originals.san:PairwiseAttention",
        variants=(
            Variant(
                "official",
                _SMALL,
                listings={"san_pairwise": _FIRST_STAGE},
                references={"san_sam_pairwise": _SMALL},
                published=Published("SAN10 pairwise, ImageNet 224x224, layer1", _FIRST_STAGE, _MAP),
            ),
            Variant("kernel-7", _SMALL | {"kernel_size": 7}, sizes=_SIZES_7),
        ),
        largest=_largest,
        precision=_PRECISION_PAIRWISE,
        int8=_INT8,
        int8_exclude=("conv_w",),
        inputs=_INPUT,
        sizes=_SIZES_3,
    )
)
BLOCKS.add(
    BlockSpec(
        name="san-patchwise",
        title="patchwise self-attention",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=PatchwiseAttention,
        original="edgeattn.validation.originals.san:PatchwiseAttention",
        variants=(
            Variant(
                "official",
                _SMALL,
                listings={"san_patchwise": _FIRST_STAGE},
                references={"san_sam_patchwise": _SMALL},
                published=Published("SAN10 patchwise, ImageNet 224x224, layer1", _FIRST_STAGE, _MAP),
            ),
        ),
        largest=_largest,
        precision=_PRECISION_PATCHWISE,
        int8=_INT8,
        int8_exclude=("conv_w",),
        inputs=_INPUT,
        sizes=_SIZES_3,
    )
)
BLOCKS.add(
    BlockSpec(
        name="san-bottleneck",
        title="SAN residual unit",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=SanBottleneck,
        original="edgeattn.validation.originals.san:SanBottleneck",
        variants=(
            Variant(
                "pairwise",
                {"form": "pairwise", **_SMALL_UNIT},
                references={"san_unit_pairwise": {"form": "pairwise", **_SMALL_UNIT}},
                published=Published(
                    "SAN10 pairwise, ImageNet 224x224, layer1", {"form": "pairwise", **_FIRST_UNIT}, _MAP
                ),
            ),
            Variant(
                "patchwise",
                {"form": "patchwise", **_SMALL_UNIT},
                references={"san_unit_patchwise": {"form": "patchwise", **_SMALL_UNIT}},
                published=Published(
                    "SAN10 patchwise, ImageNet 224x224, layer1", {"form": "patchwise", **_FIRST_UNIT}, _MAP
                ),
            ),
        ),
        largest=_largest,
        precision=f"pairwise: {_PRECISION_PAIRWISE}; patchwise: {_PRECISION_PATCHWISE}",
        int8=f"{_INT8}; the last convolution",
        int8_exclude=("sam.conv_w",),
        inputs=_INPUT,
        sizes=_SIZES_3,
    )
)
