"""PSANet, original: a dilated ResNet with point-wise spatial attention in both directions.

Paper: Zhao et al., "PSANet: Point-wise Spatial Attention Network for Scene Parsing", ECCV 2018.
Behaviour: hszhao/semseg, `model/psanet.py` and `model/resnet.py`, in evaluation, before the logits are resized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.validation.originals.dilated_resnet import EXPANSION, stages
from edgeattn.validation.originals.psa import PointwiseSpatialAttention


class PSANet(nn.Module):
    """The whole network.

    Args:
        num_classes: number of classes K.
        mask: height and width of the masks.
        blocks: residual units of the four stages.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        base_width: planes of the first stage; each further stage doubles them.
    """

    def __init__(
        self,
        num_classes: int,
        mask: tuple[int, int],
        blocks: Sequence[int] = (3, 4, 23, 3),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_width),
            nn.ReLU(),
            nn.Conv2d(stem_width, stem_width * 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem_width * 2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(
            stem_width * 2, base_width, [2] * blocks[2], [4] * blocks[3], blocks
        )
        features = base_width * 8 * EXPANSION
        self.psa = PointwiseSpatialAttention(features, features // 4, mask_h=mask[0], mask_w=mask[1])
        self.cls = nn.Sequential(
            nn.Conv2d(features * 2, features // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(features // 4),
            nn.ReLU(),
            nn.Identity(),  # dropout in training
            nn.Conv2d(features // 4, num_classes, 1),
        )
        self.aux = nn.Sequential(
            nn.Conv2d(features // 2, features // 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(features // 8),
            nn.ReLU(),
            nn.Identity(),  # dropout in training
            nn.Conv2d(features // 8, num_classes, 1),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and auxiliary logits (B, K, h, w) at an eighth of the resolution of images (B, 3, H, W)."""
        x_tmp = self.layer3(self.layer2(self.layer1(self.layer0(image))))
        x = self.psa(self.layer4(x_tmp))
        return self.cls(x), self.aux(x_tmp)
