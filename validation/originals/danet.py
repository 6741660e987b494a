"""DANet, original: a dilated ResNet with the dual attention head.

Paper: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019.
Behaviour: junfu1115/DANet, `encoding/models/sseg/danet.py` and `encoding/models/backbone/resnet.py` at `--os 8
--multi-grid`, before the logits are resized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.validation.originals.dilated_resnet import EXPANSION, stages
from edgeattn.validation.originals.dual_attention import DANetHead


class _Backbone(nn.Module):
    def __init__(
        self, blocks: Sequence[int], multi_dilation: Sequence[int], deep_stem: bool, stem_width: int, base_width: int
    ) -> None:
        super().__init__()
        if deep_stem:
            self.conv1: nn.Module = nn.Sequential(
                nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(stem_width),
                nn.ReLU(),
                nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False),
                nn.BatchNorm2d(stem_width),
                nn.ReLU(),
                nn.Conv2d(stem_width, stem_width * 2, 3, padding=1, bias=False),
            )
            inputs = stem_width * 2
        else:
            self.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
            inputs = stem_width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        third = [1 if unit == 0 else 2 for unit in range(blocks[2])]
        fourth = [multi_dilation[unit % len(multi_dilation)] for unit in range(blocks[3])]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(inputs, base_width, third, fourth, blocks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(image))))
        x = self.layer2(self.layer1(x))
        result: torch.Tensor = self.layer4(self.layer3(x))
        return result


class DANet(nn.Module):
    """The whole network.

    Args:
        num_classes: number of classes K.
        blocks: residual units of the four stages.
        multi_dilation: dilations of the last stage's units, in turn.
        deep_stem: three convolutions instead of one.
        stem_width: channels of the first convolution.
        base_width: planes of the first stage; each further stage doubles them.
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
        """Return three maps of logits (B, K, h, w) for images (B, 3, H, W): of both attentions and of each."""
        logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.head(self.pretrained(image))
        return logits
