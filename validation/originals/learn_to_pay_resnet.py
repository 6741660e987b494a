"""Learn to pay attention on a ResNet, original.

Paper: Jetley et al., "Learn To Pay Attention", ICLR 2018.
Behaviour: saumya-jetley/cd_ICLR18_LearnToPayAttention, `RESNET/models/Resnet-att2`, without the attention's biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.learn_to_pay import LinearAttentionBlock


class Unit(nn.Module):
    """Residual unit with normalisation first.

    Args:
        inputs: channels of the input.
        outputs: channels of the result.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        plane = outputs // 4
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, plane, 1, stride, 0, bias=False)
        self.bn2 = nn.BatchNorm2d(plane)
        self.conv2 = nn.Conv2d(plane, plane, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(plane)
        self.conv3 = nn.Conv2d(plane, outputs, 1, 1, 0, bias=False)
        self.same = inputs == outputs
        if not self.same:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's result."""
        start = F.relu(self.bn1(x))
        out = self.conv1(start)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        added: torch.Tensor = out + x if self.same else out + self.shortcut(start)
        return added


class GlobalFeature(nn.Module):
    """The part behind the last stage.

    Args:
        channels: of input and result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, channels)."""
        x = F.max_pool2d(F.relu(self.bn1(x)), 2, 2, ceil_mode=True)
        x = F.max_pool2d(F.relu(self.bn2(self.conv(x))), 4, 4, ceil_mode=True)
        g: torch.Tensor = self.linear(x.view(-1, x.shape[1]))
        return g


class AttnResNet(nn.Module):
    """The whole network.

    Args:
        num_classes: classes.
        units: per stage.
        widths: channels of stem and stages.
    """

    def __init__(
        self, num_classes: int = 100, units: int = 18, widths: tuple[int, int, int, int] = (16, 64, 128, 256)
    ) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                *(Unit(outputs if i else inputs, outputs, 1 if i else stride) for i in range(units)),
            )

        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.layer1 = layer(widths[0], widths[1], 1)
        self.layer2 = layer(widths[1], widths[2], 2)
        self.layer3 = layer(widths[2], widths[3], 2)
        self.global_feature = GlobalFeature(widths[3])
        self.reducer = nn.Sequential(nn.BatchNorm1d(widths[3]), nn.ReLU(), nn.Linear(widths[3], widths[2]))
        self.attn2 = LinearAttentionBlock(widths[2])
        self.attn3 = LinearAttentionBlock(widths[3])
        self.bn2, self.bn3 = nn.BatchNorm1d(widths[2]), nn.BatchNorm1d(widths[3])
        self.classify = nn.Linear(widths[2] + widths[3], num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores (B, num_classes) of images (B, 3, 32, 32)."""
        second = self.layer2(self.layer1(self.conv1(image)))
        third = self.layer3(second)
        g = self.global_feature(third)
        _, g2 = self.attn2(second, self.reducer(g)[:, :, None, None])
        _, g3 = self.attn3(third, g[:, :, None, None])
        scores: torch.Tensor = self.classify(torch.cat([F.relu(self.bn2(g2)), F.relu(self.bn3(g3))], dim=1))
        return scores
