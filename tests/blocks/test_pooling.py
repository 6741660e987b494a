"""Adaptive average pooling as matrix products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from edgeattn.blocks.pooling import adaptive_average_pool, pooling_matrix, pyramid_pool


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 24), width=st.integers(1, 24), bins=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_equals_torch_for_every_size_also_with_more_bins_than_positions(
    height: int, width: int, bins: list[int]
) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(height * width))
    expected = torch.cat([F.adaptive_avg_pool2d(x, size).flatten(2) for size in bins], dim=2)
    assert torch.allclose(pyramid_pool(x, bins), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "bins"), [(97, 3), (97, 6), (97, 8), (65, 6), (129, 8), (3, 8), (1, 6), (12, 12)])
def test_one_axis_at_the_sizes_of_networks(length: int, bins: int) -> None:
    x = torch.randn(4, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool1d(x, bins)
    assert torch.allclose(x @ pooling_matrix(length, bins, x), expected, rtol=0, atol=1e-12)


def test_bins_of_97_overlap() -> None:
    assert (pooling_matrix(97, 6, torch.zeros(())) > 0).sum() > 97


def test_one_grid_keeps_its_shape() -> None:
    x = torch.randn(2, 3, 5, 7)
    assert torch.allclose(adaptive_average_pool(x, 3), F.adaptive_avg_pool2d(x, 3), atol=1e-6)
