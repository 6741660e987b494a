"""SAN: an image network whose only operator with a window is self-attention.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020 (arXiv 2004.13621).
Code: https://github.com/hszhao/SAN, `model/san.py`; depths and windows in `config/imagenet`.

The blocks cut a map once for each tap of a window, which is hundreds of nodes; a network of ten to nineteen of them
would be a graph of ten thousand. Here the attention is the same block, state and folding included, with the windows of
a map stacked by one convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.san import PairwiseAttention, PatchwiseAttention, SanBottleneck, _positions
from edgeattn.foundation import UserError

_RELATION = 16
"""Channels of a stage over those of its relation."""

_REDUCTION = 4
"""Channels of a stage over those inside its units."""


def _windows(features: torch.Tensor, kernel: int) -> torch.Tensor:
    """Return the window of every position, (batch, channels, kernel * kernel, height, width), reflected at the border.

    Exact: each output channel of the convolution has one weight, 1, at its tap.

    Args:
        features: (batch, channels, height, width).
        kernel: window size, odd.

    Raises:
        UserError: a map too small to be reflected.
    """
    channels, reach = features.shape[1], kernel // 2
    for axis, size in zip(("height", "width"), features.shape[2:], strict=True):
        if isinstance(size, int) and size <= reach:
            raise UserError(
                f"SAN's attention with a {kernel}x{kernel} window cannot take a map of {axis} {size}: reflection at "
                f"the border needs {reach + 1} or more. Use a larger image."
            )
    padded = F.pad(features, (reach, reach, reach, reach), mode="reflect").flatten(0, 1).unsqueeze(1)
    one_hot = torch.eye(kernel**2, dtype=features.dtype, device=features.device).view(-1, 1, kernel, kernel)
    stacked = F.conv2d(padded, one_hot)
    return stacked.reshape(-1, channels, *stacked.shape[1:])


def _aggregate(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a window of values; channel c has the weight of group c mod groups.

    Args:
        weights: (batch, groups, taps, height * width).
        values: (batch, channels, taps, height, width).
    """
    batch, channels, _, height, width = values.shape
    grouped = values.flatten(3).reshape(batch, -1, *weights.shape[1:])
    return (grouped * weights.unsqueeze(1)).sum(dim=3).reshape(batch, channels, height, width)


class StackedPairwiseAttention(PairwiseAttention):
    """Pairwise attention in few nodes; arguments and state are those of the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_planes, height, width) to (batch, out_planes, height, width)."""
        position = self.conv_p(_positions(x)).expand(x.shape[0], -1, -1, -1)
        centre = torch.cat([self.conv1(x), position], dim=1) + self.shift
        relation = centre.unsqueeze(2) - _windows(torch.cat([self.conv2(x), position], dim=1), self.kernel_size)
        logits: torch.Tensor = self.conv_w(relation.flatten(3))
        # The softmax runs over the last axis of a matrix, which is the fastest there is.
        weights = logits.transpose(2, 3).softmax(dim=3).transpose(2, 3)
        return _aggregate(weights, _windows(self.conv3(x), self.kernel_size))


class StackedPatchwiseAttention(PatchwiseAttention):
    """Patchwise attention in few nodes; arguments and state are those of the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_planes, height, width) to (batch, out_planes, height, width)."""
        around = _windows(self.conv2(x), self.kernel_size).flatten(1, 2)
        weights: torch.Tensor = self.conv_w(torch.cat([self.conv1(x), around], dim=1))
        weights = weights.flatten(2).reshape(x.shape[0], self.groups, self.kernel_size**2, -1)
        return _aggregate(weights, _windows(self.conv3(x), self.kernel_size))


class SanUnit(SanBottleneck):
    """The residual unit of SAN with stacked windows; arguments and state are those of the block."""

    FORMS: ClassVar[Mapping[str, type[PairwiseAttention | PatchwiseAttention]]] = {
        "pairwise": StackedPairwiseAttention,
        "patchwise": StackedPatchwiseAttention,
    }


class SAN(nn.Module):
    """SAN in the official layout: `conv_in`, `bn_in`, `conv0..4`, `bn0..4`, `layer0..4`, `fc`.

    A stage halves the map and changes the channels before its units; the first stage keeps the channels of the stem,
    the others have 4, 8, 16 and 32 times as many. The window of a stage needs a map larger than its half: with 7x7 in
    the last stage, images of 128 pixels or more.

    Args:
        form: "pairwise" or "patchwise".
        layers: units per stage.
        kernels: window size per stage, odd.
        num_classes: number of classes.
        width: channels of the stem, 64 in the published networks.
    """

    def __init__(
        self,
        form: str,
        layers: Sequence[int] = (2, 1, 2, 4, 1),
        kernels: Sequence[int] = (3, 7, 7, 7, 7),
        num_classes: int = 1000,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 1, bias=False)
        self.bn_in = nn.BatchNorm2d(width)
        self.stages = len(layers)
        before = width
        for stage, (count, kernel) in enumerate(zip(layers, kernels, strict=True)):
            channels = width * (2 ** (stage + 1) if stage else 1)
            units = [
                SanUnit(
                    form, channels, channels // _RELATION, channels // _REDUCTION, share_planes=8, kernel_size=kernel
                )
                for _ in range(count)
            ]
            self.add_module(f"conv{stage}", nn.Conv2d(before, channels, 1, bias=False))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(channels))
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            before = channels
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Scores (batch, num_classes).
        """
        x = torch.relu(self.bn_in(self.conv_in(image)))
        for stage in range(self.stages):
            convolution, units, norm = (self.get_submodule(f"{name}{stage}") for name in ("conv", "layer", "bn"))
            x = torch.relu(norm(units(convolution(self.pool(x)))))
        scores: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores
