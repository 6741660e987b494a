"""DANet: a dilated ResNet with position attention beside channel attention.

Paper: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019 (arXiv 1809.02983).
Code: https://github.com/junfu1115/DANet, `encoding/models/sseg/danet.py`, `encoding/models/backbone/resnet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.dual_attention import DANetHead
from edgeattn.models.resnet import EXPANSION, contracted, deep_stem, make_stages


class _Backbone(nn.Module):
    """The official ResNet without its classifier: `conv1` (a sequence if the stem is deep), `bn1`, `layer1..4`."""

    def __init__(
        self,
        blocks: Sequence[int],
        multi_dilation: Sequence[int],
        deep: bool,
        stem_width: int,
        base_width: int,
    ) -> None:
        super().__init__()
        if deep:
            *convolutions, norm, _ = deep_stem((stem_width, stem_width, 2 * stem_width), nn.BatchNorm2d)
            stem: nn.Module = nn.Sequential(*convolutions)
            channels = 2 * stem_width
        else:
            stem, norm = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(stem_width)
            channels = stem_width
        self.conv1, self.bn1 = stem, norm
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        last = [multi_dilation[index % len(multi_dilation)] for index in range(blocks[3])]
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            channels, base_width, blocks, nn.BatchNorm2d, dilations=(1, 1, contracted(2, blocks[2]), last)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the last stage's features (batch, 32 * base_width, ceil(height / 8), ceil(width / 8))."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


class DANet(nn.Module):
    """DANet in the official layout: `pretrained`, the backbone, and `head`.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        multi_dilation: dilations of the bottlenecks of the last stage, repeated as often as needed.
        deep_stem: three 3x3 convolutions before the pooling instead of one 7x7.
        stem_width: channels of the stem's first convolution; a deep stem ends with twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        multi_dilation: Sequence[int] = (4, 8, 16),
        deep_stem: bool = False,
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.pretrained = _Backbone(blocks, multi_dilation, deep_stem, stem_width, base_width)
        self.head = DANetHead(base_width * 8 * EXPANSION, num_classes)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Logits (batch, num_classes, ceil(height / 8), ceil(width / 8)), and as many of position and of channel
            attention alone, which only training uses.
        """
        return self.head(self.pretrained(image))  # type: ignore[no-any-return]
