"""The dilated ResNet behind the segmentation networks, original.

Paper: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Chen et al., "Rethinking Atrous Convolution
for Semantic Image Segmentation", arXiv 2017.
Behaviour: junfu1115/DANet, XiaLiPKU/EMANet, openseg-group/OCNet.pytorch, hszhao/semseg and MendelXu/ANN, which agree
in it up to the dilations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """Residual unit of 1x1, 3x3 and 1x1 convolutions, with stride and dilation on the 3x3.

    Args:
        inputs: input channels.
        planes: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the 3x3 convolution and of the projected shortcut.
        dilation: dilation of the 3x3 convolution.
        project: whether the shortcut is a 1x1 convolution.
        norm: normalisation layer for a number of channels.
    """

    def __init__(
        self, inputs: int, planes: int, stride: int, dilation: int, project: bool, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)) if project else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's output (B, 4 * planes, H / stride, W / stride) for x (B, inputs, H, W)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


def stage(
    inputs: int, planes: int, stride: int, dilations: Sequence[int], norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Return a stage with one residual unit for each dilation; the first unit changes stride and channels."""
    units = [Bottleneck(inputs, planes, stride, dilations[0], stride != 1 or inputs != planes * EXPANSION, norm)]
    for dilation in dilations[1:]:
        units.append(Bottleneck(planes * EXPANSION, planes, 1, dilation, False, norm))
    return nn.Sequential(*units)


def stages(
    inputs: int,
    base_width: int,
    third: Sequence[int],
    fourth: Sequence[int],
    blocks: Sequence[int],
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential, nn.Sequential]:
    """Return the four stages of output stride 8, the last two with these dilations of their units."""
    features = base_width * EXPANSION
    return (
        stage(inputs, base_width, 1, [1] * blocks[0], norm),
        stage(features, base_width * 2, 2, [1] * blocks[1], norm),
        stage(features * 2, base_width * 4, 1, third, norm),
        stage(features * 4, base_width * 8, 1, fourth, norm),
    )
