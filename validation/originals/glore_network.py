"""GloRe networks, original.

Paper: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, section 4.
Behaviour: facebookresearch/GloRe, `network/resnet50_3d_gcn_x5.py`, `resnet101_3d_gcn_x5.py`; for images without the
time axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.glore import GloReUnit


class BnAcConv(nn.Module):
    """Normalisation, ReLU, convolution.

    Args:
        axes: 2 or 3.
        num_in: input channels.
        num_filter: output channels.
        kernel: over time and space.
        stride: over time and space.
    """

    def __init__(
        self,
        axes: int,
        num_in: int,
        num_filter: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        if axes == 3:
            self.bn: nn.Module = nn.BatchNorm3d(num_in, eps=1e-4)
            self.conv: nn.Module = nn.Conv3d(num_in, num_filter, kernel, stride, pad, bias=False)
        else:
            self.bn = nn.BatchNorm2d(num_in, eps=1e-4)
            self.conv = nn.Conv2d(num_in, num_filter, kernel[1:], stride[1:], pad[1:], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution's result."""
        result: torch.Tensor = self.conv(F.relu(self.bn(x)))
        return result


class Residual(nn.Module):
    """Residual unit; `conv_w1` stands in the shortcut of the first unit of a stage."""

    def __init__(
        self, axes: int, num_in: int, num_mid: int, stride: tuple[int, int, int], first_block: bool, use_3d: bool
    ) -> None:
        super().__init__()
        self.conv_m1 = BnAcConv(axes, num_in, num_mid, (3 if use_3d else 1, 1, 1))
        self.conv_m2 = BnAcConv(axes, num_mid, num_mid, (1, 3, 3), stride)
        self.conv_m3 = BnAcConv(axes, num_mid, 4 * num_mid)
        if first_block:
            self.conv_w1 = BnAcConv(axes, num_in, 4 * num_mid, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's result."""
        h = self.conv_m3(self.conv_m2(self.conv_m1(x)))
        if hasattr(self, "conv_w1"):
            x = self.conv_w1(x)
        added: torch.Tensor = h + x
        return added


class GloReResNet(nn.Module):
    """The whole network.

    Args:
        num_classes: classes.
        dimensions: 2 (images) or 3 (clips of 8 frames).
        blocks: units of the stages conv2 to conv5.
        places: units of a stage behind which a GloRe unit stands.
        stem_width: channels of the stem.
        base_width: planes of conv2.
    """

    def __init__(
        self,
        num_classes: int = 400,
        dimensions: int = 3,
        blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
        places: dict[int, tuple[int, ...]] | None = None,
        stem_width: int = 32,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        places = {3: (1, 3), 4: (1, 3, 5)} if places is None else places
        self.axes = dimensions
        self.conv1 = nn.Sequential()
        if dimensions == 3:
            self.conv1.add_module("conv", nn.Conv3d(3, stem_width, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False))
            self.conv1.add_module("bn", nn.BatchNorm3d(stem_width, eps=1e-4))
            self.tail = nn.Sequential()
            self.tail.add_module("bn", nn.BatchNorm3d(32 * base_width, eps=1e-4))
        else:
            self.conv1.add_module("conv", nn.Conv2d(3, stem_width, 5, 2, 2, bias=False))
            self.conv1.add_module("bn", nn.BatchNorm2d(stem_width, eps=1e-4))
            self.tail = nn.Sequential()
            self.tail.add_module("bn", nn.BatchNorm2d(32 * base_width, eps=1e-4))
        num_in = stem_width
        first_strides = {2: (1, 1, 1), 3: (2, 2, 2), 4: (1, 2, 2), 5: (1, 2, 2)}
        for sec in (2, 3, 4, 5):
            num_mid = base_width * 2 ** (sec - 2)
            stage = nn.Sequential()
            for i in range(1, blocks[sec - 2] + 1):
                use_3d = {2: True, 3: bool(i % 2), 4: bool(i % 2), 5: i == 2}[sec]
                stride = first_strides[sec] if i == 1 else (1, 1, 1)
                stage.add_module(f"B{i:02d}", Residual(dimensions, num_in, num_mid, stride, i == 1, use_3d))
                num_in = 4 * num_mid
                if i in places.get(sec, ()):
                    stage.add_module(f"B{i:02d}_extra", GloReUnit(num_in, num_mid, dimensions))
            setattr(self, f"conv{sec}", stage)
        self.classifier = nn.Linear(num_in, num_classes)

    def forward(self, *frames: torch.Tensor) -> torch.Tensor:
        """Return scores (B, num_classes) of one image, or of eight frames, each (B, 3, H, W)."""
        if self.axes == 3:
            assert len(frames) == 8
            h = F.relu(self.conv1(torch.stack(frames, dim=2)))
            h = F.max_pool3d(h, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        else:
            h = F.max_pool2d(F.relu(self.conv1(frames[0])), 3, 2, 1)
        for sec in (2, 3, 4, 5):
            h = self.get_submodule(f"conv{sec}")(h)
        h = F.relu(self.tail(h))
        h = F.avg_pool3d(h, h.shape[2:]) if self.axes == 3 else F.avg_pool2d(h, h.shape[2:])
        scores: torch.Tensor = self.classifier(h.view(h.shape[0], -1))
        return scores
