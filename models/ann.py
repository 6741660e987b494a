"""ANN: a dilated ResNet with asymmetric non-local blocks, one to fuse two stages and one for the context.

Paper: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019 (arXiv 1908.07678).
Code: https://github.com/MendelXu/ANN, `models/seg/nets/annn.py`, `models/backbones/resnet/`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.asymmetric_non_local import AFNB, APNB, PYRAMID
from edgeattn.models.resnet import EXPANSION, contracted, deep_stem, make_stages


class _Backbone(nn.Module):
    """The official ResNet: `prefix`, whose layers have names, and `layer1..4`."""

    def __init__(self, blocks: Sequence[int], stem_width: int, base_width: int) -> None:
        super().__init__()
        names = [f"{layer}{index}" for index in (1, 2, 3) for layer in ("conv", "bn", "relu")]
        self.prefix = nn.Sequential(
            OrderedDict(zip(names, deep_stem((stem_width, stem_width, 2 * stem_width), nn.BatchNorm2d), strict=True))
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            2 * stem_width,
            base_width,
            blocks,
            nn.BatchNorm2d,
            dilations=(1, 1, contracted(2, blocks[2]), contracted(4, blocks[3])),
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of the third and of the fourth stage, at an eighth of the image's resolution."""
        x = self.layer3(self.layer2(self.layer1(self.maxpool(self.prefix(image)))))
        return x, self.layer4(x)


class ANN(nn.Module):
    """ANN in the official layout: `backbone`, `fusion`, `context`, `cls`, `dsn`.

    The official forward returns the auxiliary logits first.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        psp_size: sides of the grids that keys and values are averaged to.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        psp_size: Sequence[int] = PYRAMID,
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.backbone = _Backbone(blocks, stem_width, base_width)
        features = base_width * 8 * EXPANSION
        inner, attended = features // 4, features // 8
        self.fusion = AFNB(features // 2, features, features, attended, attended, psp_size=psp_size)
        self.context = nn.Sequential(
            *_conv_norm_relu(features, inner), APNB(inner, attended, attended, psp_size=psp_size)
        )
        self.cls = nn.Conv2d(inner, num_classes, 1)
        self.dsn = nn.Sequential(
            *_conv_norm_relu(features // 2, inner), nn.Dropout2d(0.05), nn.Conv2d(inner, num_classes, 1)
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            Logits (batch, num_classes, ceil(height / 8), ceil(width / 8) or so, by the pooling's ceil mode), and the
            auxiliary logits of the third stage, which only training uses.
        """
        low, high = self.backbone(image)
        return self.cls(self.context(self.fusion(low, high))), self.dsn(low)


def _conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a 3x3 convolution, and batch normalisation with ReLU as one layer."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU()),
    ]
