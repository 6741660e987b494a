"""Networks of mmsegmentation, original: EncoderDecoder with ResNetV1c, a decode head with attention and an FCN head.

Behaviour: open-mmlab/mmsegmentation 1.2.2, `mmseg/models/segmentors/encoder_decoder.py`, `backbones/resnet.py`,
`utils/res_layer.py` and `decode_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeattn.validation.originals.adaptive_context import APCHead
from edgeattn.validation.originals.asymmetric_non_local import AFNB, APNB
from edgeattn.validation.originals.criss_cross import CrissCrossAttention
from edgeattn.validation.originals.dual_attention import DANetHead
from edgeattn.validation.originals.ema import EMAUnit
from edgeattn.validation.originals.global_context import ContextBlock
from edgeattn.validation.originals.non_local import NonLocal
from edgeattn.validation.originals.psa import PointwiseSpatialAttention


class ConvModule(nn.Module):
    """relu(bn(conv(x))) with a 3x3 convolution without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        return torch.relu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Residual unit in the "pytorch" style: stride and dilation on the 3x3 convolution."""

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, H, W) to (B, 4 * planes, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + identity)


class ResNetV1c(nn.Module):
    """Deep stem, max-pool, four stages; strides 1, 2, 1, 1, dilations 1, 1, 2, 4, contracted in first units."""

    def __init__(self, blocks: Sequence[int], base_width: int) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        channels = [3, base_width // 2, base_width // 2, base_width]
        for index in range(3):
            stride = 2 if index == 0 else 1
            stem.append(nn.Conv2d(channels[index], channels[index + 1], 3, stride, 1, bias=False))
            stem.append(nn.BatchNorm2d(channels[index + 1]))
            stem.append(nn.ReLU())
        self.stem = nn.Sequential(*stem)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inputs, planes = base_width, base_width
        for index, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)]):
            project = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )  # in every stage: the first one changes the channels too
            first_dilation = dilation // 2 if dilation > 1 else dilation
            units = [Bottleneck(inputs, planes, stride, first_dilation, project)]
            inputs = 4 * planes
            for _ in range(1, blocks[index]):
                units.append(Bottleneck(inputs, planes, 1, dilation, None))
            setattr(self, f"layer{index + 1}", nn.Sequential(*units))
            planes *= 2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the four stages."""
        x = self.maxpool(self.stem(x))
        outs = []
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
            outs.append(x)
        return tuple(outs)


class FCNHead(nn.Module):
    """Convolutions, a 3x3 convolution of the input joined with their result (if any), a classifier."""

    def __init__(self, inputs: int, channels: int, classes: int, num_convs: int, concat_input: bool) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(inputs, channels))
        for _ in range(num_convs - 1):
            self.convs.append(ConvModule(channels, channels))
        if concat_input:
            self.conv_cat = ConvModule(inputs + channels, channels)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        output = self.convs(x)
        return self.classify(x, output)

    def classify(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Join the input with the last convolution's result where the head does so, and classify."""
        if hasattr(self, "conv_cat"):
            output = self.conv_cat(torch.cat([x, output], dim=1))
        logits: torch.Tensor = self.conv_seg(output)
        return logits


class CCHead(FCNHead):
    """Criss-cross attention between the two convolutions."""

    def __init__(self, inputs: int, classes: int, recurrence: int = 2) -> None:
        super().__init__(inputs, inputs // 4, classes, num_convs=2, concat_input=True)
        self.recurrence = recurrence
        self.cca = CrissCrossAttention(inputs // 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        output = self.convs[0](x)
        for _ in range(self.recurrence):
            output = self.cca(output)
        return self.classify(x, self.convs[1](output))


class NLHead(FCNHead):
    """A non-local block between the two convolutions."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, inputs // 4, classes, num_convs=2, concat_input=True)
        self.nl_block = NonLocal(inputs // 4, inputs // 8, dimension=2, sub_sample=False, scale="inner", out_bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.classify(x, self.convs[1](self.nl_block(self.convs[0](x))))


class GCHead(FCNHead):
    """A global context block between the two convolutions."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, inputs // 4, classes, num_convs=2, concat_input=True)
        self.gc_block = ContextBlock(inputs // 4, 0.25, "att", ("channel_add",))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.classify(x, self.convs[1](self.gc_block(self.convs[0](x))))


class EMAHead(nn.Module):
    """The unit between two convolutions, then the input joined with the result."""

    def __init__(self, inputs: int, classes: int, num_bases: int = 64, num_stages: int = 3) -> None:
        super().__init__()
        ema_channels, channels = inputs // 4, inputs // 8
        self.ema_in_conv = ConvModule(inputs, ema_channels)
        self.ema = EMAUnit(ema_channels, num_bases, num_stages, clamp_norms=True, return_bases=False)
        self.bottleneck = ConvModule(ema_channels, channels)
        self.conv_cat = ConvModule(inputs + channels, channels)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        output = self.bottleneck(self.ema(self.ema_in_conv(x)))
        logits: torch.Tensor = self.conv_seg(self.conv_cat(torch.cat([x, output], dim=1)))
        return logits


class ANNHead(nn.Module):
    """Fusion of the third into the fourth stage, a convolution, the pyramid block, a classifier."""

    def __init__(self, low: int, high: int, classes: int, key_pool_scales: Sequence[int] = (1, 3, 6, 8)) -> None:
        super().__init__()
        self.fusion = AFNB(low, high, high, high // 8, high // 8, 1, key_pool_scales, norm_bias=False)
        self.bottleneck = ConvModule(high, high // 4)
        self.context = APNB(high // 4, high // 8, high // 8, 1, key_pool_scales, norm_bias=False)
        self.conv_seg = nn.Conv2d(high // 4, classes, 1)

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        output = self.bottleneck(self.fusion(low, high))
        logits: torch.Tensor = self.conv_seg(self.context(output))
        return logits


class PSAHead(nn.Module):
    """Both directions of attention, a convolution of the input joined with the update, a classifier."""

    def __init__(self, inputs: int, classes: int, mask_size: tuple[int, int] = (97, 97)) -> None:
        super().__init__()
        mask_h, mask_w = mask_size
        self.psa = PointwiseSpatialAttention(
            inputs, inputs // 4, mask_h=mask_h, mask_w=mask_w, proj_padding=1, align_corners=None
        )
        self.bottleneck = ConvModule(2 * inputs, inputs // 4)
        self.conv_seg = nn.Conv2d(inputs // 4, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.conv_seg(self.bottleneck(self.psa(x)))
        return logits


class EncoderDecoder(nn.Module):
    """Backbone, decode head, auxiliary head, in evaluation mode from construction on.

    Args:
        head: class of the decode head in mmsegmentation.
        num_classes: number of classes K.
        blocks: residual units of the four stages; (3, 4, 23, 3) is ResNet-101.
        base_width: planes of the first stage.
        options: further arguments of the decode head.
    """

    def __init__(
        self,
        head: str,
        num_classes: int,
        blocks: Sequence[int] = (3, 4, 23, 3),
        base_width: int = 64,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        low, high = 16 * base_width, 32 * base_width  # channels of the third and the fourth stage
        given = options or {}
        self.backbone = ResNetV1c(blocks, base_width)
        self.head = head
        self.decode_head: nn.Module
        if head == "ANNHead":
            self.decode_head = ANNHead(low, high, num_classes, **given)
        elif head == "APCHead":
            self.decode_head = APCHead(high, high // 4, num_classes, **given)
        else:
            heads = {"CCHead": CCHead, "NLHead": NLHead, "GCHead": GCHead, "EMAHead": EMAHead, "PSAHead": PSAHead}
            self.decode_head = {**heads, "DAHead": DANetHead}[head](high, num_classes, **given)
        self.auxiliary_head = FCNHead(low, low // 4, num_classes, num_convs=1, concat_input=False)
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Segment images.

        Args:
            image: preprocessed images (B, 3, H, W).

        Returns:
            The decode head's logits (three for DAHead: both branches, position, channel) and the auxiliary head's, each
            (B, K, h, w) at an eighth of the resolution.
        """
        _, _, low, high = self.backbone(image)
        logits = self.decode_head(low, high) if self.head == "ANNHead" else self.decode_head(high)
        return (*(logits if isinstance(logits, tuple) else (logits,)), self.auxiliary_head(low))
