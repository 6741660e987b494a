"""Multi-head attention beyond the common contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.multi_head import MultiHeadAttention, ScaledDotProductAttention
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.validation.randomise import randomise


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def pair(**arguments: object) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Return our block and torch's with one state, in FP64."""
    published = randomise(nn.MultiheadAttention(12, 3, batch_first=True, **arguments)).double()
    block = MultiHeadAttention(12, 3, **arguments).eval().double()
    block.load_state_dict(published.state_dict(), strict=True)
    return block, published


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a padding mask (2, 7) that hides the end, and a mask (5, 7)."""
    return torch.arange(7) >= torch.tensor([[7], [4]]), torch.randn(5, 7).gt(1) & (torch.arange(7) > 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 10, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("additive", [False, True])
def test_state_of_torch_computes_what_torch_computes(arguments: dict[str, object], additive: bool) -> None:
    block, published = pair(**arguments)
    query = torch.randn(2, 5, 12).double()
    key, value = (torch.randn(2, 7, arguments.get(name, 12)).double() for name in ("kdim", "vdim"))
    padding, mask = masks()
    attn_mask = torch.randn(5, 7).double() if additive else mask
    expected, _ = published(query, key, value, key_padding_mask=padding, attn_mask=attn_mask)
    for form in (block, prepare_for_export(block)):
        assert torch.allclose(form.attend(query, key, value, padding, attn_mask), expected, atol=1e-12)


def test_mask_is_the_opposite_of_the_functional_form() -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    _, mask = masks()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=~mask)
    assert torch.allclose(ScaledDotProductAttention(4)(query, key, value, mask), expected, atol=1e-6)


def test_causal_mask_aligns_the_first_positions() -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(ScaledDotProductAttention(4, causal=True)(query, key, value), expected, atol=1e-6)


@pytest.mark.parametrize("infinite", [False, True])
def test_query_that_may_see_nothing_sees_all_keys_equally(infinite: bool) -> None:
    """torch gives NaN."""
    block, published = pair()
    query, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1] = True
    assert published(query, memory, memory, key_padding_mask=padding)[0][1].isnan().all()
    if infinite:  # an additive mask counts as no less than -65504, which leaves the energies in order
        mask = torch.zeros(2, 7).double().masked_fill(padding, float("-inf"))
        assert torch.allclose(block.cross(query, memory, mask)[1], block.cross(query, memory)[1], atol=1e-9)
        return
    value = F.linear(memory[1].mean(dim=0), block.in_proj_weight[24:], block.in_proj_bias[24:])
    expected = block.out_proj(value).expand(5, 12)
    for form in (block, prepare_for_export(block)):
        assert torch.allclose(form.cross(query, memory, padding)[1], expected, atol=1e-12)


def test_masks_may_differ_per_sequence_and_per_head() -> None:
    block, _ = pair()
    x = torch.randn(2, 5, 12).double()
    mask = torch.randn(2, 3, 5, 5).gt(0.5) & (torch.arange(5) > 0)
    whole = block(x, None, mask)
    per_sequence = block(x, None, mask[:, 0])
    for index in range(2):
        assert torch.allclose(block(x[index : index + 1], None, mask[index, 0]), per_sequence[index], atol=1e-12)
    assert not torch.allclose(whole, per_sequence)
    assert torch.allclose(block(x, None, mask[:, :1].expand(-1, 3, -1, -1)), per_sequence, atol=1e-12)


@pytest.mark.parametrize("extra", [False, True])
def test_key_bias_cancels_unless_there_are_learned_keys(extra: bool) -> None:
    block, _ = pair(add_bias_kv=extra)
    x = torch.randn(2, 5, 12).double()
    before = block(x)
    with torch.no_grad():
        block.in_proj_bias[12:24] += 1
    assert torch.allclose(block(x), before, atol=1e-12) != extra


def test_preparation_drops_biases_and_scale() -> None:
    block = randomise(MultiHeadAttention(12, 3))
    state = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(2, 5, 12)
    prepared = prepare_for_export(block)
    assert torch.allclose(prepared(x), block(x), atol=1e-6)
    assert sum(map(torch.numel, prepared.parameters())) == sum(map(torch.numel, block.parameters())) - 24
    names = {"input_names": ["x"], "output_names": ["y"]}
    lean = to_onnx(block, (x,), **names).graph.node
    direct = torch.onnx.export(block, (x,), dynamo=True, verbose=False, **names).model_proto.graph.node
    assert len(lean) < len(direct)
    assert "Mul" not in {node.op_type for node in lean}
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    again = prepare_for_export(prepared)
    assert torch.equal(again(x), prepared(x))


def test_norm_of_jadore_adds_the_query_features() -> None:
    plain, _ = pair(bias=False)
    block = MultiHeadAttention(12, 3, bias=False, layer_norm_eps=1e-6).double()
    block.load_state_dict(plain.state_dict(), strict=False)
    query, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    expected = F.layer_norm(query + plain.cross(query, memory), (12,), eps=1e-6)
    assert torch.allclose(block.cross(query, memory), expected, atol=1e-12)


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_that_do_not_divide_the_channels_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads is {heads}. Give a divisor of embed_dim, which is 12"):
        MultiHeadAttention(12, heads)
