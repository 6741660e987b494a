"""CBAM beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.cbam import CBAM, POOLS
from edgeattn.export.to_onnx import to_onnx
from edgeattn.validation.randomise import randomise


def test_the_convolution_sees_the_maximum_first_and_timm_the_mean_first() -> None:
    """The conversion flips the weight; without it the same state gives other results."""
    official = randomise(CBAM(8, 4))
    timm = CBAM(8, 4, convolutions=True, mean_first=True).eval()
    state = official.state_dict()
    for index in (1, 3):
        state[f"ChannelGate.mlp.{index}.weight"] = state[f"ChannelGate.mlp.{index}.weight"][:, :, None, None]
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        expected = official(x)
        timm.load_state_dict(state)
        assert not torch.allclose(timm(x), expected, atol=1e-3)
        state["SpatialGate.spatial.conv.weight"] = state["SpatialGate.spatial.conv.weight"].flip(1)
        timm.load_state_dict(state)
        assert torch.allclose(timm(x), expected, atol=1e-6)


def test_pools_have_their_definitions() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    flat = x.flatten(2)
    expected = {
        "avg": flat.sum(dim=2) / 20,
        "max": flat.sort(dim=2).values[..., -1],
        "lp": (flat**2).sum(dim=2) ** 0.5,
        "lse": flat.exp().sum(dim=2).log(),
    }
    assert expected.keys() == POOLS.keys()
    for name, pool in POOLS.items():
        assert torch.allclose(pool(x)[..., 0, 0], expected[name])


def test_log_sum_exp_is_shifted_by_the_maximum() -> None:
    x = torch.full((1, 1, 2, 2), 500.0)
    assert torch.allclose(POOLS["lse"](x), 500 + torch.tensor(4.0).log())


def test_every_pool_passes_the_network_with_its_bias() -> None:
    """With zero weights the logit is the last bias, once per pool."""
    block = CBAM(4, 2, ("avg", "max", "lse"), no_spatial=True)
    torch.nn.init.zeros_(block.ChannelGate.mlp[3].weight)
    torch.nn.init.constant_(block.ChannelGate.mlp[3].bias, 0.5)
    x = torch.randn(1, 4, 3, 3)
    assert torch.allclose(block(x), x * torch.tensor(1.5).sigmoid())


def test_without_spatial_gate_there_is_no_state_of_it() -> None:
    assert all(name.startswith("ChannelGate.mlp.") for name in CBAM(8, 4, no_spatial=True).state_dict())


@pytest.mark.parametrize("channels", [1, 7, 12])
def test_any_number_of_channels_is_reduced_in_two_steps(channels: int) -> None:
    gate = randomise(CBAM(channels, 1)).SpatialGate
    x = torch.randn(2, channels, 3, 5)
    pooled = torch.stack([x.max(dim=1).values, x.mean(dim=1)], dim=1)
    with torch.no_grad():
        assert torch.allclose(gate(x), x * gate.spatial(pooled).sigmoid(), atol=1e-6)


def test_the_network_runs_once_and_the_normalisation_is_folded() -> None:
    model = to_onnx(randomise(CBAM(8, 4)), (torch.randn(1, 8, 3, 4),), input_names=["x"], output_names=["y"])
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Conv") == 3
    assert "BatchNormalization" not in operators
    assert "Expand" not in operators


@pytest.mark.parametrize("pools", [(), ("mean",), "avg"], ids=["none", "unknown", "string"])
def test_bad_pools_are_refused(pools: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="pool_types of CBAM"):
        CBAM(8, 4, pools)


def test_a_gate_without_hidden_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="CBAM with 8 channels has reduction=16"):
        CBAM(8)
