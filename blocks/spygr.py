"""Spatial pyramid graph reasoning.

Paper: Li et al., "Spatial Pyramid Based Graph Reasoning for Semantic Segmentation", CVPR 2020 (arXiv 2003.10211).
Code: none was published by the authors; this is the paper's definition, with state names of our own.

    phi = relu(conv(X)),  lam = sigmoid(conv(mean of X)),  A = phi^T diag(lam) phi,  D = diag(row sums of A)
    Y = relu((I - D^-1/2 A D^-1/2) X Theta)

A has one row per position, but its rank is the number of columns of phi. With Q = phi sqrt(lam) D^-1/2, the Laplacian
is I - Q^T Q: two products with a thin matrix, and D follows from the sums of phi. No element of Q exceeds 1.

Two public re-implementations exist and contradict the paper and each other; neither has weights, and neither is
supported. https://github.com/sunwng/SpyGR-segmentation makes new random modules in every forward, reshapes channels
into positions without a transpose, and fills Lambda with one number. https://github.com/Xlinford/SpyGr (a TensorFlow
fragment) uses the unnormalised D - A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, Variant
from edgeattn.foundation import UserError

SMALLEST_DEGREE = 1e-6
"""Degrees below this, as of a position without any similarity, count as this; the paper does not treat them."""

UPSAMPLING = ("nearest", "bilinear")
"""How a level of the pyramid is brought to the size of the one above it."""


def _normalised(phi: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Return Q (batch, nodes, positions) for phi of that shape and lam (batch, nodes, 1), both not negative."""
    degrees = torch.matmul((lam * phi.sum(dim=2, keepdim=True)).transpose(1, 2), phi)
    return phi * lam.sqrt() / degrees.clamp_min(SMALLEST_DEGREE).sqrt()


class GraphReasoning(nn.Module):
    """Graph convolution with the Laplacian of a graph that connects all positions by similarity.

    State: `phi` and `lam` (nodes, channels, 1, 1) with bias, `weight` (channels, channels, 1, 1) without.

    Args:
        channels: number of input and output channels.
        nodes: columns of phi, the rank of the graph.
    """

    def __init__(self, channels: int, nodes: int) -> None:
        super().__init__()
        self.phi = nn.Conv2d(channels, nodes, kernel_size=1)
        self.lam = nn.Conv2d(channels, nodes, kernel_size=1)
        self.weight = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.normalised = Fp32Step(_normalised)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        flat = x.flatten(2)
        lam = torch.sigmoid(self.lam(x.mean(dim=(2, 3), keepdim=True))).flatten(2)
        q = self.normalised(F.relu(self.phi(x)).flatten(2), lam)
        smooth = torch.matmul(torch.matmul(flat, q.transpose(1, 2)), q)
        return F.relu(self.weight((flat - smooth).view(x.shape)))


class SpatialPyramidGraphReasoning(nn.Module):
    """Graph reasoning on a map and on its repeated 2x2 max-poolings, summed from the coarsest level up.

    State: `levels.0` for the full map, `levels.1` for the half one, and so on, see `GraphReasoning`; only `levels.0`
    where the levels share their weights.

    Args:
        channels: number of input and output channels.
        nodes: columns of phi.
        levels: number of levels.
        shared: one set of weights for all levels.
        upsampling: "nearest" or "bilinear".

    Raises:
        ValueError: no nodes or levels, or an unknown upsampling.
    """

    def __init__(
        self, channels: int, nodes: int = 64, levels: int = 4, shared: bool = False, upsampling: str = "nearest"
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("nodes", nodes), ("levels", levels)):
            if value < 1:
                raise ValueError(f"{name} has to be at least 1, got {value}")
        if upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling is {' or '.join(UPSAMPLING)}, not {upsampling!r}")
        self.depth = levels
        self.upsampling = upsampling
        self.levels = nn.ModuleList(GraphReasoning(channels, nodes) for _ in range(1 if shared else levels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reason on all levels.

        Args:
            x: (batch, channels, height, width), height and width at least 2 ** (levels - 1). An example for an export
                with dynamic axes has to be at least twice as large, because torch takes a size of 1 for a constant.

        Returns:
            (batch, channels, height, width).

        Raises:
            UserError: a map too small for the levels; in a model with dynamic axes this is not checked.
        """
        least = 2 ** (self.depth - 1)
        for axis, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if isinstance(size, int) and size < least:
                raise UserError(
                    f"the {axis} of spatial pyramid graph reasoning with {self.depth} levels has to be at least "
                    f"{least}, got {size}. Give larger images or build fewer levels."
                )
        maps = [x]
        for _ in range(self.depth - 1):
            maps.append(F.max_pool2d(maps[-1], kernel_size=2))
        total: torch.Tensor = self.levels[-1](maps[-1])
        for level in reversed(range(self.depth - 1)):
            reasoned = self.levels[level % len(self.levels)](maps[level])
            total = reasoned + F.interpolate(total, size=reasoned.shape[2:], mode=self.upsampling)
        return total


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the features and phi."""
    widest: int = max(arguments["channels"], arguments.get("nodes", 64))
    return sizes["batch"] * widest * sizes["height"] * sizes["width"]


BLOCKS.add(
    BlockSpec(
        name="spygr",
        title="spatial pyramid graph reasoning",
        paper="Spatial Pyramid Based Graph Reasoning for Semantic Segmentation, CVPR 2020",
        year=2020,
        code="none by the authors",
        build=SpatialPyramidGraphReasoning,
        original="edgeattn.validation.originals.spygr:SpatialPyramidGraphReasoning",
        variants=(
            Variant(
                "paper",
                {"channels": 8, "nodes": 4, "levels": 3},
                published=Published(
                    "SpyGR, ResNet-101, Cityscapes 769x769", {"channels": 512}, {"batch": 1, "height": 97, "width": 97}
                ),
                overflow=Overflow(100.0, {"batch": 1, "height": 9, "width": 10}),
            ),
            Variant("shared", {"channels": 8, "nodes": 4, "levels": 2, "shared": True, "upsampling": "bilinear"}),
        ),
        largest=_largest,
        precision=(
            "the degrees, sums over positions and nodes, and the division by their roots stay in FP32, up to Q whose "
            "elements do not exceed 1; the products with Q run in FP16"
        ),
        int8="the three convolutions of each level; the products with Q stay in floating point",
        sizes=(
            {"batch": 2, "height": 9, "width": 10},
            {"batch": 1, "height": 9, "width": 4},
            {"batch": 3, "height": 6, "width": 11},
            {"batch": 1, "height": 4, "width": 4},
        ),
    )
)
