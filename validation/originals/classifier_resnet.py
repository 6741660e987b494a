"""Attention classifiers of ResNet-50 size, originals.

Papers: those of the attention blocks, and He et al., "Deep Residual Learning", CVPR 2016.
Behaviour: moskomule/senet.pytorch, `senet/se_resnet.py`; implus/SKNet, `models/sknet50.prototxt`;
implus/PytorchInsight, `classification/models/imagenet/resnet_{se,sge,sk}.py`; BangguWu/ECANet,
`models/eca_resnet.py`; Jongchan/attention-module, `MODELS/model_resnet.py`; zhanghang1989/ResNeSt,
`resnest/torch/models/resnet.py`; MCG-NKU/SCNet, `scnet.py`; pytorch-image-models, `timm/models/resnet.py`,
`senet.py`, `sknet.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.bam import BAM
from edgeattn.validation.originals.cbam import CBAM
from edgeattn.validation.originals.efficient_channel import EfficientChannelAttention
from edgeattn.validation.originals.selective_kernel import SelectiveKernel, SKBottleneck
from edgeattn.validation.originals.self_calibrated import SCBottleneck
from edgeattn.validation.originals.spatial_group import SpatialGroupEnhance
from edgeattn.validation.originals.split_attention import ResNeStBottleneck
from edgeattn.validation.originals.squeeze_excitation import SqueezeExcitation

Unit = Callable[[int, int, int, bool, int], nn.Module]
"""Makes a residual unit from input channels, planes, stride, whether the shortcut is projected, and stage from 1."""


class Bottleneck(nn.Module):
    """Residual unit: 1x1, 3x3 or something instead, 1x1, attention, plus the shortcut.

    Args:
        inputs: input channels.
        planes: quarter of the output's channels.
        stride: stride of the 3x3 convolution and of the projected shortcut.
        project: whether the shortcut is a 1x1 convolution.
        attention: name and module of the attention on the residual.
        middle: what stands in for the 3x3 convolution and its normalisation.
        groups: groups of the 3x3 convolution.
        group_width: width of a group where planes are 64.
        stride_on_first: stride on the 1x1 convolution.
        avg_down: 2x2 average pooling in a strided shortcut.
    """

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        project: bool,
        attention: tuple[str, nn.Module] | None = None,
        middle: Callable[[int], nn.Module] | None = None,
        groups: int = 1,
        group_width: int = 64,
        stride_on_first: bool = False,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        outputs = planes * 4
        width = planes * group_width // 64 * groups
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=1, stride=stride if stride_on_first else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.plain = middle is None
        if middle is None:
            step = 1 if stride_on_first else stride
            self.conv2: nn.Module = nn.Conv2d(
                width, width, kernel_size=3, stride=step, padding=1, groups=groups, bias=False
            )
            self.bn2 = nn.BatchNorm2d(width)
        else:
            self.conv2 = middle(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.name = "" if attention is None else attention[0]
        if attention is not None:
            self.add_module(*attention)
        self.project = project
        if project and avg_down:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
            self.downsample = nn.Sequential(
                pool, nn.Conv2d(inputs, outputs, kernel_size=1, bias=False), nn.BatchNorm2d(outputs)
            )
        elif project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's output (B, 4 * planes, H / stride, W / stride) for x (B, inputs, H, W)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        if self.plain:
            out = F.relu(self.bn2(out))
        out = self.bn3(self.conv3(out))
        if self.name:
            out = getattr(self, self.name)(out)
        residual = self.downsample(x) if self.project else x
        return F.relu(out + residual)


class ResNet(nn.Module):
    """The whole network.

    Args:
        unit: makes the residual units.
        num_classes: number of classes.
        blocks: units of each stage.
        base_width: planes of the first stage.
        stem: channels of the first two of three stem convolutions; none for one 7x7 convolution.
        ceil_pool: maximum pooling without padding, with partial windows.
        bam: makes the BAM behind each stage but the last, if there is one.
    """

    def __init__(
        self,
        unit: Unit,
        num_classes: int = 1000,
        blocks: Sequence[int] = (3, 4, 6, 3),
        base_width: int = 64,
        stem: Sequence[int] = (),
        ceil_pool: bool = False,
        bam: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if stem:
            first, second = stem
            self.conv1: nn.Module = nn.Sequential(
                nn.Conv2d(3, first, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(first),
                nn.ReLU(),
                nn.Conv2d(first, second, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(second),
                nn.ReLU(),
                nn.Conv2d(second, base_width, kernel_size=3, padding=1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(3, base_width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.ceil_pool = ceil_pool
        channels = base_width
        self.stages = range(1, len(blocks) + 1)
        for stage in self.stages:
            planes = base_width * 2 ** (stage - 1)
            stride = 1 if stage == 1 else 2
            units = [unit(channels, planes, stride, True, stage)]
            channels = planes * 4
            units += [unit(channels, planes, 1, False, stage) for _ in range(blocks[stage - 1] - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            if bam is not None and stage < len(blocks):
                self.add_module(f"bam{stage}", bam(channels))
        self.bam = bam is not None
        self.fc = nn.Linear(channels, num_classes)
        self.eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, num_classes) of images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(image)))
        if self.ceil_pool:
            x = F.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
        else:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, f"layer{stage}")(x)
            if self.bam and stage < len(self.stages):
                x = getattr(self, f"bam{stage}")(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: torch.Tensor = self.fc(x)
        return scores


def se_resnet(
    bias: bool = False,
    convolutions: bool = False,
    groups: int = 1,
    group_width: int = 64,
    stride_on_first: bool = False,
    **network: Any,
) -> ResNet:
    """Return a network of SE units."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        se = SqueezeExcitation(planes * 4, 16, bias=bias, convolutions=convolutions)
        return Bottleneck(
            inputs,
            planes,
            stride,
            project,
            ("se", se),
            groups=groups,
            group_width=group_width,
            stride_on_first=stride_on_first,
        )

    return ResNet(unit, **network)


def sk_resnet(
    groups: int = 32, group_width: int = 4, rd_divisor: int = 32, split_input: bool = False, **network: Any
) -> ResNet:
    """Return a network of SK units with a dilated branch."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        def middle(width: int) -> nn.Module:
            return SelectiveKernel(
                width, width, stride=stride, groups=groups, rd_divisor=rd_divisor, split_input=split_input
            )

        return Bottleneck(inputs, planes, stride, project, middle=middle, groups=groups, group_width=group_width)

    return ResNet(unit, **network)


def sk_resnet_dense(groups: int = 32, **network: Any) -> ResNet:
    """Return a network of SK units with a dense and a grouped branch."""
    return ResNet(
        lambda inputs, planes, stride, project, stage: SKBottleneck(inputs, planes, stride, project, groups), **network
    )


def eca_resnet(k_sizes: Sequence[int] = (3, 5, 5, 7), avg_down: bool = False, **network: Any) -> ResNet:
    """Return a network of ECA units."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        eca = EfficientChannelAttention(planes * 4, k_sizes[stage - 1])
        return Bottleneck(inputs, planes, stride, project, ("eca", eca), avg_down=avg_down)

    return ResNet(unit, **network)


def sge_resnet(groups: int = 64, **network: Any) -> ResNet:
    """Return a network of SGE units."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        return Bottleneck(inputs, planes, stride, project, ("sge", SpatialGroupEnhance(planes * 4, groups)))

    return ResNet(unit, **network)


def cbam_resnet(bias: bool = True, convolutions: bool = False, mean_first: bool = False, **network: Any) -> ResNet:
    """Return a network of CBAM units."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        cbam = CBAM(planes * 4, 16, bias=bias, convolutions=convolutions, mean_first=mean_first)
        return Bottleneck(inputs, planes, stride, project, ("cbam", cbam))

    return ResNet(unit, **network)


def bam_resnet(square_pool: bool = False, **network: Any) -> ResNet:
    """Return a network with a BAM behind each of the first three stages."""
    return ResNet(
        lambda inputs, planes, stride, project, stage: Bottleneck(inputs, planes, stride, project),
        bam=lambda channels: BAM(channels, square_pool=square_pool),
        **network,
    )


def resnest(
    radix: int = 2, cardinality: int = 1, bottleneck_width: int = 64, avd_first: bool = False, **network: Any
) -> ResNet:
    """Return a network of split-attention units; is_first is true where a stage but the first begins."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        first = project and stage > 1
        return ResNeStBottleneck(
            inputs, planes, stride, radix, cardinality, bottleneck_width, True, avd_first, 1, first, project
        )

    return ResNet(unit, **network)


def scnet(pooled: bool = False, **network: Any) -> ResNet:
    """Return a network of self-calibrated units."""

    def unit(inputs: int, planes: int, stride: int, project: bool, stage: int) -> nn.Module:
        first = project and stage > 1
        return SCBottleneck(inputs, planes, stride, 1, 32, pooled, 1, first, project, pooled)

    return ResNet(unit, **network)
