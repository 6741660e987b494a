"""Squeeze-and-attention: an attention branch on a coarser grid selects and adds to what the main branch finds.

Paper: Zhong et al., "Squeeze-and-Attention Networks for Semantic Segmentation", CVPR 2020 (arXiv 1909.03402).
Code: https://github.com/zilongzhong/SANet is not public any more. This is the definition as third parties re-implement
it (usually as `SqueezeAttentionBlock`); no official checkpoint was available to compare with.

    r = F(x)    u = upsample(F_att(average_pool(x)))    y = u r + u

F and F_att are convolutions with normalisation and ReLU; what is pooled is not one vector, but a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

UPSAMPLING = ("nearest", "bilinear")


class ConvolutionBlock(nn.Module):
    """3x3 convolutions with bias, each followed by batch normalisation and ReLU; state names `conv.0`, `conv.1`, ...

    Args:
        ch_in: channels of the input.
        ch_out: channels of every convolution.
        depth: number of convolutions.
    """

    def __init__(self, ch_in: int, ch_out: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            convolution = nn.Conv2d(ch_out if index else ch_in, ch_out, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(ch_out), nn.ReLU()]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, ch_in, height, width) to (batch, ch_out, height, width)."""
        return self.conv(x)


class SqueezeAttention(nn.Module):
    """Squeeze-and-attention block, `u r + u`.

    State names are those of the re-implementations: `conv.conv` (main branch) and `conv_atten.conv` (attention branch),
    each with the convolutions 0 and 3 and the normalisations 1 and 4.

    Args:
        ch_in: channels of the input.
        ch_out: channels of the output.
        pool: size of the windows that the attention branch averages; height and width have to be multiples.
        depth: number of convolutions of each branch.
        gate: whether a sigmoid follows the attention branch. Most re-implementations have none: the last ReLU keeps the
            attention from becoming negative.
        upsampling: one of `UPSAMPLING`.

    Raises:
        ValueError: a size below 1 or an unknown upsampling.
    """

    def __init__(
        self, ch_in: int, ch_out: int, *, pool: int = 2, depth: int = 2, gate: bool = False, upsampling: str = "nearest"
    ) -> None:
        super().__init__()
        for name, value in (("ch_in", ch_in), ("ch_out", ch_out), ("pool", pool), ("depth", depth)):
            if value < 1:
                raise ValueError(f"a squeeze-and-attention block has {name}={value}. Give at least 1.")
        if upsampling not in UPSAMPLING:
            raise ValueError(f"a squeeze-and-attention block has upsampling={upsampling!r}. Give one of {UPSAMPLING}.")
        self.pool = pool
        self.upsampling = upsampling
        self.conv = ConvolutionBlock(ch_in, ch_out, depth)
        self.conv_atten = ConvolutionBlock(ch_in, ch_out, depth)
        self.gate = nn.Sigmoid() if gate else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, ch_in, height, width) to (batch, ch_out, height, width).

        Raises:
            UserError: height or width is no multiple of `pool`.
        """
        self._check(x.shape[2:])
        attention = self.gate(self.conv_atten(F.avg_pool2d(x, self.pool)))
        attention = F.interpolate(attention, scale_factor=float(self.pool), mode=self.upsampling)
        return attention * (self.conv(x) + 1)

    def _check(self, sizes: Sequence[int]) -> None:
        """Refuse sizes that the upsampled attention would not have again; dynamic sizes are left to the runtime."""
        if any(isinstance(size, int) and size % self.pool for size in sizes):
            raise UserError(
                f"a squeeze-and-attention block with pool={self.pool} needs a height and a width that are multiples of "
                f"{self.pool}, got {tuple(sizes)}: averaged and upsampled, the attention would be smaller than the "
                "map. Pad or resize the input."
            )


_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "height": 9, "width": 6},
    {"batch": 1, "height": 3, "width": 12},
    {"batch": 3, "height": 6, "width": 15},
    {"batch": 1, "height": 3, "width": 3},
)
"""Multiples of 3, the pool of the tested blocks, so that there are odd sizes too; published blocks have 2."""


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of a branch's map."""
    return sizes["batch"] * arguments["ch_out"] * sizes["height"] * sizes["width"]


BLOCKS.add(
    BlockSpec(
        name="squeeze-attention",
        title="squeeze-and-attention block",
        paper="Squeeze-and-Attention Networks for Semantic Segmentation, CVPR 2020",
        year=2020,
        code="no public code; the definition of third-party blocks named SqueezeAttentionBlock",
        build=SqueezeAttention,
        original="edgeattn.validation.originals.squeeze_attention:SqueezeAttention",
        variants=(
            Variant("common", {"ch_in": 6, "ch_out": 4, "pool": 3}),
            Variant(
                "gated",
                {"ch_in": 6, "ch_out": 4, "pool": 3, "depth": 1, "gate": True, "upsampling": "bilinear"},
            ),
        ),
        largest=_largest,
        precision="nothing: convolutions, averages of a few neighbours and two products run in FP16",
        int8="all convolutions; the product of the branches stays in floating point",
        inputs=(TensorInput("x", ("batch", "ch_in", "height", "width")),),
        sizes=_SIZES,
    )
)
