"""OCNet: a dilated ResNet with object context, in its base, pyramid and ASP forms.

Paper: Yuan et al., "OCNet: Object Context Network for Scene Parsing", arXiv 1809.00916 (IJCV 2021).
Code: https://github.com/openseg-group/OCNet.pytorch, `network/resnet101_{base,pyramid,asp}_oc.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks import ABN
from edgeattn.blocks.object_context import ASPOC, BaseOC, PyramidOC
from edgeattn.models.resnet import EXPANSION, deep_stem, make_stages

_linear_norm = functools.partial(ABN, activation="identity")


class _OCNet(nn.Module):
    """What the three forms share: `conv1..3`, `bn1..3`, `layer1..4`, `cls` and `dsn`; `context` is theirs.

    Normalisation is `ABN`. The official forward returns the auxiliary logits first.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
        dsn_activation: activation behind the normalisation of `dsn`.
    """

    context: nn.Module

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int],
        stem_width: int,
        base_width: int,
        dsn_activation: str = "leaky_relu",
    ) -> None:
        super().__init__()
        stem = [
            layer
            for layer in deep_stem((stem_width, stem_width, 2 * stem_width), _linear_norm)
            if not isinstance(layer, nn.ReLU)
        ]
        self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3 = stem
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            2 * stem_width, base_width, blocks, _linear_norm
        )
        self.features = base_width * 8 * EXPANSION
        self.inner = self.features // 4
        self.cls = nn.Conv2d(self.inner, num_classes, 1)
        self.dsn = nn.Sequential(
            nn.Conv2d(self.features // 2, self.inner, 3, padding=1),
            ABN(self.inner, activation=dsn_activation),
            nn.Dropout2d(0.05),
            nn.Conv2d(self.inner, num_classes, 1),
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
        return self.cls(self._in_context(self.layer4(x))), self.dsn(x)

    def _in_context(self, features: torch.Tensor) -> torch.Tensor:
        """Map the last stage's features (batch, 32 * base_width, h, w) to (batch, 8 * base_width, h, w)."""
        return self.context(features)  # type: ignore[no-any-return]

    def _reduce(self) -> list[nn.Module]:
        """Return the convolution and normalisation before the context."""
        return [nn.Conv2d(self.features, self.inner, 3, padding=1), ABN(self.inner)]


class OCNetBase(_OCNet):
    """OCNet whose context is self-attention between all positions; `context.{0,1,2}`.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self, num_classes: int, blocks: Sequence[int] = (3, 4, 23, 3), stem_width: int = 64, base_width: int = 64
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width)
        attention = BaseOC(self.inner, self.inner, self.inner // 2, self.inner // 2)
        self.context = nn.Sequential(*self._reduce(), attention)


class OCNetPyramid(_OCNet):
    """OCNet whose context is self-attention within tiles of four sizes; `layer5` and `context`.

    In this form no activation follows the normalisations of `layer5` and `dsn`.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        sizes: number of tiles per axis of each self-attention.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        sizes: Sequence[int] = (1, 2, 3, 6),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width, dsn_activation="identity")
        self.layer5 = nn.Sequential(nn.Conv2d(self.features, self.inner, 3, padding=1), _linear_norm(self.inner))
        self.context = PyramidOC(self.inner, self.inner, sizes)

    def _in_context(self, features: torch.Tensor) -> torch.Tensor:
        """Reduce the channels, then attend."""
        return self.context(self.layer5(features))  # type: ignore[no-any-return]


class OCNetASP(_OCNet):
    """OCNet whose context stands beside dilated convolutions; `context.{0,1,2}`.

    Args:
        num_classes: number of classes.
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        dilations: of the three dilated convolutions.
        stem_width: channels of the first two of the three stem convolutions; the third has twice as many.
        base_width: inner channels of the first stage.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        dilations: Sequence[int] = (12, 24, 36),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__(num_classes, blocks, stem_width, base_width)
        self.context = nn.Sequential(*self._reduce(), ASPOC(self.inner, self.inner // 2, dilations))
