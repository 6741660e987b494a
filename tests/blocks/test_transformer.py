"""Transformer layers beyond the common contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from edgeattn.blocks.transformer import TransformerDecoderLayer, TransformerEncoderLayer, UnbiasedLayerNorm
from edgeattn.export.to_onnx import prepare_for_export
from edgeattn.validation.randomise import randomise


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


FORMS = pytest.mark.parametrize(
    "arguments",
    [{}, {"norm_first": True}, {"activation": "gelu", "layer_norm_eps": 1e-3}, {"bias": False}],
    ids=str,
)
PADDING = torch.arange(7) >= torch.tensor([[7], [4]])


@FORMS
def test_encoder_layer_of_torch_loads_and_agrees(arguments: dict[str, object]) -> None:
    published = randomise(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, **arguments)).double()
    block = TransformerEncoderLayer(12, 3, 20, **arguments).eval().double()
    block.load_state_dict(published.state_dict(), strict=True)
    x = torch.randn(2, 7, 12).double()
    mask = torch.randn(7, 7).gt(0.5) & (torch.arange(7) > 0)
    expected = published(x, src_mask=mask, src_key_padding_mask=PADDING)
    for form in (block, prepare_for_export(block)):
        assert torch.allclose(form(x, PADDING, mask), expected, atol=1e-11)
        assert torch.allclose(form(x), published(x), atol=1e-11)


@FORMS
def test_decoder_layer_of_torch_loads_and_agrees(arguments: dict[str, object]) -> None:
    published = randomise(nn.TransformerDecoderLayer(12, 3, 20, batch_first=True, **arguments)).double()
    block = TransformerDecoderLayer(12, 3, 20, **arguments).eval().double()
    block.load_state_dict(published.state_dict(), strict=True)
    tgt, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    memory_mask = torch.randn(5, 7).gt(0.5) & (torch.arange(7) > 0)
    expected = published(
        tgt, memory, tgt_mask=causal, memory_mask=memory_mask, memory_key_padding_mask=PADDING, tgt_is_causal=True
    )
    free = TransformerDecoderLayer(12, 3, 20, causal=False, **arguments).eval().double()
    free.load_state_dict(published.state_dict(), strict=True)
    for form in (block, prepare_for_export(block)):
        assert torch.allclose(form(tgt, memory, None, PADDING, None, memory_mask), expected, atol=1e-11)
    assert torch.allclose(free(tgt, memory, None, PADDING, causal, memory_mask), expected, atol=1e-11)


def test_causal_layer_does_not_look_ahead() -> None:
    layer = randomise(TransformerEncoderLayer(12, 3, 20, causal=True))
    x = torch.randn(1, 7, 12)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_annotated_norm_divides_by_one_less_and_adds_eps_outside() -> None:
    norm = randomise(UnbiasedLayerNorm(6, 0.5))
    x = torch.randn(2, 3, 6)
    expected = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.5) * norm.weight + norm.bias
    assert torch.allclose(norm(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "swish"}, "activation is 'swish'. Give one of relu, gelu"),
        ({"unbiased_norm": True, "bias": False}, "Give bias=True"),
    ],
)
def test_layers_that_do_not_exist_are_refused(arguments: dict[str, object], message: str) -> None:
    for layer in (TransformerEncoderLayer, TransformerDecoderLayer):
        with pytest.raises(ValueError, match=message):
            layer(12, 3, 20, **arguments)
