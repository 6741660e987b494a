"""Show, attend and tell beyond the common contract."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from edgeattn.blocks.show_attend_tell import ShowAttendTell, StackedShowAttendTell
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.validation.randomise import randomise

SIZES = {"attention_dim": 8, "embed_dim": 4, "decoder_dim": 6, "vocab_size": 11, "encoder_dim": 12}


def state(batch: int = 2, positions: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, positions, 12, generator=generator)
    return features, torch.randn(batch, 6, generator=generator), torch.randn(batch, 6, generator=generator)


def test_the_bias_of_the_energy_cancels_and_leaves_the_export() -> None:
    block = randomise(ShowAttendTell(**SIZES))
    features, h, c = state()
    word = torch.randn(2, 4)
    inputs = (features, block.keys(features), word, h, c)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    expected = block.step(*inputs)
    prepared = prepare_for_export(block)
    assert sum(p.numel() for p in prepared.parameters()) == sum(p.numel() for p in block.parameters()) - 1
    for actual, wanted in zip(prepared.step(*inputs), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    with torch.no_grad():
        block.attention.full_att.bias.add_(3.0)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(block.step(*inputs), expected, strict=True))


def test_the_prepared_step_has_fewer_products() -> None:
    block = randomise(ShowAttendTell(**SIZES))
    features, h, c = state()
    model = to_onnx(
        block,
        (features, block.keys(features), torch.randn(2, 4), h, c),
        input_names=["features", "keys", "word", "h", "c"],
        output_names=["logits", "h_next", "c_next", "alpha"],
        method="step",
    )
    products = [node.op_type for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 5  # state, energy, z, LSTM input, words; unprepared: attention, gate and LSTM apart


def test_a_step_takes_the_index_of_a_word() -> None:
    block = randomise(ShowAttendTell(**SIZES))
    features, h, c = state()
    inputs = (features, block.keys(features), torch.tensor([3, 7]), h, c)
    model = to_onnx(
        block,
        inputs,
        input_names=["features", "keys", "token", "h", "c"],
        output_names=["logits", "h_next", "c_next", "alpha"],
        method="decode",
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = ("features", "keys", "token", "h", "c")
    actual = session.run(None, {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True)})
    for result, expected in zip(actual, block.decode(*inputs), strict=True):
        assert torch.allclose(torch.from_numpy(result), expected, rtol=0, atol=1e-5)


def test_greedy_decoding_is_the_steps_one_after_the_other() -> None:
    block = randomise(ShowAttendTell(**SIZES, steps=4, start_token=2))
    features, _, _ = state()
    words, scores, maps = block(features)
    h, c = block.initial_state(features)
    token = torch.tensor([2, 2])
    for index in range(4):
        logits, h, c, alpha = block.decode(features, block.keys(features), token, h, c)
        token = logits.argmax(dim=1)
        assert torch.equal(words[:, index], token)
        assert torch.allclose(scores[:, index], logits)
        assert torch.allclose(maps[:, index], alpha)


def test_hard_attention_sees_one_position_and_reports_the_softmax() -> None:
    block = randomise(ShowAttendTell(**SIZES, hard=True))
    features, h, c = state()
    keys, word = block.keys(features), torch.zeros(2, 4)
    logits, _, _, alpha = block.step(features, keys, word, h, c)
    assert torch.allclose(alpha.sum(dim=1), torch.ones(2))
    assert (alpha.amax(dim=1) < 1).all()
    seen = alpha.argmax(dim=1, keepdim=True) == torch.arange(5)
    changed = torch.where(seen.unsqueeze(2), features, torch.randn_like(features))
    assert torch.equal(block.step(changed, keys, word, h, c)[0], logits)


@pytest.mark.parametrize("scalar_gate", [False, True])
def test_the_gate_is_a_vector_or_a_scalar(scalar_gate: bool) -> None:
    block = ShowAttendTell(**SIZES, scalar_gate=scalar_gate)
    assert block.f_beta.weight.shape == ((1, 6) if scalar_gate else (12, 6))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="activation is one of relu, tanh, not 'gelu'"):
        ShowAttendTell(activation="gelu")
    with pytest.raises(ValueError, match="steps has to be at least 1"):
        ShowAttendTell(steps=0)
    with pytest.raises(ValueError, match="start_token has to be in the vocabulary, 0 to 9489, got 9490"):
        ShowAttendTell(start_token=9490)


STACKED = {"ctx_dim": 12, "dim": 6, "dim_word": 4, "n_words": 11, "n_layers_out": 2}


def test_the_stacked_step_has_one_product_per_input_and_no_factors() -> None:
    block = randomise(StackedShowAttendTell(**STACKED, use_dropout_lstm=True))
    features, h, c = state()
    model = to_onnx(
        block,
        (features, block.keys(features), torch.randn(2, 4), h, c),
        input_names=["features", "keys", "word", "h", "c"],
        output_names=["logits", "h_next", "c_next", "alpha"],
        method="step",
    )
    products = [node.op_type for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 7  # state, energy, z, LSTM input, deep output, one more layer, words
    assert sum(node.op_type == "Mul" for node in model.graph.node) == 4  # gate of z; i, f and o of the LSTM


def test_dropout_halves_in_evaluation() -> None:
    """Doubling every matrix behind a dropout undoes it."""
    halved = randomise(StackedShowAttendTell(**STACKED))
    whole = StackedShowAttendTell(**STACKED, use_dropout=False)
    whole.load_state_dict(halved.state_dict())
    features, _, _ = state()
    assert not torch.allclose(halved(features)[1], whole(features)[1])
    with torch.no_grad():
        for name in ("ff_state_W", "ff_memory_W", "ff_logit_lstm_W", "ff_logit_h1_W", "ff_logit_W"):
            halved.get_parameter(name).mul_(2)
    torch.testing.assert_close(halved(features)[1], whole(features)[1])


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="n_layers_att has to be at least 1, got 0"):
        StackedShowAttendTell(n_layers_att=0)
