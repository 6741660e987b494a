"""Classifiers of ResNet-50 size with an attention block in every residual block, or behind the stages.

Papers and published code are those of the blocks, see `edgeattn.blocks`; the networks they sit in are
`ClassifierResNet`. Every constructor takes the arguments of `Shape` besides its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from edgeattn.blocks.bam import BAM
from edgeattn.blocks.cbam import CBAM
from edgeattn.blocks.efficient_channel import EfficientChannelAttention
from edgeattn.blocks.selective_kernel import SelectiveKernel, SKBottleneck
from edgeattn.blocks.self_calibrated import SCBottleneck
from edgeattn.blocks.spatial_group import SpatialGroupEnhance
from edgeattn.blocks.split_attention import ResNeStBottleneck
from edgeattn.blocks.squeeze_excitation import SqueezeExcitation
from edgeattn.models.classifier_resnet import Bottleneck, ClassifierResNet, Place, Shape

if TYPE_CHECKING:
    from typing_extensions import Unpack


def se_resnet(
    *,
    bias: bool = False,
    convolutions: bool = False,
    groups: int = 1,
    group_width: int = 64,
    stride_on_first: bool = False,
    **shape: Unpack[Shape],
) -> ClassifierResNet:
    """Build an SE-ResNet; the attention is `se`.

    Args:
        bias: whether the layers of the attention have biases.
        convolutions: whether they are 1x1 convolutions (timm, Caffe) and not linear layers.
        groups: see `Bottleneck`.
        group_width: see `Bottleneck`.
        stride_on_first: see `Bottleneck`.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        attention = SqueezeExcitation(place.out_channels, bias=bias, convolutions=convolutions)
        return Bottleneck(
            place,
            attention=("se", attention),
            groups=groups,
            group_width=group_width,
            stride_on_first=stride_on_first,
        )

    return ClassifierResNet(block, **shape)


def sk_resnet(
    *,
    groups: int = 32,
    group_width: int = 4,
    rd_divisor: int = 32,
    split_input: bool = False,
    **shape: Unpack[Shape],
) -> ClassifierResNet:
    """Build a selective kernel network of dilated branches, by default the paper's; the attention is `conv2`.

    Args:
        groups: groups of both branches.
        group_width: see `Place.width`.
        rd_divisor: see `SelectiveKernel`.
        split_input: see `SelectiveKernel`.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        attention = SelectiveKernel(
            place.width(group_width, groups),
            stride=place.stride,
            groups=groups,
            rd_divisor=rd_divisor,
            split_input=split_input,
        )
        return Bottleneck(place, middle=attention, groups=groups, group_width=group_width)

    return ClassifierResNet(block, **shape)


def sk_resnet_dense(*, groups: int = 32, **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build PytorchInsight's SK-ResNet, whose branches are a dense and a grouped convolution.

    Args:
        groups: groups of the second branch.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        return SKBottleneck(place.in_channels, place.planes, place.stride, place.projected, groups)

    return ClassifierResNet(block, **shape)


def eca_resnet(
    *, k_sizes: Sequence[int] = (3, 5, 5, 7), avg_down: bool = False, **shape: Unpack[Shape]
) -> ClassifierResNet:
    """Build an ECA-ResNet; the attention is `eca`.

    Args:
        k_sizes: kernel size of each stage.
        avg_down: see `Bottleneck`.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        attention = EfficientChannelAttention(place.out_channels, k_sizes[place.stage])
        return Bottleneck(place, attention=("eca", attention), avg_down=avg_down)

    return ClassifierResNet(block, **shape)


def sge_resnet(*, groups: int = 64, **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build an SGE-ResNet; the attention is `sge`.

    Args:
        groups: groups of channels that the attention compares.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        return Bottleneck(place, attention=("sge", SpatialGroupEnhance(place.out_channels, groups)))

    return ClassifierResNet(block, **shape)


def cbam_resnet(
    *, bias: bool = True, convolutions: bool = False, mean_first: bool = False, **shape: Unpack[Shape]
) -> ClassifierResNet:
    """Build a CBAM-ResNet, by default the official one; the attention is `cbam`.

    Args:
        bias: see `CBAM`.
        convolutions: see `CBAM`.
        mean_first: see `CBAM`.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        attention = CBAM(place.out_channels, bias=bias, convolutions=convolutions, mean_first=mean_first)
        return Bottleneck(place, attention=("cbam", attention))

    return ClassifierResNet(block, **shape)


def bam_resnet(*, square_pool: bool = False, **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build a BAM-ResNet; the attention is `bam1..3` behind the first three stages.

    Args:
        square_pool: see `BAM`; without it, maps that are not square have all of their positions averaged.
        shape: see `ClassifierResNet`.
    """

    def attention(channels: int) -> nn.Module:
        return BAM(channels, square_pool=square_pool)

    return ClassifierResNet(Bottleneck, between=("bam", attention), **shape)


def resnest(
    *,
    radix: int = 2,
    cardinality: int = 1,
    bottleneck_width: int = 64,
    avd_first: bool = False,
    **shape: Unpack[Shape],
) -> ClassifierResNet:
    """Build a ResNeSt; the attention is `conv2`.

    Args:
        radix: splits of the attention.
        cardinality: its groups.
        bottleneck_width: see `ResNeStBottleneck`.
        avd_first: see `ResNeStBottleneck`.
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        return ResNeStBottleneck(
            place.in_channels,
            place.planes,
            place.stride,
            radix,
            cardinality,
            bottleneck_width,
            avd_first=avd_first,
            downsample=place.projected,
        )

    return ClassifierResNet(block, **shape)


def scnet(*, pooled: bool = False, **shape: Unpack[Shape]) -> ClassifierResNet:
    """Build an SCNet; the attention is `scconv`.

    Args:
        pooled: average pools take the strides, on both ways of a block (the v1d networks).
        shape: see `ClassifierResNet`.
    """

    def block(place: Place) -> nn.Module:
        return SCBottleneck(
            place.in_channels,
            place.planes,
            place.stride,
            avd=pooled,
            downsample=place.projected,
            avg_down=pooled,
        )

    return ClassifierResNet(block, **shape)
