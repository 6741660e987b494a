"""Recurrent criss-cross attention head of CCNet, original.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, section 3.3.
Behaviour: speedinghzl/CCNet, `networks/ccnet.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.validation.originals.abn import ABN
from edgeattn.validation.originals.criss_cross import CrissCrossAttention


class RCCAModule(nn.Module):
    """Reduce, attend `recurrence` times with the same weights, merge with the input, classify.

    Args:
        in_channels: channels of the backbone's features; the attention works on a quarter of them.
        out_channels: channels between the two convolutions of the classifier.
        num_classes: number of classes K.
        recurrence: how often criss-cross attention is applied; 2 lets every position reach every other.
    """

    def __init__(self, in_channels: int, out_channels: int, num_classes: int, recurrence: int = 2) -> None:
        super().__init__()
        inner = in_channels // 4
        self.recurrence = recurrence
        self.conva = nn.Sequential(nn.Conv2d(in_channels, inner, 3, padding=1, bias=False), ABN(inner))
        self.cca = CrissCrossAttention(inner)
        self.convb = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, bias=False), ABN(inner))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels + inner, out_channels, 3, padding=1, bias=False),
            ABN(out_channels),
            nn.Identity(),  # dropout in training; it keeps the official index of the classifier
            nn.Conv2d(out_channels, num_classes, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, H, W) of features x (B, in_channels, H, W)."""
        attended = self.conva(x)
        for _ in range(self.recurrence):
            attended = self.cca(attended)
        attended = self.convb(attended)
        logits: torch.Tensor = self.bottleneck(torch.cat([x, attended], dim=1))
        return logits
