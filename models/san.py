"""SAN: an image network whose only operator with a window is self-attention.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020 (arXiv 2004.13621).
Code: https://github.com/hszhao/SAN, `model/san.py`; depths and windows in `config/imagenet`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.san import SanBottleneck

_RELATION = 16
"""Channels of a stage over those of its relation."""

_REDUCTION = 4
"""Channels of a stage over those inside its units."""


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
                SanBottleneck(
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
