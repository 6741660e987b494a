"""ANN, original: a dilated ResNet with the asymmetric fusion and the asymmetric pyramid non-local block.

Paper: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019.
Behaviour: MendelXu/ANN, `models/seg/nets/annn.py` and `models/backbones/resnet/`, whose forward returns the auxiliary
logits first and resizes both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.validation.originals.asymmetric_non_local import AFNB, APNB
from edgeattn.validation.originals.dilated_resnet import EXPANSION, stages


class _Backbone(nn.Module):
    def __init__(self, blocks: Sequence[int], stem_width: int, base_width: int) -> None:
        super().__init__()
        self.prefix = nn.Sequential()
        self.prefix.add_module("conv1", nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False))
        self.prefix.add_module("bn1", nn.BatchNorm2d(stem_width))
        self.prefix.add_module("relu1", nn.ReLU())
        self.prefix.add_module("conv2", nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False))
        self.prefix.add_module("bn2", nn.BatchNorm2d(stem_width))
        self.prefix.add_module("relu2", nn.ReLU())
        self.prefix.add_module("conv3", nn.Conv2d(stem_width, stem_width * 2, 3, padding=1, bias=False))
        self.prefix.add_module("bn3", nn.BatchNorm2d(stem_width * 2))
        self.prefix.add_module("relu3", nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        third, fourth = [2] * blocks[2], [4] * blocks[3]
        third[0], fourth[0] = 1, 2  # units whose stride was removed have half the dilation
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(stem_width * 2, base_width, third, fourth, blocks)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = self.maxpool(self.prefix(image))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class ANN(nn.Module):
    """The whole network.

    Args:
        num_classes: number of classes K.
        blocks: residual units of the four stages.
        psp_size: sampled grids.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        base_width: planes of the first stage; each further stage doubles them.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        psp_size: Sequence[int] = (1, 3, 6, 8),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.backbone = _Backbone(blocks, stem_width, base_width)
        high = base_width * 8 * EXPANSION
        low, inner, keys = high // 2, high // 4, high // 8
        self.fusion = AFNB(low, high, high, keys, keys, psp_size=psp_size)
        self.context = nn.Sequential(
            nn.Conv2d(high, inner, 3, padding=1),
            nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU()),
            APNB(inner, keys, keys, psp_size=psp_size),
        )
        self.cls = nn.Conv2d(inner, num_classes, 1)
        self.dsn = nn.Sequential(
            nn.Conv2d(low, inner, 3, padding=1),
            nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU()),
            nn.Identity(),  # dropout in training
            nn.Conv2d(inner, num_classes, 1),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and auxiliary logits (B, K, h, w) at an eighth of the resolution of images (B, 3, H, W)."""
        x = self.backbone(image)
        aux_x = self.dsn(x[-2])
        return self.cls(self.context(self.fusion(x[-2], x[-1]))), aux_x
