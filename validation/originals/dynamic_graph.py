"""Dynamic graph message passing, original.

Paper: Zhang et al., "Dynamic Graph Message Passing Networks", CVPR 2020, sections 3.2 and 3.3.
Behaviour: lzrobots/dgmn, `maskrcnn_benchmark/layers/dynamic_weight.py`, class ReDynamicWeightsCat33, whose two CUDA
operators, deformable unfold and deformable convolution, are written out as gathers of the four neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def _read(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Return x (B, C, H, W) at integer places (B, H, W), 0 outside the map: (B, C, H, W)."""
    channels, height, width = x.shape[1:]
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)
    values = x.flatten(2).gather(2, flat[:, None].expand(-1, channels, -1))
    return values.reshape(-1, channels, height, width) * inside[:, None].to(x.dtype)


def _deformed_window(x: torch.Tensor, offset: torch.Tensor, dilation: int) -> torch.Tensor:
    """Return the nine bilinear reads (B, C, 9, H, W) of each position; offset (B, 18, H, W) is y, x for each tap."""
    height, width = x.shape[2:]
    base_y = torch.arange(height, device=x.device).to(x.dtype)[None, :, None]
    base_x = torch.arange(width, device=x.device).to(x.dtype)[None, None, :]
    window = []
    for tap in range(9):
        y = base_y + dilation * (tap // 3 - 1) + offset[:, 2 * tap]
        x_place = base_x + dilation * (tap % 3 - 1) + offset[:, 2 * tap + 1]
        top, left = torch.floor(y), torch.floor(x_place)
        down, right = (y - top)[:, None], (x_place - left)[:, None]
        row, column = top.long(), left.long()
        window.append(
            (1 - down) * (1 - right) * _read(x, row, column)
            + (1 - down) * right * _read(x, row, column + 1)
            + down * (1 - right) * _read(x, row + 1, column)
            + down * right * _read(x, row + 1, column + 1)
        )
    return torch.stack(window, dim=2)


class _Weight(nn.Module):
    """Holds the weight of a deformable convolution under its published name."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))


class DynamicGraphMessagePassing(nn.Module):
    """y = x + sum over four dilations of gamma * message.

    Args:
        channels: channels C.
        group: channel groups G with filters of their own.
        dilation: distance between taps, one for each branch.
        deform: "deformatt", "deform" or "none".
    """

    def __init__(
        self,
        channels: int,
        group: int = 1,
        dilation: Sequence[int] = (1, 4, 8, 12),
        deform: str = "deformatt",
    ) -> None:
        super().__init__()
        self.group, self.dilation, self.deform = group, tuple(dilation), deform
        for letter, rate in zip("abcd", dilation, strict=True):
            if deform == "none":
                conv = nn.Conv2d(channels, 9 * group, 3, padding=rate, dilation=rate, bias=False)
                setattr(self, "cat" + letter, conv)
                continue
            conv = nn.Conv2d(channels, 18, 3, padding=rate, dilation=rate, bias=False)
            setattr(self, "off_conv" + letter, conv)
            extra = 9 if deform == "deformatt" else 0
            setattr(self, "kernel_conv" + letter, _Weight(channels, 9 * group + extra))
        self.gamma1 = nn.Parameter(torch.ones(1))
        self.gamma2 = nn.Parameter(torch.ones(1))
        self.gamma3 = nn.Parameter(torch.ones(1))
        self.gamma4 = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass messages; x and the result are (B, C, H, W)."""
        batch, channels, height, width = x.shape
        gammas = (self.gamma1, self.gamma2, self.gamma3, self.gamma4)
        out = x
        for letter, rate, gamma in zip("abcd", self.dilation, gammas, strict=True):
            if self.deform == "none":
                unfolded = F.unfold(x, 3, dilation=rate, padding=rate).view(batch, channels, 9, height, width)
                produced = getattr(self, "cat" + letter)(x)
            else:
                offset = getattr(self, "off_conv" + letter)(x)
                unfolded = _deformed_window(x, offset, rate)
                weight = getattr(self, "kernel_conv" + letter).weight
                columns = unfolded.reshape(batch, channels * 9, height * width)
                produced = torch.matmul(weight.flatten(1), columns).view(batch, -1, height, width)
            filters = produced[:, : 9 * self.group]
            per_group = filters.reshape(batch, self.group, 9, height, width)
            if self.deform == "deformatt":
                source = filters if letter == "d" else produced
                per_group = per_group * torch.softmax(source[:, -9:], dim=1)[:, None]
            else:
                per_group = torch.softmax(per_group, dim=2)
            groups = unfolded.view(batch, self.group, channels // self.group, 9, height, width)
            message = (groups * per_group[:, :, None]).sum(dim=3)
            out = out + gamma * message.view(batch, channels, height, width)
        return out
