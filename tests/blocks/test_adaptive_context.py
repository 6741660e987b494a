"""Adaptive context beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.adaptive_context import ACM, APCHead
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


def test_affinities_are_sigmoids_and_not_normalised() -> None:
    """With equal regions and open gates, a position receives the sum over the s * s cells."""
    block = randomise(ACM(4, 3, pool_scale=2, fusion=False))
    with torch.no_grad():
        block.gla.weight.zero_()
        block.gla.bias.fill_(100.0)
        norm = block.residual_conv.bn
        norm.weight.fill_(1.0)
        norm.running_var.fill_(1.0 - norm.eps)
        norm.running_mean.zero_()
        norm.bias.zero_()
        block.residual_conv.conv.weight.copy_(torch.eye(3)[:, :, None, None])
    x = torch.randn(1, 4, 1, 1).expand(1, 4, 6, 6)
    region = block.pooled_redu_conv(x[:, :, :1, :1])
    assert torch.allclose(block(x), 4 * region + block.input_redu_conv(x), atol=1e-5)


def test_regions_are_averages_of_the_raw_input() -> None:
    """The average goes before the projection's ReLU: x and -x cancel in a cell."""
    block = randomise(ACM(4, 3, pool_scale=1))
    seen = []
    block.pooled_redu_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    half = torch.randn(1, 4, 3, 2)
    block(torch.cat([half, -half], dim=2))
    assert seen[0].abs().max() < 1e-6


def test_head_joins_the_input_first_and_pools_it_once() -> None:
    head = randomise(APCHead(5, 3, num_classes=2, pool_scales=(1, 3)))
    joined = []
    head.bottleneck.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    x = torch.randn(2, 5, 7, 4)
    head(x)
    expected = torch.cat([x, *(module(x) for module in head.acm_modules)], dim=1)
    assert torch.allclose(joined[0], expected, atol=1e-5)


def test_a_whole_mmseg_checkpoint_loads_into_the_head() -> None:
    head = randomise(APCHead(5, 3, num_classes=2))
    published = {f"decode_head.{name}": value for name, value in head.state_dict().items()}
    published |= {"backbone.conv1.weight": torch.zeros(1), "auxiliary_head.conv_seg.bias": torch.zeros(1)}
    other = APCHead(5, 3, num_classes=2)
    load_checkpoint(other, published, key_map=BLOCKS.get("adaptive-pyramid-context-head").variant("official").key_map)
    assert all(torch.equal(value, head.state_dict()[name]) for name, value in other.state_dict().items())


def test_grids_without_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="pool_scale >= 1, got 0"):
        ACM(4, 3, pool_scale=0)
    with pytest.raises(ValueError, match="at least one scale"):
        APCHead(4, 3, num_classes=2, pool_scales=())
