"""Synthesizers beyond the common contract."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.synthesizer import HEAD_MODES, DenseSynthesizerLayer, MultiHeadSynthesizer, Synthesizer
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import synthesizer as original
from edgeattn.validation.randomise import randomise


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("tile_both", [False, True])
def test_every_pair_of_factors_occurs_once_unless_both_are_tiled(tile_both: bool) -> None:
    block = randomise(Synthesizer(5, 8, "factorized_dense", tile_both=tile_both)).double()
    x = torch.randn(1, 8, 5, dtype=torch.float64)
    a, b = block.a_proj(x)[0, 0], block.b_proj(x)[0, 0]
    pairs = {round(float(p * q), 9) for p in a for q in b}
    energies = {round(float(energy), 9) for energy in block._energies(x, 8)[0, 0]}
    assert len(pairs) == 8
    assert energies < pairs if tile_both else energies == pairs


def test_the_random_port_has_no_softmax() -> None:
    block = randomise(Synthesizer(5, 8, "random", softmax=False))
    assert torch.equal(block(torch.randn(2, 8, 5))[1], block.attention)


def test_a_fixed_length_without_mask_stores_the_softmax() -> None:
    block = randomise(MultiHeadSynthesizer(6, 2, 4, "random", max_length=8))
    x = torch.randn(2, 5, 6)
    model = to_onnx(block, (x,), input_names=["x"], output_names=["y"])
    assert set(operators(model)) == {"MatMul", "Reshape", "Transpose"}
    expected = block.R[:5, :, :5].transpose(0, 1).softmax(dim=2)
    held = [torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer]
    assert any(value.shape == expected.shape and torch.allclose(value, expected) for value in held)
    assert all(value.shape != (2, 8, 8) for value in held)
    dynamic = to_onnx(block, (x,), input_names=["x"], output_names=["y"], dynamic_axes=[{1: "length"}])
    assert "Softmax" in operators(dynamic)


def test_prepared_weights_belong_to_their_length() -> None:
    block = randomise(Synthesizer(5, 8, "random"))
    prepared = prepare_for_export(block)
    for length in (3, 8, 3):
        x = torch.randn(1, length, 5)
        assert torch.allclose(prepared(x)[1], block(x)[1])
        assert prepared(x)[1].shape == (1, length, length)


def test_factors_of_the_table_are_multiplied_before_the_export() -> None:
    block = randomise(Synthesizer(5, 8, "factorized_random", rank=3))
    before = set(block.state_dict())
    prepared = prepare_for_export(block)
    assert not {"R1", "R2"} & set(prepared.state_dict())
    assert set(block.state_dict()) == before
    x = torch.randn(2, 8, 5)
    assert torch.allclose(prepared(x)[0], block(x)[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["random_plus", "dense_plus"])
def test_sums_without_alpha_equal_the_original(mode: str) -> None:
    block = randomise(MultiHeadSynthesizer(6, 2, 4, mode, max_length=8)).double()
    twin = original.MultiHeadSynthesizer(6, 2, 4, mode, max_length=8).double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    assert torch.allclose(block(x), twin(x), rtol=1e-10)


@pytest.mark.parametrize("mode", ["random_plus_alpha", "dense_plus_alpha"])
def test_alpha_leads_from_dot_products_to_synthesis(mode: str) -> None:
    block = randomise(MultiHeadSynthesizer(6, 2, 4, mode, max_length=8)).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)

    def heads(matrix: torch.Tensor) -> torch.Tensor:
        return (x @ matrix).unflatten(2, (2, 4)).transpose(1, 2)

    def output(weights: torch.Tensor) -> torch.Tensor:
        return (weights @ heads(block.v)).transpose(1, 2).flatten(2) @ block.o

    products = heads(block.q) @ heads(block.k).transpose(2, 3)  # not divided by sqrt(d_kv)
    if mode == "random_plus_alpha":
        synthetic = block.R[:7, :, :7].transpose(0, 1)
    else:
        synthetic = (heads(block.q).relu() @ block.pi)[..., :7]
    for alpha, energies in ((-100.0, products), (100.0, synthetic), (0.0, (products + synthetic) / 2)):
        with torch.no_grad():
            block.alpha.fill_(alpha)
        assert torch.allclose(block(x), output(energies.softmax(dim=-1)), atol=1e-12)


def test_alpha_costs_nothing_in_the_graph() -> None:
    x = torch.randn(1, 8, 6)
    for mode in ("random_plus_alpha", "dense_plus_alpha"):
        names = []
        for chosen in (mode, mode.removesuffix("_alpha")):
            block = randomise(MultiHeadSynthesizer(6, 2, 4, chosen, max_length=8))
            names.append(sorted(operators(to_onnx(block, (x,), input_names=["x"], output_names=["y"]))))
        assert names[0] == names[1]
        assert "Mul" not in names[0]


@pytest.mark.parametrize("mode", HEAD_MODES)
def test_masked_positions_have_no_influence(mode: str) -> None:
    block = randomise(MultiHeadSynthesizer(6, 2, 4, mode, max_length=8)).double()
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    loud = x.clone()
    loud[:, 5:] = 50.0
    mask = torch.arange(7)[None] >= 5
    assert torch.allclose(block(x, mask)[:, :5], block(loud, mask)[:, :5])


def test_shorter_inputs_see_the_corner_of_the_table() -> None:
    block = randomise(MultiHeadSynthesizer(6, 2, 4, "factorized", max_length=8, rank=3)).double()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    table = torch.einsum("thi,thj->hij", block.R1, block.R2)[:, :3, :3]
    value = (x @ block.kv).unflatten(2, (2, 4)).transpose(1, 2)
    assert torch.allclose(block(x), (table.softmax(dim=2) @ value).transpose(1, 2).flatten(2) @ block.o)


def test_mesh_tensorflow_names_load() -> None:
    scope = "encoder/block_003/layer_000/SelfAttention/"
    for mode in HEAD_MODES:
        block = MultiHeadSynthesizer(6, 2, 4, mode, max_length=8)
        published = {scope + key.replace("pi", "pi/kernel"): value for key, value in block.state_dict().items()}
        report = load_checkpoint(block, published, key_map=BLOCKS.get("synthesizer-heads").variant("official").key_map)
        assert not report.missing
        assert not report.unexpected


def test_layer_merges_the_query_into_the_first_layer_of_the_energies() -> None:
    layer = randomise(DenseSynthesizerLayer(8, 2, 6, 64, 5))
    x = torch.randn(2, 8, 6)
    prepared = prepare_for_export(layer)
    assert "w_qs.weight" in layer.state_dict()
    assert "w_qs.weight" not in prepared.state_dict()
    assert torch.allclose(prepared(x)[0], layer(x)[0], atol=1e-5)
    before, after = (sum(value.numel() for value in module.parameters()) for module in (layer, prepared))
    assert after < before
    model = to_onnx(layer, (x,), input_names=["x"], output_names=["y", "weights"])
    assert operators(model).count("MatMul") == 5


def test_layer_normalises_the_sum_with_its_input() -> None:
    layer = randomise(DenseSynthesizerLayer(8, 2, 6, 4, 5)).double()
    with torch.no_grad():
        layer.fc.weight.zero_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    norm = layer.layer_norm
    assert torch.allclose(layer(x)[0], F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-6))


def test_layer_of_a_whole_model_loads() -> None:
    layer = DenseSynthesizerLayer(8, 2, 6, 4, 5)
    published = {f"encoder.layer_stack.0.slf_attn.{key}": value for key, value in layer.state_dict().items()}
    report = load_checkpoint(layer, published, key_map=BLOCKS.get("synthesizer-10zin").variant("dense").key_map)
    assert not report.missing
    assert not report.unexpected


@pytest.mark.parametrize(
    "block",
    [Synthesizer(6, 4), MultiHeadSynthesizer(6, 2, 4, max_length=4), DenseSynthesizerLayer(4, 2, 6, 4, 5)],
    ids=["single", "heads", "layer"],
)
def test_inputs_beyond_the_tables_are_refused(block: nn.Module) -> None:
    with pytest.raises(UserError, match="at most 4 positions, got 5"):
        block(torch.zeros(1, 5, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_dims": 0, "sentence_length": 8}, "in_dims=0"),
        ({"in_dims": 5, "sentence_length": 8, "mode": "sparse"}, "mode='sparse'.*factorized_dense"),
        ({"in_dims": 5, "sentence_length": 9, "mode": "factorized_dense"}, "a=4.*divide sentence_length=9"),
        ({"in_dims": 5, "sentence_length": 8, "softmax": False}, "mode='random'"),
        ({"in_dims": 5, "sentence_length": 8, "tile_both": True}, "factorized_dense"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthesizer(**arguments)


def test_wrong_arguments_of_heads_and_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mode='dense'.*dense_minus"):
        MultiHeadSynthesizer(6, 2, 4, "dense")
    with pytest.raises(ValueError, match="num_heads=0"):
        MultiHeadSynthesizer(6, 0, 4)
    with pytest.raises(ValueError, match="d_hid=0"):
        DenseSynthesizerLayer(8, 2, 6, 4, 5, d_hid=0)
