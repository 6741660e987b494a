"""Local neighbourhoods without unfold: one slice of a padded map for each tap of a window, and sums over the taps."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def taps(padded: torch.Tensor, kernel: int, *, dilation: int = 1, stride: int = 1) -> list[torch.Tensor]:
    """Return, for each tap of a window, what lies under it at every position of the map.

    The slices have constant bounds (counted from the end), so they stay static when height and width are dynamic.
    Columns are cut first, so that the many slices of rows are contiguous.

    Args:
        padded: (..., height + reach, width + reach) with reach = dilation * (kernel - 1); an odd window centred on its
            position has half of the reach on each side.
        kernel: window size, odd or even.
        dilation: distance between taps.
        stride: distance between window centres.

    Returns:
        kernel * kernel tensors (..., ceil(height / stride), ceil(width / stride)), row by row, as F.unfold orders them.
    """
    reach = dilation * (kernel - 1)
    bounds = [(offset * dilation, offset * dilation - reach or None) for offset in range(kernel)]
    columns = [padded[..., left:right:stride] for left, right in bounds]
    return [column[..., top:bottom:stride, :] for top, bottom in bounds for column in columns]


def tap_softmax(logits: Sequence[torch.Tensor], dim: int) -> list[torch.Tensor]:
    """Return the softmax over the taps of a window.

    The softmax runs over the last axis of a matrix, where ONNX Runtime is seven times as fast as along `dim`.

    Args:
        logits: one tensor per tap, of equal shapes with size 1 along `dim`; height and width come behind `dim`.
        dim: the axis to stack the taps along.

    Returns:
        The weights, one tensor of the same shape per tap.
    """
    stacked = torch.cat(list(logits), dim=dim)
    matrix = stacked.flatten(dim + 1).transpose(dim, dim + 1)
    weights = matrix.softmax(dim=dim + 1).transpose(dim, dim + 1).reshape(stacked.shape)
    return [weights.narrow(dim, tap, 1) for tap in range(len(logits))]


def weighted_sum(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum over the taps of weight times value; one after the other, so that no stack of taps is stored."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
