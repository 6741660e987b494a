"""CCNet: a dilated ResNet with the recurrent criss-cross attention head.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019 (arXiv 1811.11721).
Code: https://github.com/speedinghzl/CCNet, `networks/ccnet.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks import ABN, RCCAModule
from edgeattn.models.resnet import EXPANSION, make_stages

_backbone_norm = functools.partial(ABN, activation="identity")


class CCNet(nn.Module):
    """CCNet in the official layout: `conv1..3`, `bn1..3`, `layer1..4`, `head`, `dsn`.

    Args:
        num_classes: number of classes.
        recurrence: applications of the attention.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        recurrence: int = 2,
        blocks: Sequence[int] = (3, 4, 23, 3),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False)
        self.bn1 = _backbone_norm(stem_width)
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn2 = _backbone_norm(stem_width)
        self.conv3 = nn.Conv2d(stem_width, 2 * stem_width, 3, padding=1, bias=False)
        self.bn3 = _backbone_norm(2 * stem_width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            2 * stem_width, base_width, blocks, _backbone_norm
        )
        features = base_width * 8 * EXPANSION
        self.head = RCCAModule(features, features // 4, num_classes, recurrence)
        self.dsn = nn.Sequential(
            nn.Conv2d(features // 2, features // 4, 3, padding=1),
            ABN(features // 4),
            nn.Dropout2d(0.1),
            nn.Conv2d(features // 4, num_classes, 1),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Logits (batch, num_classes, ceil(height / 8), ceil(width / 8) or so, by the pooling's ceil mode), and the
            auxiliary logits of the third stage, which only training uses.
        """
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        return self.head(self.layer4(x)), self.dsn(x)
