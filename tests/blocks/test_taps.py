"""Taps against F.unfold, and the sums over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.blocks.taps import tap_softmax, taps, weighted_sum


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 5),
    dilation=st.integers(1, 3),
    stride=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
)
def test_taps_equal_unfold(kernel: int, dilation: int, stride: int, height: int, width: int) -> None:
    reach = dilation * (kernel - 1)
    padded = torch.arange(2 * 3 * (height + reach) * (width + reach), dtype=torch.float64)
    padded = padded.reshape(2, 3, height + reach, width + reach)
    expected = F.unfold(padded, kernel, dilation=dilation, stride=stride).reshape(2, 3, kernel**2, -1)
    actual = taps(padded, kernel, dilation=dilation, stride=stride)
    assert actual[0].shape == (2, 3, -(-height // stride), -(-width // stride))
    assert torch.equal(torch.stack([tap.flatten(2) for tap in actual], dim=2), expected)


@pytest.mark.parametrize("dim", [1, 2])
def test_tap_softmax_equals_softmax_over_the_stack(dim: int) -> None:
    shape = [2, 3, 4, 5]
    shape.insert(dim, 1)
    logits = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    actual = tap_softmax(logits, dim)
    assert all(weight.shape == tuple(shape) for weight in actual)
    torch.testing.assert_close(torch.cat(actual, dim=dim), torch.cat(logits, dim=dim).softmax(dim=dim))


def test_weighted_sum_broadcasts_weights_over_channels() -> None:
    weights = [torch.full((1, 2, 1, 1, 1), float(tap)) for tap in (1, 2, 3)]
    values = [torch.full((1, 2, 4, 3, 2), float(tap)) for tap in (5, 7, 11)]
    assert torch.equal(weighted_sum(weights, values), torch.full((1, 2, 4, 3, 2), 52.0))
