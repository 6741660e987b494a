"""Spatial group-wise enhance (SGE): positions that resemble the mean of their group of channels are let through.

Paper: Li et al., "Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks", 2019
(arXiv 1905.09646). Code: https://github.com/implus/PytorchInsight, `classification/models/imagenet/resnet_sge.py`.

    g = mean_p x_p    t_p = x_p . g    per group, over its channels
    y_p = x_p sigmoid(w (t_p - mean(t)) / (std(t) + 1e-5) + b)

Two identities save passes: mean(t) = |g|^2, and the quotient does not change when t, std(t) and 1e-5 are divided by one
number. With |g| as that number, the products are no larger than the features.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, Sizes, Variant
from edgeattn.foundation import UserError

ADDED = 1e-5
"""What the published code adds to the standard deviation; it is not inside the root."""

VANISHED = 1e-12
"""A group's mean is divided by its length or, if that is less, by this number. The result is the same for any."""


def _direction(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean vectors (batch, groups, 1, c) over their lengths, what t's mean becomes, and the lengths."""
    square = (mean * mean).sum(dim=3, keepdim=True)
    length = square.sqrt().clamp_min(VANISHED)
    return mean / length, square / length, length


def _standardised(
    similarity: torch.Tensor, centre: torch.Tensor, length: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the gate (batch, groups, 1, positions) from similarities over the mean's length."""
    centred = similarity - centre
    variance = (centred * centred).sum(dim=3, keepdim=True) * (1 / (similarity.shape[3] - 1))
    return centred * (weight / (variance.sqrt() + ADDED / length)) + bias


class SpatialGroupEnhance(nn.Module):
    """Spatial group-wise enhance module.

    State names and shapes are the official ones: `weight` and `bias` (1, groups, 1, 1). The groups are of neighbouring
    channels, 64 of them in every released network. The standard deviation has the divisor N - 1.

    Args:
        channels: channels of input and output. The official class does not ask; here a wrong number fails early.
        groups: number of groups.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    def __init__(self, channels: int, groups: int = 64) -> None:
        super().__init__()
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(
                f"spatial group-wise enhance has groups={groups} for {channels} channels. "
                "Give a divisor of the channels; the released networks have 64."
            )
        self.groups = groups
        self.width = channels // groups
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1))
        self.direction = Fp32Step(_direction)
        self.standardised = Fp32Step(_standardised)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate the positions of (batch, channels, height, width), for any height and width but 1 x 1.

        Raises:
            UserError: a single position, which has no standard deviation.
        """
        grouped = x.reshape(x.shape[0], self.groups, self.width, -1)
        if grouped.shape[3] == 1:
            raise UserError("spatial group-wise enhance compares positions, but the map is 1 x 1. Use a larger input.")
        direction, centre, length = self.direction(grouped.mean(dim=3)[:, :, None])
        similarity = torch.matmul(direction, grouped)
        gate = self.standardised(similarity, centre, length, self.weight, self.bias).sigmoid()
        return (grouped * gate).view(x.shape)


_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "height": 5, "width": 7},
    {"batch": 1, "height": 9, "width": 4},
    {"batch": 3, "height": 3, "width": 11},
    {"batch": 1, "height": 1, "width": 2},
)

BLOCKS.add(
    BlockSpec(
        name="spatial-group-enhance",
        title="spatial group-wise enhance module",
        paper="Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks, 2019",
        year=2019,
        code="https://github.com/implus/PytorchInsight",
        build=SpatialGroupEnhance,
        original="edgeattn.validation.originals.spatial_group:SpatialGroupEnhance",
        variants=(
            Variant(
                "official",
                {"channels": 12, "groups": 3},
                listings={"sge": {"channels": 256, "groups": 64}},
                references={"sge": {"channels": 16, "groups": 4}},
                published=Published(
                    "SGE-ResNet-50, ImageNet 224x224, first stage",
                    {"channels": 256, "groups": 64},
                    {"batch": 1, "height": 56, "width": 56},
                ),
                overflow=Overflow(1500.0, {"batch": 2, "height": 3, "width": 4}),
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["channels"] * sizes["height"] * sizes["width"],
        precision=(
            "the means, their lengths, the variance and the quotient stay in FP32: they sum over positions and square; "
            "the similarities run in FP16, because the mean is divided by its length first"
        ),
        int8="nothing: the module has no convolution, and is bound by memory",
        sizes=_SIZES,
    )
)
