"""Spatial group-wise enhance beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.spatial_group import SpatialGroupEnhance
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def gates(module: SpatialGroupEnhance, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x) / x


@pytest.mark.parametrize("scale", [1.0, 3e-3], ids=["plain", "small"])
def test_groups_are_neighbours_and_the_deviation_is_unbiased_plus_a_constant(scale: float) -> None:
    """Small features have deviations near the constant 1e-5, so that its place matters."""
    module = randomise(SpatialGroupEnhance(6, 2)).double()
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64) * scale
    actual = gates(module, x)
    for group in range(2):
        features = x[0, 3 * group : 3 * group + 3].flatten(1)
        similarity = features.mean(dim=1) @ features
        deviation = (similarity - similarity.mean()).square().sum().div(5).sqrt()
        logits = (similarity - similarity.mean()) / (deviation + 1e-5)
        expected = (logits * module.weight[0, group, 0, 0] + module.bias[0, group, 0, 0]).sigmoid().view(2, 3)
        for channel in range(3 * group, 3 * group + 3):
            assert torch.allclose(actual[0, channel], expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_mean_keeps_its_bias(dtype: torch.dtype) -> None:
    module = randomise(SpatialGroupEnhance(4, 2)).to(dtype)
    x = torch.tensor([1.0, -1.0], dtype=dtype).expand(1, 4, 3, 2)
    expected = module.bias.sigmoid().repeat_interleave(2, dim=1)
    assert torch.allclose(gates(module, x), expected.expand_as(x))


def test_a_constant_map_keeps_its_bias() -> None:
    module = randomise(SpatialGroupEnhance(4, 2)).double()
    x = torch.full((1, 4, 2, 2), 3.0, dtype=torch.float64)
    expected = module.bias.sigmoid().repeat_interleave(2, dim=1)
    assert torch.allclose(gates(module, x), expected.expand_as(x))


def test_a_single_position_is_refused() -> None:
    with pytest.raises(UserError, match="1 x 1"):
        SpatialGroupEnhance(4, 2)(torch.randn(2, 4, 1, 1))


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_must_divide_the_channels(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups={groups} for 6 channels"):
        SpatialGroupEnhance(6, groups)
