"""Recurrent units beyond the common contract."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.blocks.recurrent import GRU, LSTM, GRUCell, LSTMCell
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def exported(block: nn.Module, *inputs: torch.Tensor, outputs: int) -> onnx.ModelProto:
    names = ["x", "h", "c"]
    return to_onnx(block, inputs, input_names=names[: len(inputs)], output_names=["y", "z", "w"][:outputs])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps-first", "batch-first"])
@pytest.mark.parametrize(("build", "published"), [(LSTM, nn.LSTM), (GRU, nn.GRU)], ids=["lstm", "gru"])
def test_state_and_results_are_those_of_torch(
    build: type, published: type, batch_first: bool, bidirectional: bool, layers: int
) -> None:
    for bias, unrolled, shape in ((True, False, (4, 3, 5)), (False, True, (1, 2, 5)), (True, True, (2, 1, 5))):
        arguments = {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        twin = published(5, 6, **arguments).double()
        block = build(5, 6, **arguments, unrolled=unrolled).double()
        block.load_state_dict(twin.state_dict(), strict=True)
        x = torch.randn(shape, dtype=torch.float64)
        h, *c = torch.randn(2, layers * (1 + bidirectional), shape[0 if batch_first else 1], 6, dtype=torch.float64)
        state = (h, *c) if build is LSTM else (h,)
        for initial in ((), state):
            given = () if not initial else (initial if build is LSTM else h,)
            outputs, last = twin(x, *given)
            expected = (outputs, *last) if build is LSTM else (outputs, last)
            for actual, wanted in zip(block(x, *initial), expected, strict=True):
                assert torch.allclose(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("build", "published"), [(LSTMCell, nn.LSTMCell), (GRUCell, nn.GRUCell)])
def test_cells_are_those_of_torch(build: type, published: type) -> None:
    for bias in (True, False):
        twin = published(5, 6, bias=bias).double()
        cell = build(5, 6, bias).double()
        cell.load_state_dict(twin.state_dict(), strict=True)
        x, h, c = (torch.randn(3, size, dtype=torch.float64) for size in (5, 6, 6))
        if build is LSTMCell:
            assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(cell(x, h, c), twin(x, (h, c)), strict=True))
        else:
            assert torch.allclose(cell(x, h), twin(x, h), rtol=1e-12)


@pytest.mark.parametrize(("build", "outputs"), [(LSTM, 3), (GRU, 2)])
def test_each_layer_is_one_node_within_the_limits_of_tensorrt(build: type, outputs: int) -> None:
    block = build(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    model = exported(block, torch.randn(2, 4, 5), outputs=outputs)
    nodes = [node for node in model.graph.node if node.op_type == build.__name__]
    assert len(nodes) == 2
    assert set(operators(model)) <= {build.__name__, "Transpose", "Reshape", "Concat"}
    for node in nodes:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        assert attributes.pop("direction") == b"bidirectional"
        assert attributes.pop("hidden_size") == 6
        assert attributes == ({} if build is LSTM else {"linear_before_reset": 1})
        assert len(node.input) == 4, "zeros need no initial state"


def test_gates_change_their_order_on_the_way_to_onnx() -> None:
    block = randomise(LSTM(3, 2))
    model = exported(block, torch.randn(2, 1, 3), outputs=3)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == "LSTM")
    i, f, g, o = block.weight_ih_l0.detach().numpy().reshape(4, 2, 3)
    assert np.array_equal(held[node.input[1]][0], np.concatenate([i, o, f, g]))
    b = block.bias_hh_l0.detach().numpy().reshape(4, 2)
    assert np.array_equal(held[node.input[3]][0, 8:], b[[0, 3, 1, 2]].ravel())


def test_the_forget_gate_has_no_offset() -> None:
    cell = LSTMCell(1, 1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
    _, c = cell(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    assert c.item() == 0.5


def test_reset_gate_multiplies_the_product_with_its_bias() -> None:
    cell = GRUCell(1, 1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias_ih[:2] = torch.tensor([0.0, -50.0])  # r = 1 / 2, z = 0
        cell.bias_hh[2] = 1.0
    assert cell(torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(np.tanh(0.5))


def test_backward_direction_begins_at_the_end() -> None:
    block = randomise(GRU(2, 3, bidirectional=True))
    x = torch.randn(5, 1, 2)
    other = torch.cat([torch.randn(4, 1, 2), x[4:]])
    outputs, last = block(x)
    assert torch.equal(outputs[4, :, 3:], block(other)[0][4, :, 3:])
    assert not torch.equal(outputs[4, :, :3], block(other)[0][4, :, :3])
    assert torch.equal(last[1], outputs[0, :, 3:])


def test_cell_merges_both_products() -> None:
    model = exported(LSTMCell(5, 6), torch.randn(2, 5), torch.randn(2, 6), torch.randn(2, 6), outputs=2)
    assert operators(model).count("Gemm") == 1
    assert operators(model).count("Sigmoid") == 1
    held = sum(np.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    assert held == 24 * (5 + 6) + 24


def test_cell_state_survives_thousands_of_fp16_steps() -> None:
    """All gates open and the candidate 1: the cell counts, and FP16 cannot count beyond 2048."""
    cell = LSTMCell(1, 2)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias_ih[:6] = 20.0
    steps, x, h, c = 3000, torch.zeros(1, 1), torch.zeros(1, 2), torch.zeros(1, 2)
    model = emulate_fp16(to_fp16(exported(cell, x, h, c, outputs=2)).model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy(), "h": h.numpy(), "c": c.numpy()}
    naive = c.half()
    for _ in range(steps):
        feed["h"], feed["c"] = session.run(None, feed)
        naive = naive + 1
    assert np.allclose(feed["c"], steps)
    assert naive.max() == 2048


@pytest.mark.parametrize("build", [LSTM, GRU])
def test_nodes_run_in_fp16(build: type) -> None:
    model = exported(build(5, 6), torch.randn(4, 2, 5), outputs=1 + build.unit.states)
    assert not to_fp16(model).fp32_nodes


def test_gradients_reach_every_parameter() -> None:
    block = LSTM(3, 4, num_layers=2, bidirectional=True)
    block(torch.randn(3, 2, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("shape", [(4, 5), (4, 2, 6), (0, 2, 5)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    message = "at least one step" if 0 in shape else "5 features"
    with pytest.raises(UserError, match=message):
        LSTM(5, 6)(torch.zeros(shape))


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
def test_empty_blocks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        GRU(**({"input_size": 3, "hidden_size": 3} | {name: 0}))


@pytest.mark.parametrize("name", ["input_size", "hidden_size"])
def test_empty_cells_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: LSTMCell"):
        LSTMCell(**({"input_size": 3, "hidden_size": 3} | {name: 0}))


@pytest.mark.parametrize(
    ("unit", "size", "message"), [(GRU, 2, "only an LSTM"), (LSTM, 3, "1 to 2"), (LSTM, -1, "1 to 2")]
)
def test_impossible_projections_are_refused(unit: type[GRU | LSTM], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit(3, 3, proj_size=size)


def test_a_projected_node_has_the_product_as_its_recurrence() -> None:
    model = to_onnx(LSTM(5, 6, proj_size=4), (torch.randn(3, 2, 5),), input_names=["x"], output_names=["y", "h", "c"])
    node = next(node for node in model.graph.node if node.op_type == "LSTM")
    recurrence = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
    assert list(recurrence.dims) == [1, 24, 6]
