"""OCNet, original: a dilated ResNet with object context in three forms.

Paper: Yuan et al., "OCNet: Object Context Network for Scene Parsing", arXiv 1809.00916.
Behaviour: openseg-group/OCNet.pytorch, `network/resnet101_{base,pyramid,asp}_oc.py`, whose forward returns the
auxiliary logits first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.validation.originals.abn import ABN
from edgeattn.validation.originals.dilated_resnet import EXPANSION, stages
from edgeattn.validation.originals.object_context import ASPOC, BaseOC, PyramidOC

_BatchNorm2d = functools.partial(ABN, activation="identity")


class _OCNet(nn.Module):
    """Stem, stages and both classifiers; the forms add `context`.

    Args:
        num_classes: number of classes K.
        blocks: residual units of the four stages.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        base_width: planes of the first stage; each further stage doubles them.
    """

    context: nn.Module

    def __init__(
        self, num_classes: int, blocks: Sequence[int] = (3, 4, 23, 3), stem_width: int = 64, base_width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False)
        self.bn1 = _BatchNorm2d(stem_width)
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn2 = _BatchNorm2d(stem_width)
        self.conv3 = nn.Conv2d(stem_width, stem_width * 2, 3, padding=1, bias=False)
        self.bn3 = _BatchNorm2d(stem_width * 2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(
            stem_width * 2, base_width, [2] * blocks[2], [4] * blocks[3], blocks, _BatchNorm2d
        )
        self.layer5: nn.Module = nn.Identity()
        features = base_width * 8 * EXPANSION
        self.cls = nn.Conv2d(features // 4, num_classes, 1)
        self.dsn = nn.Sequential(
            nn.Conv2d(features // 2, features // 4, 3, padding=1),
            ABN(features // 4),
            nn.Identity(),  # dropout in training
            nn.Conv2d(features // 4, num_classes, 1),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and auxiliary logits (B, K, h, w) at an eighth of the resolution of images (B, 3, H, W)."""
        x = torch.relu(self.bn1(self.conv1(image)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.maxpool(torch.relu(self.bn3(self.conv3(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        x_dsn = self.dsn(x)
        x = self.layer5(self.layer4(x))
        return self.cls(self.context(x)), x_dsn


class OCNetBase(_OCNet):
    """The form with self-attention over the whole map; arguments as `_OCNet`."""

    def __init__(
        self, num_classes: int, blocks: Sequence[int] = (3, 4, 23, 3), stem_width: int = 64, base_width: int = 64
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width)
        features = base_width * 8 * EXPANSION
        inner = features // 4
        self.context = nn.Sequential(
            nn.Conv2d(features, inner, 3, padding=1),
            ABN(inner),
            BaseOC(inner, inner, key_channels=inner // 2, value_channels=inner // 2, sizes=(1,)),
        )


class OCNetPyramid(_OCNet):
    """The form with self-attention in tiles; arguments as `_OCNet`, and the numbers of tiles per axis."""

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        sizes: Sequence[int] = (1, 2, 3, 6),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width)
        features = base_width * 8 * EXPANSION
        inner = features // 4
        self.dsn[1] = _BatchNorm2d(inner)
        self.layer5 = nn.Sequential(nn.Conv2d(features, inner, 3, padding=1), _BatchNorm2d(inner))
        self.context = PyramidOC(inner, inner, sizes)


class OCNetASP(_OCNet):
    """The form beside dilated convolutions; arguments as `_OCNet`, and the three dilations."""

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        dilations: tuple[int, int, int] = (12, 24, 36),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width)
        features = base_width * 8 * EXPANSION
        inner = features // 4
        self.context = nn.Sequential(
            nn.Conv2d(features, inner, 3, padding=1), ABN(inner), ASPOC(inner, inner // 2, dilations)
        )
