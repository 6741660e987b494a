"""SAN: self-attention as the operator of an image network, pairwise and patchwise.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020 (arXiv 2004.13621).
Code: https://github.com/hszhao/SAN, `model/san.py`; the window operators are CUDA code, `lib/sa/functions`.

    pairwise    w(p, d) = softmax over d of conv_w([conv1(x)(p) - conv2(x)(p + d), position(p) - position(p + d)])
    patchwise   w(p, .) = conv_w([conv1(x)(p), conv2(x)(p + d) for all d])
    y_c(p)      = sum over d of w_(c mod groups)(p, d) conv3(x)_c(p + d)

with positions outside the image reflected at its border.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.taps import tap_softmax, taps, weighted_sum
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

    def _taps(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Return the taps of a map that is reflected at its border."""
        reach = self.kernel_size // 2
        for axis, size in zip(("height", "width"), features.shape[2:], strict=True):
            if isinstance(size, int) and size <= reach:
                raise UserError(
                    f"SAN's attention with a {self.kernel_size}x{self.kernel_size} window cannot take {axis} {size}: "
                    f"reflection at the border needs {reach + 1} or more. Use a larger input or a smaller window."
                )
        return taps(nn.functional.pad(features, (reach, reach, reach, reach), mode="reflect"), self.kernel_size)

    def _aggregate(self, weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the values.

        Args:
            weights: per tap (batch, 1, groups, height, width); channel c has the weight of group c mod groups.
            x: the block's input.
        """
        values = [tap.unflatten(1, (-1, self.groups)) for tap in self._taps(self.conv3(x))]
        return weighted_sum(weights, values).flatten(1, 2)


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
        neighbours = self._taps(torch.cat([self.conv2(x), position], dim=1))
        logits = [self.conv_w(centre - tap).unsqueeze(1) for tap in neighbours]
        return self._aggregate(tap_softmax(logits, dim=1), x)

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
        window = torch.stack(self._taps(self.conv2(x)), dim=2).flatten(1, 2)
        weights = self.conv_w(torch.cat([self.conv1(x), window], dim=1))
        count = self.kernel_size**2
        return self._aggregate([weights[:, None, tap::count] for tap in range(count)], x)


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
    """Return the elements of the relation over the window, (batch, rel_planes + 2, window, positions), or a map's."""
    window, reach = arguments["kernel_size"] ** 2, arguments["kernel_size"] - 1
    relation = (arguments["rel_planes"] + 2) * window * sizes["height"] * sizes["width"]
    padded = max(arguments["rel_planes"] + 2, arguments.get("out_planes", arguments.get("mid_planes", 0)))
    return int(sizes["batch"] * max(relation, padded * (sizes["height"] + reach) * (sizes["width"] + reach)))


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
