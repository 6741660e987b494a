"""Selective kernels, original.

Paper: Li et al., "Selective Kernel Networks", CVPR 2019, section 3.1: split, fuse, select.
Behaviour: pppLang/SKNet, `sknet.py`; implus/PytorchInsight, `classification/models/imagenet/resnet_sk.py`;
pytorch-image-models, `timm/layers/selective_kernel.py` (with groups of 32 and the whole input also implus/SKNet).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class SKConv(nn.Module):
    """U = sum of U_m, s = mean of U, z = fc s, a = softmax over m of fcs_m z, V = sum of a_m U_m.

    Args:
        features: channels.
        branches: number M of kernels 3, 5, 7, ...
        groups: groups of the convolutions.
        reduction: ratio r of z.
        stride: stride of the convolutions.
        minimum: least length L of z.
    """

    def __init__(
        self,
        features: int,
        branches: int = 2,
        groups: int = 8,
        reduction: float = 2,
        stride: int = 1,
        minimum: int = 32,
    ) -> None:
        super().__init__()
        d = max(int(features / reduction), minimum)
        self.convs = nn.ModuleList()
        self.fcs = nn.ModuleList()
        self.fc = nn.Linear(features, d)
        for m in range(branches):
            size = 2 * m + 3
            conv = nn.Conv2d(features, features, size, stride=stride, padding=size // 2, groups=groups)
            self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU()))
            self.fcs.append(nn.Linear(d, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        u = torch.stack([conv(x) for conv in self.convs], dim=1)
        s = u.sum(dim=1).mean(dim=-1).mean(dim=-1)
        z = self.fc(s)
        a = torch.stack([fc(z) for fc in self.fcs], dim=1).softmax(dim=1)
        return (u * a[..., None, None]).sum(dim=1)


class SKBottleneck(nn.Module):
    """1x1 reduction, a dense and a grouped 3x3 convolution, selection between them, 1x1 expansion, shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of the two branches.
        stride: stride of both branches and the projected shortcut.
        downsample: a projected shortcut.
        groups: groups of the second branch.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: bool = False, groups: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.conv2g = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.conv3 = nn.Conv2d(planes, planes * 4, kernel_size=1, bias=False)
        self.conv_fc1 = nn.Conv2d(planes, planes // 16, kernel_size=1, bias=False)
        self.conv_fc2 = nn.Conv2d(planes // 16, planes * 2, kernel_size=1, bias=False)
        self.bn1, self.bn2, self.bn2g = (nn.BatchNorm2d(planes) for _ in range(3))
        self.bn3, self.bn_fc1 = nn.BatchNorm2d(planes * 4), nn.BatchNorm2d(planes // 16)
        if downsample:
            shortcut = nn.Conv2d(inplanes, planes * 4, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes * 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inplanes, H, W) to (B, 4 planes, H', W')."""
        identity = self.downsample(x) if hasattr(self, "downsample") else x
        out = F.relu(self.bn1(self.conv1(x)))
        d1 = F.relu(self.bn2(self.conv2(out)))
        d2 = F.relu(self.bn2g(self.conv2g(out)))
        d = F.adaptive_avg_pool2d(d1, 1) + F.adaptive_avg_pool2d(d2, 1)
        d = self.conv_fc2(F.relu(self.bn_fc1(self.conv_fc1(d))))
        d = F.softmax(d.view(x.shape[0], 2, -1, 1, 1), dim=1)
        v = d1 * d[:, 0] + d2 * d[:, 1]
        return F.relu(self.bn3(self.conv3(v)) + identity)


class _ConvNormAct(nn.Module):
    """relu(bn(conv(x))) with symmetric padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, dilation: int, groups: int) -> None:
        super().__init__()
        pad = ((stride - 1) + dilation * (kernel - 1)) // 2
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _SelectiveKernelAttn(nn.Module):
    """Weights (B, M, C, 1, 1) of stacked paths (B, M, C, H, W)."""

    def __init__(self, channels: int, paths: int, hidden: int) -> None:
        super().__init__()
        self.fc_reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc_select = nn.Conv2d(hidden, channels * paths, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        paths, channels = x.shape[1:3]
        squeezed = x.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        logits: torch.Tensor = self.fc_select(F.relu(self.bn(self.fc_reduce(squeezed))))
        return logits.view(x.shape[0], paths, channels, 1, 1).softmax(dim=1)


class SelectiveKernel(nn.Module):
    """Stack the paths, weigh the stack, sum it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, or None for the same.
        kernel_sizes: one kernel size per path.
        stride: stride of all paths.
        dilation: dilation of all paths.
        groups: groups of all paths.
        rd_ratio: hidden channels per output channel.
        rd_channels: hidden channels, or None to derive them.
        rd_divisor: hidden channels are a multiple of it.
        keep_3x3: 3x3 kernels, dilated to the size asked for.
        split_input: cut the input's channels into one part per path.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_sizes: Sequence[int] = (3, 5),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
    ) -> None:
        super().__init__()
        outputs = in_channels if out_channels is None else out_channels
        self.parts = len(kernel_sizes) if split_input else 1
        self.paths = nn.ModuleList()
        for size in kernel_sizes:
            kernel, spread = (3, dilation * (size - 1) // 2) if keep_3x3 else (size, dilation)
            inputs = in_channels // self.parts
            self.paths.append(_ConvNormAct(inputs, outputs, kernel, stride, spread, min(outputs, groups)))
        if rd_channels is None:
            wanted = outputs * rd_ratio
            rd_channels = max(int(wanted + rd_divisor / 2) // rd_divisor * rd_divisor, rd_divisor)
            if rd_channels < 0.9 * wanted:
                rd_channels += rd_divisor
        self.attn = _SelectiveKernelAttn(outputs, len(kernel_sizes), rd_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H', W')."""
        if self.parts > 1:
            parts = torch.split(x, x.shape[1] // self.parts, dim=1)
            outputs = [path(part) for path, part in zip(self.paths, parts, strict=True)]
        else:
            outputs = [path(x) for path in self.paths]
        stacked = torch.stack(outputs, dim=1)
        return (stacked * self.attn(stacked)).sum(dim=1)
