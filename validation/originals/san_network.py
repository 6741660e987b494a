"""SAN, original.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020, table 1.
Behaviour: hszhao/SAN, `model/san.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.san import SanBottleneck


class SAN(nn.Module):
    """Five stages of self-attention units, each behind a pooling and a 1x1 convolution.

    Args:
        form: "pairwise" or "patchwise".
        layers: units of each stage.
        kernels: window of each stage.
        num_classes: classes.
        width: channels of the stem.
    """

    def __init__(
        self,
        form: str,
        layers: tuple[int, int, int, int, int] = (2, 1, 2, 4, 1),
        kernels: tuple[int, int, int, int, int] = (3, 7, 7, 7, 7),
        num_classes: int = 1000,
        width: int = 64,
    ) -> None:
        super().__init__()

        def stage(channels: int, index: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    SanBottleneck(form, channels, channels // 16, channels // 4, 8, kernels[index])
                    for _ in range(layers[index])
                )
            )

        c = width
        self.conv_in, self.bn_in = nn.Conv2d(3, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv0, self.bn0 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.layer0 = stage(c, 0)
        self.conv1, self.bn1 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.layer1 = stage(4 * c, 1)
        self.conv2, self.bn2 = nn.Conv2d(4 * c, 8 * c, 1, bias=False), nn.BatchNorm2d(8 * c)
        self.layer2 = stage(8 * c, 2)
        self.conv3, self.bn3 = nn.Conv2d(8 * c, 16 * c, 1, bias=False), nn.BatchNorm2d(16 * c)
        self.layer3 = stage(16 * c, 3)
        self.conv4, self.bn4 = nn.Conv2d(16 * c, 32 * c, 1, bias=False), nn.BatchNorm2d(32 * c)
        self.layer4 = stage(32 * c, 4)
        self.fc = nn.Linear(32 * c, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores (B, num_classes) of images (B, 3, H, W)."""
        x = F.relu(self.bn_in(self.conv_in(image)))
        x = F.relu(self.bn0(self.layer0(self.conv0(F.max_pool2d(x, 2)))))
        x = F.relu(self.bn1(self.layer1(self.conv1(F.max_pool2d(x, 2)))))
        x = F.relu(self.bn2(self.layer2(self.conv2(F.max_pool2d(x, 2)))))
        x = F.relu(self.bn3(self.layer3(self.conv3(F.max_pool2d(x, 2)))))
        x = F.relu(self.bn4(self.layer4(self.conv4(F.max_pool2d(x, 2)))))
        scores: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores
