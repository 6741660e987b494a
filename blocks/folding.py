"""Exact foldings that several blocks share."""

from __future__ import annotations

import torch
from torch import nn


def fold_gamma(gamma: nn.Parameter | None, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Multiply a convolution, in place, by gamma, unless that is folded already."""
    if gamma is None:
        return
    with torch.no_grad():
        conv.weight.mul_(gamma)
        if conv.bias is not None:
            conv.bias.mul_(gamma)
