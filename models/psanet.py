"""PSANet: a dilated ResNet whose pixels collect from, and distribute to, all others.

Paper: Zhao et al., "PSANet: Point-wise Spatial Attention Network for Scene Parsing", ECCV 2018.
Code: https://github.com/hszhao/semseg, `model/psanet.py`, `model/resnet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.psa import PointwiseSpatialAttention
from edgeattn.foundation import UserError
from edgeattn.models.resnet import EXPANSION, deep_stem, make_stages

STRIDE = 16
"""Pixels between two positions of the attention: stride 8 of the backbone, and the attention's own 2."""


class PSANet(nn.Module):
    """PSANet in the official layout: `layer0..4`, `psa`, `cls`, `aux`.

    The size of the masks is part of the weights. Networks are trained with masks of `2 h - 1` rows for crops with
    `h = (size - 1) / 16 + 1` rows of positions, and as many columns likewise. The images may have other sizes, because
    a mask is centred on its position: in smaller ones it is cut, in larger ones what it does not reach has the logit 0.

    Args:
        num_classes: number of classes.
        mask: height and width of the masks, odd.
        blocks: bottlenecks per stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
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
            *deep_stem((stem_width, stem_width, 2 * stem_width), nn.BatchNorm2d), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            2 * stem_width, base_width, blocks, nn.BatchNorm2d
        )
        features = base_width * 8 * EXPANSION
        self.psa = PointwiseSpatialAttention(features, features // 4, mask_h=mask[0], mask_w=mask[1])
        self.cls = _classifier(2 * features, features // 4, num_classes)
        self.aux = _classifier(features // 2, features // 8, num_classes)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed; height - 1 and width - 1 are multiples of 16. In a model
                with dynamic axes this is not checked.

        Returns:
            Logits (batch, num_classes, (height - 1) / 8 + 1, (width - 1) / 8 + 1), and the auxiliary logits of the
            third stage, which only training uses.

        Raises:
            UserError: another height or width.
        """
        for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
            if isinstance(size, int) and size % STRIDE != 1:
                larger = -(-(size - 1) // STRIDE) * STRIDE + 1
                raise UserError(
                    f"the {axis} of an image for PSANet has to be a multiple of {STRIDE} plus 1, because the network "
                    f"aligns the corners of its maps, but it is {size}. Pad or resize the image to {larger}."
                )
        x = self.layer3(self.layer2(self.layer1(self.layer0(image))))
        return self.cls(self.psa(self.layer4(x))), self.aux(x)


def _classifier(inputs: int, inner: int, classes: int) -> nn.Sequential:
    """Return a 3x3 convolution with batch normalisation and ReLU, dropout, and a 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(inner, classes, 1),
    )
