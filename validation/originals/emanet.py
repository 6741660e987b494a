"""EMANet, original: a dilated ResNet with the expectation-maximisation attention unit.

Paper: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019.
Behaviour: XiaLiPKU/EMANet, `network.py`, in evaluation, before the logits are resized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.validation.originals.dilated_resnet import EXPANSION, stages
from edgeattn.validation.originals.ema import EMAUnit


class _ConvBNReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


class EMANet(nn.Module):
    """The whole network.

    Args:
        num_classes: number of classes K.
        blocks: residual units of the four stages.
        grids: factors of the last stage's dilation 4; its first unit has dilation 2.
        bases: bases of the attention unit.
        stage_num: expectation and maximisation steps.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        base_width: planes of the first stage; each further stage doubles them.
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
        stem = nn.Sequential(
            nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            nn.Conv2d(stem_width, stem_width * 2, 3, padding=1, bias=False),
        )
        third, fourth = [2] * blocks[2], [4 * grids[unit] for unit in range(blocks[3])]
        third[0], fourth[0] = 1, 2
        self.extractor = nn.Sequential(
            stem,
            nn.BatchNorm2d(stem_width * 2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            *stages(stem_width * 2, base_width, third, fourth, blocks),
        )
        features = base_width * 8 * EXPANSION
        self.fc0 = _ConvBNReLU(features, features // 4)
        self.emau = EMAUnit(features // 4, bases, stage_num)
        self.fc1 = nn.Sequential(_ConvBNReLU(features // 4, features // 8), nn.Identity())  # dropout in training
        self.fc2 = nn.Conv2d(features // 8, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, h, w) at an eighth of the resolution of images (B, 3, H, W)."""
        x = self.fc0(self.extractor(image))
        x, _ = self.emau(x)
        logits: torch.Tensor = self.fc2(self.fc1(x))
        return logits
