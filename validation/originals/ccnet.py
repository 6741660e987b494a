"""CCNet, original: ResNet at output stride 8 with recurrent criss-cross attention.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019.
Behaviour: speedinghzl/CCNet, `networks/ccnet.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.validation.originals.abn import ABN
from edgeattn.validation.originals.rcca import RCCAModule

EXPANSION = 4


class Bottleneck(nn.Module):
    """Residual unit of 1x1, 3x3 and 1x1 convolutions, with stride and dilation on the 3x3.

    Args:
        inputs: input channels.
        planes: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the 3x3 convolution and of the projected shortcut.
        dilation: dilation of the 3x3 convolution.
        project: whether the shortcut is a 1x1 convolution.
    """

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = ABN(planes, "identity")
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = ABN(planes, "identity")
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = ABN(outputs, "identity")
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), ABN(outputs, "identity"))
            if project
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's output (B, 4 * planes, H / stride, W / stride) for x (B, inputs, H, W)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class CCNet(nn.Module):
    """The whole network, in evaluation mode from construction on.

    Args:
        num_classes: number of classes K.
        recurrence: how often criss-cross attention is applied.
        blocks: residual units of the four stages; (3, 4, 23, 3) is ResNet-101.
        stem_width: channels of the first two stem convolutions; the third has twice as many.
        base_width: planes of the first stage; each further stage doubles them.
    """

    def __init__(
        self,
        num_classes: int,
        recurrence: int = 2,
        blocks: tuple[int, int, int, int] = (3, 4, 23, 3),
        stem_width: int = 64,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False)
        self.bn1 = ABN(stem_width, "identity")
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn2 = ABN(stem_width, "identity")
        self.conv3 = nn.Conv2d(stem_width, 2 * stem_width, 3, padding=1, bias=False)
        self.bn3 = ABN(2 * stem_width, "identity")
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        planes = [base_width, 2 * base_width, 4 * base_width, 8 * base_width]
        features = [plane * EXPANSION for plane in planes]
        self.layer1 = _stage(2 * stem_width, planes[0], blocks[0], stride=1, dilation=1)
        self.layer2 = _stage(features[0], planes[1], blocks[1], stride=2, dilation=1)
        self.layer3 = _stage(features[1], planes[2], blocks[2], stride=1, dilation=2)
        self.layer4 = _stage(features[2], planes[3], blocks[3], stride=1, dilation=4)
        self.head = RCCAModule(features[3], features[3] // 4, num_classes, recurrence)
        self.dsn = nn.Sequential(
            nn.Conv2d(features[2], features[2] // 2, 3, padding=1),
            ABN(features[2] // 2),
            nn.Identity(),  # dropout in training
            nn.Conv2d(features[2] // 2, num_classes, 1),
        )
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment images.

        Args:
            image: preprocessed images (B, 3, H, W).

        Returns:
            The logits and the auxiliary logits of the third stage, each (B, K, h, w) at an eighth of the resolution.
        """
        x = torch.relu(self.bn1(self.conv1(image)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        dsn_logits = self.dsn(x)
        return self.head(self.layer4(x)), dsn_logits


def _stage(inputs: int, planes: int, units: int, stride: int, dilation: int) -> nn.Sequential:
    """Return a stage of residual units; the first one changes stride and channels, all share the dilation."""
    outputs = planes * EXPANSION
    first = Bottleneck(inputs, planes, stride, dilation, project=stride != 1 or inputs != outputs)
    rest = [Bottleneck(outputs, planes, 1, dilation, project=False) for _ in range(units - 1)]
    return nn.Sequential(first, *rest)
