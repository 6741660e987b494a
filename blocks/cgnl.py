"""Compact generalised non-local block (CGNL), and the plain non-local block of the same repository.

Paper: Yue et al., "Compact Generalized Non-local Network", NeurIPS 2018 (arXiv 1810.13125).
Code: https://github.com/KaiyuYue/cgnl-network.pytorch, `model/resnet.py`, SpatialCGNL, SpatialCGNLx, SpatialNL.

With t, p, g one group's channels at all positions, flattened to M elements:

    dot product: attended = (p . g) t
    Gaussian:    attended = e^-2c  sum_k (2c)^k / k! (p^k . g) t^k    c = 1e-4, k = 0 .. order
    out = GN(z(attended)) + x
"""

from __future__ import annotations

import copy
import functools
import math

import torch
from torch import nn
from torch.nn import functional

from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

GAMMA = 1e-4
"""The Gaussian kernel's constant c; the published code has no parameter for it."""


def _dot_product(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Return (phi . g) theta of flat groups (batch, groups, M); the products of phi and g are not stored."""
    return theta * (scale * torch.matmul(phi[:, :, None], g[..., None])[..., 0])


def _gaussian(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, *, scale: float, order: int) -> torch.Tensor:
    """Return the Taylor polynomial of flat groups (batch, groups, M) in theta, by Horner's rule."""
    weighted, coefficients = g, []
    for power in range(order + 1):
        weighted = weighted * phi if power else weighted
        alpha = math.exp(-2 * GAMMA) * (2 * GAMMA) ** power / math.factorial(power)
        coefficients.append(alpha * scale * weighted.sum(dim=2, keepdim=True))
    attended = coefficients[order]
    for coefficient in reversed(coefficients[:order]):
        attended = attended * theta + coefficient
    return attended


def _attend(
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    order: int | None,
    use_scale: bool,
    eps: float,
) -> torch.Tensor:
    """Return what the block adds to its input: GN(z(attended)) of projections (batch, planes, height, width)."""
    flat = [tensor.reshape(theta.shape[0], groups, -1) for tensor in (theta, phi, g)]
    scale = flat[0].shape[2] ** -0.5 if use_scale else 1.0
    attended = _dot_product(*flat, scale=scale) if order is None else _gaussian(*flat, scale=scale, order=order)
    extended = functional.conv2d(attended.reshape(theta.shape), z, groups=groups)
    return functional.group_norm(extended, groups, weight, bias, eps)


class CGNL(nn.Module):
    """Attention among all positions and channels of a group; one number per group is all that remains of it.

    State names and shapes are the official ones: `t`, `p`, `g` (planes) and `z` (grouped), 1x1 without bias, and `gn`.
    SpatialCGNL is `order=None`; SpatialCGNLx has an order, 3 in the shipped networks.

    Groups are contiguous channels. The factor p . g of a group may be negative and then inverts its sign. The Gaussian
    kernel's term k = 0 adds a constant to the group, which `z` turns into one per channel.

    Args:
        inplanes: channels of the input.
        planes: channels of t, p and g.
        use_scale: divide the factors by the square root of a group's number of elements.
        groups: number of channel groups; divides both widths.
        order: Taylor order of the Gaussian kernel, at least 1; None for the dot product.

    Raises:
        ValueError: groups that do not divide the channels, or an order below 1.
    """

    def __init__(
        self, inplanes: int, planes: int, use_scale: bool = False, groups: int = 8, order: int | None = None
    ) -> None:
        super().__init__()
        if groups < 1 or inplanes % groups or planes % groups:
            raise ValueError(f"groups of CGNL is {groups}. Give a divisor of inplanes={inplanes} and planes={planes}.")
        if order is not None and order < 1:
            raise ValueError(f"order of CGNL is {order}. Give 1 or more, or None for the dot product.")
        self.t = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.p = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.g = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.z = nn.Conv2d(planes, inplanes, kernel_size=1, groups=groups, bias=False)
        self.gn = nn.GroupNorm(groups, inplanes)
        self.attend = Fp32Step(
            functools.partial(_attend, groups=groups, order=order, use_scale=use_scale, eps=self.gn.eps)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inplanes, height, width) to the same shape, for any height and width."""
        state = (self.z.weight, self.gn.weight, self.gn.bias)
        out: torch.Tensor = self.attend(self.t(x), self.p(x), self.g(x), *state) + x
        return out


class SpatialNL(nn.Module):
    """The repository's embedded Gaussian non-local block: softmax over positions, no biases, batch normalisation.

    State names and shapes are the official ones: `t`, `p`, `g` (planes) and `z` (inplanes), 1x1 without bias, `bn`.

    Args:
        inplanes: channels of the input.
        planes: channels of t, p and g.
        use_scale: divide the energies by sqrt(planes); True in the shipped networks.
    """

    def __init__(self, inplanes: int, planes: int, use_scale: bool = False) -> None:
        super().__init__()
        self.scale = planes**-0.5 if use_scale else 1.0
        self.t = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.p = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.g = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.core = PixelAttentionCore()
        self.z = nn.Conv2d(planes, inplanes, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(inplanes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inplanes, height, width) to the same shape, for any height and width."""
        query = self.t(x) if self.scale == 1.0 else self.scale * self.t(x)
        attended = self.core(query.flatten(2), self.p(x).flatten(2), self.g(x).flatten(2))
        out: torch.Tensor = self.bn(self.z(attended.reshape(*attended.shape[:2], *x.shape[2:]))) + x
        return out

    def prepare_for_export(self) -> SpatialNL:
        """Return a copy whose query projection carries the scale."""
        folded = copy.deepcopy(self)
        with torch.no_grad():
            folded.t.weight.mul_(self.scale)
        folded.scale = 1.0
        return folded


PAPER = "Compact Generalized Non-local Network, NeurIPS 2018"
CODE = "https://github.com/KaiyuYue/cgnl-network.pytorch"
_INPUT = TensorInput("x", ("batch", "inplanes", "height", "width"))
_WIDTHS = {"inplanes": 1024, "planes": 512}
_CUB = {"batch": 1, "height": 28, "width": 28}


def _map(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the input."""
    return int(sizes["batch"] * sizes["height"] * sizes["width"] * max(arguments["inplanes"], arguments["planes"]))


BLOCKS.add(
    BlockSpec(
        name="cgnl",
        title="compact generalised non-local block",
        paper=PAPER,
        year=2018,
        code=CODE,
        build=CGNL,
        original="edgeattn.validation.originals.cgnl:CGNL",
        variants=(
            Variant(
                "dot",
                {"inplanes": 12, "planes": 6, "groups": 3},
                listings={"cgnl_dot": _WIDTHS},
                references={"cgnl_dot": {"inplanes": 12, "planes": 6, "groups": 3}},
                published=Published("ResNet-50, CUB-200 448x448", _WIDTHS, _CUB),
                overflow=Overflow(60.0, {"batch": 1, "height": 14, "width": 14}),
            ),
            Variant(
                "dot-scaled",
                {"inplanes": 8, "planes": 4, "use_scale": True, "groups": 1},
                listings={"cgnl_dot_scale": {**_WIDTHS, "use_scale": True, "groups": 1}},
                references={"cgnl_dot_scale": {"inplanes": 8, "planes": 4, "use_scale": True, "groups": 1}},
            ),
            Variant(
                "gaussian",
                {"inplanes": 12, "planes": 6, "groups": 3, "order": 3},
                listings={"cgnl_rbf": {**_WIDTHS, "order": 3}},
                references={"cgnl_rbf": {"inplanes": 12, "planes": 6, "groups": 3, "order": 3}},
                published=Published("ResNet-50, CUB-200 448x448", {**_WIDTHS, "order": 3}, _CUB),
            ),
        ),
        largest=_map,
        precision="all behind the projections t, p and g stays in FP32: p . g sums 50 thousand products at the "
        "published size, the Gaussian's coefficients start at 1e-12, and z has 1 / 25 of the arithmetic",
        int8="the projections t, p and g; not z, because the factors of the groups may differ by orders of magnitude",
        int8_exclude=("attend",),
        inputs=(_INPUT,),
    )
)
BLOCKS.add(
    BlockSpec(
        name="cgnl-non-local",
        title="non-local block of the CGNL repository",
        paper=PAPER,
        year=2018,
        code=CODE,
        build=SpatialNL,
        original="edgeattn.validation.originals.cgnl:SpatialNL",
        variants=(
            Variant(
                "official",
                {"inplanes": 8, "planes": 4, "use_scale": True},
                listings={"cgnl_nl": {**_WIDTHS, "use_scale": True}},
                references={"cgnl_nl": {"inplanes": 8, "planes": 4, "use_scale": True}},
                published=Published("ResNet-50, CUB-200 448x448", {**_WIDTHS, "use_scale": True}, _CUB),
                overflow=Overflow(500.0, {"batch": 1, "height": 5, "width": 7}),
            ),
        ),
        largest=lambda arguments, sizes: max(
            _map(arguments, sizes), sizes["batch"] * (sizes["height"] * sizes["width"]) ** 2
        ),
        precision="energies and softmax stay in FP32 (dot products overflow); the sum over values runs in FP16",
        int8="the projections t, p, g and z; the attention products stay in FP16",
        inputs=(_INPUT,),
    )
)
