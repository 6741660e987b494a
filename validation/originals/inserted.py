"""ResNet with CGNL, with its plain non-local block, or with double attention between residual units, originals.

Papers: Yue et al., "Compact Generalized Non-local Network", NeurIPS 2018; Chen et al., "A2-Nets: Double Attention
Networks", NeurIPS 2018.
Behaviour: KaiyuYue/cgnl-network.pytorch, `model/resnet.py`; for A2-Net, the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.cgnl import CGNL, SpatialNL
from edgeattn.validation.originals.double_attention import DoubleAttention


class Bottleneck(nn.Module):
    """Residual unit.

    Args:
        inplanes: input channels.
        planes: inner channels.
        stride: of the 3x3 convolution.
    """

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's result."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class A2Block(DoubleAttention):
    """Double attention with its input added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + super().forward(x)


class _ResNet(nn.Module):
    """Stem, four stages, pooling, classifier; `_extra` says what stands behind the i-th unit of a stage."""

    def __init__(self, num_classes: int, blocks: Sequence[int], base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        inplanes = base_width
        for stage in range(1, 5):
            planes = base_width * 2 ** (stage - 1)
            layers: list[nn.Module] = []
            for i in range(blocks[stage - 1]):
                layers.append(Bottleneck(inplanes, planes, 2 if i == 0 and stage > 1 else 1))
                inplanes = planes * 4
                layers += self._extra(stage, i, blocks[stage - 1], inplanes)
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inplanes, num_classes)

    def _extra(self, stage: int, i: int, count: int, channels: int) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores (B, num_classes) of images (B, 3, H, W)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        x = F.avg_pool2d(x, kernel_size=x.shape[2:], stride=1)
        scores: torch.Tensor = self.fc(x.view(x.shape[0], -1))
        return scores


class CGNLResNet(_ResNet):
    """The network of the CGNL repository.

    Args:
        kind: "nl", "cgnl" or "cgnlx".
        num_classes: classes.
        blocks: units of each stage.
        base_width: planes of the first stage.
    """

    def __init__(
        self,
        kind: str = "cgnl",
        num_classes: int = 1000,
        blocks: Sequence[int] = (3, 4, 6, 3),
        base_width: int = 64,
    ) -> None:
        self.kind = kind
        super().__init__(num_classes, blocks, base_width)

    def _extra(self, stage: int, i: int, count: int, channels: int) -> list[nn.Module]:
        if stage != 3 or i != count - 2:
            return []
        if self.kind == "nl":
            return [SpatialNL(channels, channels // 2, use_scale=True)]
        return [CGNL(channels, channels // 2, groups=8, order=3 if self.kind == "cgnlx" else None)]


class A2ResNet(_ResNet):
    """ResNet with double attention behind every other unit of stages 2 and 3.

    Args:
        num_classes: classes.
        blocks: units of each stage.
        base_width: planes of the first stage.
    """

    def __init__(self, num_classes: int = 1000, blocks: Sequence[int] = (3, 4, 6, 3), base_width: int = 64) -> None:
        super().__init__(num_classes, blocks, base_width)

    def _extra(self, stage: int, i: int, count: int, channels: int) -> list[nn.Module]:
        if stage in (2, 3) and i % 2 == 0:
            return [A2Block(channels, channels // 4, channels // 4, reconstruct=True)]
        return []
