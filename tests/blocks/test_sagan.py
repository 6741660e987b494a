"""SAGAN self-attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.sagan import (
    FullSelfAttention,
    PooledSelfAttention,
    SelfAttentionOverQueries,
    pooled_state_from_tensorflow,
)
from edgeattn.export.to_onnx import prepare_for_export
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


def changed_by(block: torch.nn.Module, x: torch.Tensor, name: str) -> bool:
    """Say whether other values of a part of the state change the result."""
    before = block(x)
    with torch.no_grad():
        block.state_dict()[name].add_(torch.linspace(0, 1, block.state_dict()[name].shape[-1]))
    return not torch.equal(block(x), before)


def test_spectral_norm_starts_from_the_stored_vector_and_leaves_it() -> None:
    x = torch.randn(1, 16, 4, 4)
    block = randomise(PooledSelfAttention(16))
    stored = block.theta.u0.clone()
    assert torch.equal(block(x), block(x))
    assert torch.equal(block.theta.u0, stored)
    assert not changed_by(block, x, "theta.sv0")
    assert changed_by(block, x, "theta.u0")


def test_norm_over_queries_does_not_drift_and_ignores_the_stale_weight() -> None:
    x = torch.randn(1, 16, 3, 4)
    block = randomise(SelfAttentionOverQueries(16))
    stored = block.value.weight_u.clone()
    assert torch.equal(block(x), block(x))
    assert torch.equal(block.value.weight_u, stored)
    assert not changed_by(block, x, "value.weight")
    assert changed_by(block, x, "value.weight_u")


@pytest.mark.parametrize("build", [PooledSelfAttention, SelfAttentionOverQueries])
def test_export_holds_plain_convolutions(build: type[torch.nn.Module]) -> None:
    prepared = prepare_for_export(randomise(build(16)))
    assert {type(conv) for conv in prepared.children()} & {torch.nn.Conv1d, torch.nn.Conv2d}
    assert not [name for name in prepared.state_dict() if not name.endswith((".weight", ".bias"))]


def test_odd_last_row_is_no_key() -> None:
    block = randomise(PooledSelfAttention(8))
    x = torch.randn(1, 8, 5, 4)
    other = x.clone()
    other[:, :, 4] += 3
    assert torch.allclose(block(other)[:, :, :4], block(x)[:, :, :4], atol=1e-6)
    other[:, :, 3] += 3
    assert not torch.allclose(block(other)[:, :, :3], block(x)[:, :, :3], atol=1e-3)


@pytest.mark.parametrize("size", [(1, 4), (4, 1)])
def test_maps_without_a_pooled_key_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="2x2"):
        PooledSelfAttention(8)(torch.zeros(1, 8, *size))


@pytest.mark.parametrize("build", [PooledSelfAttention, FullSelfAttention, SelfAttentionOverQueries])
def test_too_few_channels_are_refused(build: type[torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        build(7)


def test_mmgeneration_state_loads_through_its_key_map() -> None:
    block = randomise(PooledSelfAttention(8))
    published = {name.replace(".", ".conv."): value for name, value in block.state_dict().items()}
    other = PooledSelfAttention(8)
    load_checkpoint(other, published, key_map=BLOCKS.get("sagan").variant("mmgen").key_map)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(other(x), block(x))


def test_tensorflow_variables_are_turned_around() -> None:
    block = randomise(PooledSelfAttention(16))
    state = block.state_dict()
    scope = "generator/g_non_local"
    variables = {f"{scope}/sigma_ratio": state["gamma"], "other": torch.zeros(1)}
    for name, published in (("theta", "theta"), ("phi", "phi"), ("g", "g"), ("o", "attn")):
        variables[f"{scope}/sn_conv_{published}/w"] = state[f"{name}.weight"][:, :, 0, 0].t()[None, None]
        variables[f"{scope}/sn_conv_{published}/u"] = state[f"{name}.u0"]
    other = PooledSelfAttention(16)
    other.load_state_dict(pooled_state_from_tensorflow(variables, scope), strict=True)
    x = torch.randn(1, 16, 4, 6)
    assert torch.equal(other(x), block(x))
    with pytest.raises(UserError, match="sn_conv_theta/w"):
        pooled_state_from_tensorflow(variables, "discriminator/d_non_local")


def test_attention_is_returned_on_request_only() -> None:
    with_map = randomise(FullSelfAttention(8, return_attention=True))
    without = FullSelfAttention(8)
    without.load_state_dict(with_map.state_dict())
    x = torch.randn(2, 8, 3, 5)
    out, attention = with_map(x)
    assert attention.shape == (2, 15, 15)
    assert torch.allclose(attention.sum(dim=2), torch.ones(2, 15))
    assert torch.allclose(without(x), out, atol=1e-6)
