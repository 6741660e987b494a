"""Adaptive average pooling as matrix products: exact for every size, also where the bins overlap, and dynamic.

Bin i of k over length L averages the positions from floor(i L / k) to ceil((i + 1) L / k), without the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pooling_matrix(length: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix (length, bins) whose column i averages bin i, in the type and on the device of `like`."""
    position = torch.arange(length, device=like.device)[:, None]
    index = torch.arange(bins, device=like.device)
    member = ((position + 1) * bins > index * length) & (position * bins < (index + 1) * length)
    member = member.to(like.dtype)
    return member / member.sum(dim=0)


def pyramid_pool(x: torch.Tensor, bins: Sequence[int]) -> torch.Tensor:
    """Pool a map to several grids, as `F.adaptive_avg_pool2d` does for each.

    Args:
        x: (batch, channels, height, width).
        bins: size of each square grid, such as (1, 3, 6, 8).

    Returns:
        (batch, channels, sum of bins squared): each grid row by row, one after the other.
    """
    height, width = x.shape[2:]
    narrow = torch.matmul(x, torch.cat([pooling_matrix(width, size, x) for size in bins], dim=1))
    grids, start = [], 0
    for size in bins:
        rows = pooling_matrix(height, size, x).transpose(0, 1)
        grids.append(torch.matmul(rows, narrow[..., start : start + size]).flatten(2))
        start += size
    return torch.cat(grids, dim=2)


def adaptive_average_pool(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Pool (batch, channels, height, width) to (batch, channels, bins, bins), as `F.adaptive_avg_pool2d` does."""
    return pyramid_pool(x, (bins,)).unflatten(2, (bins, bins))
