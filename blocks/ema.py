"""EMANet's expectation-maximisation attention unit.

Paper: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019 (arXiv 1907.13426).
Code: https://github.com/XiaLiPKU/EMANet, `network.py`.

    X = W x + b;  for t = 1..T:  Z = softmax_k(X^T mu),  m = X Z / (e + sum_n Z),  mu = m / (e + |m|_2)
    y = relu(bn(conv(relu(mu Z^T))) + x)

X is never computed, because every product with it may be taken the other way round: X^T mu = x^T (W^T mu) + b^T mu and
X Zn = W (x Zn) + b for shares Zn = Z / sum_n Z. One of the two convolutions over the map becomes two products with k
columns; what is left of the denominators, a factor per basis, is applied after them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

ADDED, CLAMPED = 1e-6, 1e-12
"""What EMANet adds to a norm before it divides by it, and what mmsegmentation replaces a smaller norm by."""

VANISHED = 1e-37
"""A basis with less responsibility than this has none; close to the smallest normal FP32 number."""


def _denominator(norm: torch.Tensor, clamp_norms: bool) -> torch.Tensor:
    """Return what the published code divides by instead of a norm."""
    return norm.clamp_min(CLAMPED) if clamp_norms else norm + ADDED


def _shares(responsibility: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each position's share of every basis (batch, positions, k), and the sums (batch, 1, k)."""
    mass = responsibility.sum(dim=1, keepdim=True).clamp_min(VANISHED)
    return responsibility / mass, mass


def _bases(mean: torch.Tensor, mass: torch.Tensor, *, clamp_norms: bool) -> torch.Tensor:
    """Return normalised bases from the means of the features under the shares (batch, c, k) and the shares' sums."""
    mean = mean * (mass / _denominator(mass, clamp_norms))
    return mean / _denominator(mean.norm(dim=1, keepdim=True), clamp_norms)


class EMAUnit(nn.Module):
    """Features as mixtures of k bases, which a few E and M steps fit to the image.

    State names and shapes are the official ones: buffer `mu` (1, c, k), `conv1` (c, c, 1, 1) with bias, `conv2.0`
    without bias, `conv2.1` batch normalisation. Three facts belong to the definition: no ReLU follows `conv1`; the
    result is made of the last responsibilities and the bases that were updated with them afterwards; the E and M steps
    carry no gradient, so `conv1` keeps its initial weights. The moving average of `mu` is part of the training script,
    not of the unit.

    Args:
        c: number of input and output channels.
        k: number of bases.
        stage_num: number T of E and M steps.
        clamp_norms: divide by max(norm, 1e-12), as mmsegmentation does, instead of by norm + 1e-6.
        return_bases: also return the bases, as the official unit does.

    Raises:
        ValueError: no channels, bases or steps.
    """

    def __init__(
        self, c: int, k: int, stage_num: int = 3, clamp_norms: bool = False, return_bases: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("c", c), ("k", k), ("stage_num", stage_num)):
            if value < 1:
                raise ValueError(
                    f"the EMA unit needs {name} of at least 1, got {value}. EMANet has c=512, k=64, 3 steps."
                )
        self.stage_num = stage_num
        self.return_bases = return_bases
        self.mu: torch.Tensor
        self.register_buffer("mu", F.normalize(torch.randn(1, c, k), dim=1))
        self.conv1 = nn.Conv2d(c, c, kernel_size=1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, kernel_size=1, bias=False), nn.BatchNorm2d(c))
        self.shares = Fp32Step(_shares)
        self.bases = Fp32Step(partial(_bases, clamp_norms=clamp_norms))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Fit the bases and write the features with them.

        Args:
            x: (batch, c, height, width).

        Returns:
            The features, shaped as x; with `return_bases` also the fitted bases (batch, c, k).
        """
        flat = x.detach().flatten(2)
        weight, bias = self.conv1.weight.detach().flatten(1), self.conv1.bias
        assert bias is not None
        bias = bias.detach()[:, None]
        mu = self.mu
        for _ in range(self.stage_num):
            energy = torch.matmul(flat.transpose(1, 2), torch.matmul(weight.transpose(0, 1), mu))
            responsibility = (energy + torch.matmul(bias.transpose(0, 1), mu)).softmax(dim=2)
            share, mass = self.shares(responsibility)
            mu = self.bases(torch.matmul(weight, torch.matmul(flat, share)) + bias, mass)
        mixture = torch.matmul(mu, responsibility.transpose(1, 2)).view(x.shape)
        features = F.relu(self.conv2(F.relu(mixture)) + x)
        return (features, mu) if self.return_bases else features


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of features, responsibilities and bases."""
    positions = sizes["height"] * sizes["width"]
    c: int = arguments["c"]
    k: int = arguments["k"]
    return sizes["batch"] * max(c * positions, k * positions, c * k)


_MMSEG = {"clamp_norms": True, "return_bases": False}

BLOCKS.add(
    BlockSpec(
        name="ema",
        title="expectation-maximisation attention unit",
        paper="Expectation-Maximization Attention Networks for Semantic Segmentation, ICCV 2019",
        year=2019,
        code="https://github.com/XiaLiPKU/EMANet, https://github.com/open-mmlab/mmsegmentation",
        build=EMAUnit,
        original="edgeattn.validation.originals.ema:EMAUnit",
        variants=(
            Variant(
                "official",
                {"c": 12, "k": 4},
                listings={"emanet_emau": {"c": 512, "k": 64, "stage_num": 3}},
                references={"emanet_emau": {"c": 8, "k": 4}},
                published=Published(
                    "EMANet-101, PASCAL VOC 513x513", {"c": 512, "k": 64}, {"batch": 1, "height": 65, "width": 65}
                ),
                overflow=Overflow(
                    1.0, {"batch": 1, "height": 2, "width": 3}, arguments={"c": 256}, state={r"conv1\.weight": 10000.0}
                ),
            ),
            Variant(
                "mmseg",
                {"c": 12, "k": 4, "stage_num": 2, **_MMSEG},
                key_map={
                    r"^(decode_head\.)?ema_module\.bases": "mu",
                    r"^(decode_head\.)?ema_mid_conv\.conv": "conv1",
                    r"^(decode_head\.)?ema_out_conv\.conv": "conv2.0",
                    r"^(decode_head\.)?ema_out_conv\.bn": "conv2.1",
                    r"^.*(backbone|auxiliary_head|ema_in_conv|bottleneck|conv_cat|conv_seg)\..*$": "",
                },
                references={"mmseg_ema": {"c": 8, "k": 4, "stage_num": 2, **_MMSEG}},
            ),
        ),
        largest=_largest,
        precision=(
            "energies and softmax stay in FP32, and so do both normalisers: the norm of a basis sums c squares, and "
            "the 1e-6 and 1e-12 next to the norms are below FP16's normal numbers; the products of shares with "
            "features, which are means, and the mixture run in FP16"
        ),
        int8="the convolution behind the mixture; the products of the E and M steps stay in floating point",
        inputs=(TensorInput("x", ("batch", "c", "height", "width")),),
    )
)
