"""Learn to pay attention on a ResNet: the Torch7 network "(ResNet-164)-att2-concat-pc". The VGG is a block already.

Paper: Jetley et al., "Learn To Pay Attention", ICLR 2018 (arXiv 1804.02391).
Code: https://github.com/saumya-jetley/cd_ICLR18_LearnToPayAttention, `RESNET/models/Resnet-att2` (Torch7, whose files
carry no tensor names); https://github.com/SaoYan/LearnToPayAttention, `model1.py`, `model2.py` (the VGG of
`edgeattn.blocks.learn_to_pay`; its grid attention is in no network). The port
https://github.com/KennCoder7/LearnToPayAttention-pytorch stores pickled modules only, which are never unpickled here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.learn_to_pay import LinearAttentionBlock
from edgeattn.foundation import UserError

FIXED = "the global feature covers the whole map"
"""Why the height and width of the image cannot vary."""

_REDUCTION = 4
"""Channels of a unit over its inner channels."""


class PreActivationUnit(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each behind normalisation and ReLU, with a residual.

    Where the channels change, the residual is a convolution of the normalised input.

    Args:
        in_channels: input channels.
        channels: output channels.
        stride: stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // _REDUCTION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        changed = in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if changed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height / stride, width / stride)."""
        active = self.bn1(x).relu()
        out: torch.Tensor = self.conv1(active)
        out = self.conv2(self.bn2(out).relu())
        out = self.conv3(self.bn3(out).relu())
        return out + (x if self.shortcut is None else self.shortcut(active))


class GlobalFeature(nn.Module):
    """The global feature: two poolings with a convolution between them, then a linear layer.

    Args:
        channels: channels of the map and of the feature.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.linear = nn.Linear(channels, channels)
        self.halve = nn.MaxPool2d(2, ceil_mode=True)
        self.quarter = nn.MaxPool2d(4, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, 8, 8) to (batch, channels)."""
        x = self.conv(self.halve(self.bn1(x).relu()))
        feature: torch.Tensor = self.linear(self.quarter(self.bn2(x).relu()).flatten(1))
        return feature


class AttnResNet(nn.Module):
    """Pre-activation ResNet for 32x32 images with parametrised attention on the last two of three stages.

    Names are our own: `conv1`, `layer1..3`, `global_feature`, `reducer` (the global feature to the channels of the
    second stage), `attn2`, `attn3`, `bn2`, `bn3`, `classify`. The bias of Torch7's attention convolutions adds the same
    at all positions, which the softmax removes: there is none here. For the same reason the scores do not depend on the
    global feature, so that an export has neither it nor `reducer`.

    Args:
        num_classes: number of classes.
        units: residual units per stage, 18 in ResNet-164.
        widths: channels of the stem and of the three stages.
    """

    im_size = 32
    """Height and width of the image."""

    def __init__(self, num_classes: int = 100, units: int = 18, widths: Sequence[int] = (16, 64, 128, 256)) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.layer1 = _stage(stem, first, units, stride=1)
        self.layer2 = _stage(first, second, units, stride=2)
        self.layer3 = _stage(second, third, units, stride=2)
        self.global_feature = GlobalFeature(third)
        self.reducer = nn.Sequential(nn.BatchNorm1d(third), nn.ReLU(), nn.Linear(third, second))
        self.attn2 = LinearAttentionBlock(second)
        self.attn3 = LinearAttentionBlock(third)
        self.bn2 = nn.BatchNorm1d(second)
        self.bn3 = nn.BatchNorm1d(third)
        self.classify = nn.Linear(second + third, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            image: (batch, 3, 32, 32), preprocessed.

        Returns:
            Scores (batch, num_classes).

        Raises:
            UserError: another size, or a dynamic one.
        """
        for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
            require_static("this network", axis, size, FIXED)
            if size != self.im_size:
                raise UserError(f"the {axis} of the image must be {self.im_size}, got {size}: {FIXED}. Resize it.")
        level2 = self.layer2(self.layer1(self.conv1(image)))
        level3 = self.layer3(level2)
        feature = self.global_feature(level3)
        reduced = self.reducer(feature)
        _, pooled2 = self.attn2(level2, reduced[:, :, None, None])
        _, pooled3 = self.attn3(level3, feature[:, :, None, None])
        scores: torch.Tensor = self.classify(torch.cat([self.bn2(pooled2).relu(), self.bn3(pooled3).relu()], dim=1))
        return scores


def _stage(in_channels: int, channels: int, units: int, stride: int) -> nn.Sequential:
    """Return a stage whose first unit changes stride and channels."""
    rest = [PreActivationUnit(channels, channels, 1) for _ in range(units - 1)]
    return nn.Sequential(PreActivationUnit(in_channels, channels, stride), *rest)
