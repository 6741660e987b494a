"""Local neighbourhoods without unfold: one slice of a padded map for each tap of a window."""

from __future__ import annotations

import torch


def taps(padded: torch.Tensor, kernel: int, *, dilation: int = 1, stride: int = 1) -> list[torch.Tensor]:
    """Return, for each tap of a window, what lies under it at every position of the map.

    The slices have constant bounds (counted from the end), so they stay static when height and width are dynamic.

    Args:
        padded: (..., height + 2 * pad, width + 2 * pad) with pad = dilation * (kernel - 1) // 2.
        kernel: window size, odd or even.
        dilation: distance between taps.
        stride: distance between window centres.

    Returns:
        kernel * kernel tensors (..., ceil(height / stride), ceil(width / stride)), row by row, as F.unfold orders them.
    """
    reach = dilation * (kernel - 1)
    bounds = [(offset * dilation, offset * dilation - reach or None) for offset in range(kernel)]
    return [padded[..., top:bottom:stride, left:right:stride] for top, bottom in bounds for left, right in bounds]
