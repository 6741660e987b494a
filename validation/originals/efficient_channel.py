"""Efficient channel attention, original.

Paper: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020, equations
5 (private kernels) and 7 (one kernel). Behaviour: BangguWu/ECANet, `models/eca_ns.py` and `models/eca_module.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class EfficientChannelAttention(nn.Module):
    """Global average, a 1-D convolution along the channels, a sigmoid, scale.

    Args:
        channel: channels C.
        k_size: odd size k of the kernel.
        private: one kernel per channel.
        circular: pad with the channels of the other end (timm's `CecaModule`) instead of zeros.
    """

    def __init__(self, channel: int, k_size: int = 3, *, private: bool = False, circular: bool = False) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        if private:
            self.conv = nn.Conv1d(channel, channel, k_size, groups=channel, bias=False)
        else:
            self.conv = nn.Conv1d(1, 1, k_size, padding=0 if circular else k_size // 2, bias=False)
        self.circular = circular
        self.private = private
        self.k_size = k_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape."""
        vector = self.squeeze(x)
        if self.private:
            row = vector.permute(0, 2, 3, 1)
            windows = F.unfold(row, (1, self.k_size), padding=(0, self.k_size // 2))  # (B, k, C)
            logits = self.conv(windows.permute(0, 2, 1)).unsqueeze(3)
        else:
            row = vector.squeeze(3).permute(0, 2, 1)
            if self.circular:
                row = F.pad(row, (self.k_size // 2, self.k_size // 2), mode="circular")
            logits = self.conv(row).permute(0, 2, 1).unsqueeze(3)
        return x * torch.sigmoid(logits).expand_as(x)
