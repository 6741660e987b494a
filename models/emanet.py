"""EMANet: a dilated ResNet whose features are written as mixtures of a few bases, fitted to each image.

Paper: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019 (arXiv 1907.13426).
Code: https://github.com/XiaLiPKU/EMANet, `network.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.ema import EMAUnit
from edgeattn.models.resnet import EXPANSION, contracted, deep_stem, make_stages


class EMANet(nn.Module):
    """EMANet in the official layout: `extractor`, `fc0`, `emau`, `fc1`, `fc2`.

    The bases that inference starts from are the buffer `emau.mu`, a moving average that training keeps.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        grids: dilations of the last stage's bottlenecks, as multiples of 4; the first one is always 2 instead.
        bases: number of bases.
        stage_num: number of E and M steps.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        grids: Sequence[int] = (1, 2, 4),
        bases: int = 64,
        stage_num: int = 3,
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        *convolutions, norm, relu = deep_stem((stem_width, stem_width, 2 * stem_width), nn.BatchNorm2d)
        last = [2, *(4 * grids[index] for index in range(1, blocks[3]))]
        stages = make_stages(
            2 * stem_width, base_width, blocks, nn.BatchNorm2d, dilations=(1, 1, contracted(2, blocks[2]), last)
        )
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.extractor = nn.Sequential(nn.Sequential(*convolutions), norm, relu, pool, *stages)
        features = base_width * 8 * EXPANSION
        self.fc0 = _conv_norm_relu(features, features // 4)
        self.emau = EMAUnit(features // 4, bases, stage_num, return_bases=False)
        self.fc1 = nn.Sequential(_conv_norm_relu(features // 4, features // 8), nn.Dropout2d(0.1))
        self.fc2 = nn.Conv2d(features // 8, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Logits (batch, num_classes, ceil(height / 8), ceil(width / 8)).
        """
        x = self.emau(self.fc0(self.extractor(image)))
        return self.fc2(self.fc1(x))  # type: ignore[no-any-return]


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3x3 convolution without bias, batch normalisation and ReLU under their official names."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU()))
