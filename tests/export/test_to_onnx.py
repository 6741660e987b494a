"""Export: names, axes, folding, and errors."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.blocks import ABN, CrissCrossAttention
from edgeattn.blocks.fixed_size import require_static
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


class TwoInputs(nn.Module):
    """A network with two inputs, three outputs and a convolution with ABN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), ABN(8))
        self.attention = CrissCrossAttention(8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.attention(self.stem(a)), self.stem(b), a - b


@pytest.fixture(scope="module")
def exported() -> tuple[TwoInputs, onnx.ModelProto]:
    model = randomise(TwoInputs())
    same = torch.randn(1, 3, 5, 6)
    # The very same tensor for both inputs must not merge them.
    proto = to_onnx(model, [same, same], input_names=["a", "b"], output_names=["x", "z"], outputs=[0, 2], opset=20)
    return model, proto  # type: ignore[return-value]


def test_chosen_outputs_of_distinct_inputs(exported: tuple[TwoInputs, onnx.ModelProto]) -> None:
    model, proto = exported
    assert [value.name for value in proto.graph.input] == ["a", "b"]
    assert [value.name for value in proto.graph.output] == ["x", "z"]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    a, b = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        expected = model(a, b)
    for actual, wanted in zip(session.run(None, {"a": a.numpy(), "b": b.numpy()}), expected[::2], strict=True):
        assert torch.allclose(torch.from_numpy(actual), wanted, atol=1e-5)


def test_versions_and_folding(exported: tuple[TwoInputs, onnx.ModelProto]) -> None:
    _, proto = exported
    assert proto.ir_version == 10
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 20, "edgeattn": 1}
    assert {entry.domain: entry.version for function in proto.functions for entry in function.opset_import} == {"": 20}
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_module_paths_are_the_users_own(exported: tuple[TwoInputs, onnx.ModelProto]) -> None:
    _, proto = exported
    (core,) = [node for node in proto.graph.node if node.domain == "edgeattn"]
    scopes = {entry.key: entry.value for entry in core.metadata_props}["pkg.torch.onnx.name_scopes"]
    assert scopes.startswith("['', 'attention', 'attention.core'")


def test_nested_preparation_leaves_the_model_alone() -> None:
    model = randomise(TwoInputs())
    prepared = prepare_for_export(model)
    assert isinstance(model.stem[1], ABN)
    assert not any(isinstance(module, ABN) for module in prepared.modules())
    assert model.attention.gamma is not None
    assert prepared.attention.gamma is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 23}, "opset 23"),
        ({"opset": 17}, "opset 17"),
        ({"input_names": ["a"]}, "1 input names"),
        ({"output_names": ["x"]}, "2 outputs"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict, message: str) -> None:
    example = torch.randn(1, 3, 5, 6)
    arguments = {"input_names": ["a", "b"], "output_names": ["x", "z"], "outputs": [0, 2], **changes}
    with pytest.raises(UserError, match=message):
        to_onnx(TwoInputs().eval(), [example, example], **arguments)


class FixedHeight(nn.Module):
    """Refuses a dynamic height, which the exporter's second way of tracing would not notice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        require_static("the demonstration", "height", x.shape[2], "it is fixed by a weight")
        return x + x.shape[2]


def test_a_refused_dynamic_axis_is_an_error_and_not_a_wrong_graph() -> None:
    x = torch.randn(2, 3, 5, 6)
    names = {"input_names": ["x"], "output_names": ["y"]}
    with pytest.raises(UserError, match="height of the demonstration cannot be dynamic: it is fixed by a weight"):
        to_onnx(FixedHeight(), [x], **names, dynamic_axes=[{2: "height"}])
    assert to_onnx(FixedHeight(), [x], **names, dynamic_axes=[{0: "batch", 3: "width"}])


class NearNothing(nn.Module):
    """Operations that the exporter's optimiser takes for none, and some that are none."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x / (x.abs().sum() + 1e-12), x * 1.000004, x / 0.999996, (x - 3e-9) * 2, (x + 0.0) * 1.0 / 3.0


def test_small_constants_are_not_optimised_away() -> None:
    x = torch.zeros(2, 3)
    names = [f"y{index}" for index in range(5)]
    proto = to_onnx(NearNothing(), [x], input_names=["x"], output_names=names)
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("Mul") + operators.count("Div") == 5  # the last output keeps its division only
    assert operators.count("Add") + operators.count("Sub") == 2
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for actual, expected in zip(session.run(None, {"x": x.numpy()}), NearNothing()(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-7, atol=0)
