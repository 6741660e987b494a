"""The networks of mmsegmentation: a dilated ResNet with a decode head and an auxiliary head.

Code: https://github.com/open-mmlab/mmsegmentation, `mmseg/models/segmentors/encoder_decoder.py` and
`mmseg/models/backbones/resnet.py`, version 1.2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from edgeattn.models.mmseg_heads import HEADS, AuxiliaryHead
from edgeattn.models.resnet import EXPANSION, contracted, deep_stem, make_stages


class ResNetV1c(nn.Module):
    """ResNet with three convolutions as its stem and output stride 8: `stem`, `layer1..4`.

    Args:
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        base_width: channels of the stem and inner channels of the first stage.
    """

    def __init__(self, blocks: Sequence[int], base_width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*deep_stem((base_width // 2, base_width // 2, base_width), nn.BatchNorm2d))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            base_width,
            base_width,
            blocks,
            nn.BatchNorm2d,
            dilations=(1, 1, contracted(2, blocks[2]), contracted(4, blocks[3])),
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Map images (batch, 3, height, width) to what each of the four stages gives."""
        x = self.maxpool(self.stem(image))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            stages.append(x)
        return stages


class EncoderDecoder(nn.Module):
    """A network of mmsegmentation: `backbone`, `decode_head`, `auxiliary_head`.

    Args:
        head: the decode head, one of `HEADS`.
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        base_width: inner channels of the first stage.
        options: further arguments of the decode head.
    """

    def __init__(
        self,
        head: str,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        base_width: int = 64,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        widths = [base_width * 2**stage * EXPANSION for stage in range(len(blocks))]
        self.stages = HEADS[head].stages
        self.backbone = ResNetV1c(blocks, base_width)
        self.decode_head = HEADS[head].build(*(widths[stage] for stage in self.stages), num_classes, **options or {})
        self.auxiliary_head = AuxiliaryHead(widths[2], num_classes)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Segment images.

        Args:
            image: (batch, 3, height, width), preprocessed.

        Returns:
            The decode head's logits, then the auxiliary head's, which only training uses; each (batch, num_classes,
            ceil(height / 8), ceil(width / 8)).
        """
        features = self.backbone(image)
        decoded = self.decode_head(*(features[stage] for stage in self.stages))
        logits = decoded if isinstance(decoded, tuple) else (decoded,)
        return (*logits, self.auxiliary_head(features[2]))
