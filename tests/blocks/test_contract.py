"""The contract that every registered block keeps, whatever it computes."""

from __future__ import annotations

import importlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgeattn.blocks import BLOCKS, AttentionCore, BlockSpec
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.validation.randomise import randomise

SIZES = [(5, 7), (8, 3), (1, 6), (6, 1), (1, 1)]
# What the table of TensorRT's parser takes and these blocks need; anything new deserves a look at that table.
OPERATORS = {
    *("Add", "Cast", "Concat", "Conv", "Div", "Equal", "Expand", "Gather", "LeakyRelu", "MatMul", "Mul", "Range"),
    *("Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Squeeze", "Transpose", "Unsqueeze", "Where", "Sub"),
    *("BatchNormalization",),
}

blocks = pytest.mark.parametrize("spec", list(BLOCKS), ids=lambda spec: spec.name)


def build_pair(spec: BlockSpec) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a randomised block and its original with the same state."""
    block = randomise(spec.build(**spec.test_preset), seed=3)
    module, name = spec.original.split(":")
    original = getattr(importlib.import_module(module), name)(**spec.test_preset)
    original.load_state_dict(block.state_dict(), strict=True)
    return block, original.eval()


def run(spec: BlockSpec, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = getattr(module, spec.method)(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


@blocks
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_block_equals_original(spec: BlockSpec, dtype: torch.dtype, limit: float) -> None:
    block, original = (module.to(dtype) for module in build_pair(spec))
    for batch, (height, width) in zip((1, 3, 2, 1, 2), SIZES, strict=True):
        inputs = tuple(
            tensor.to(dtype) for tensor in spec.example_inputs(spec.test_preset, batch, height, width, seed=height)
        )
        for actual, expected in zip(run(spec, block, inputs), run(spec, original, inputs), strict=True):
            assert actual.shape == expected.shape
            assert relative_l2(actual, expected) <= limit, (batch, height, width)


@blocks
def test_prepared_block_computes_the_same_and_leaves_the_trained_one_alone(spec: BlockSpec) -> None:
    block, _ = build_pair(spec)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    inputs = spec.example_inputs(spec.test_preset, 2, 5, 7)
    prepared = prepare_for_export(block)
    for actual, expected in zip(run(spec, prepared, inputs), run(spec, block, inputs), strict=True):
        assert relative_l2(actual, expected) <= 1e-6
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@blocks
def test_declared_plugin_is_what_the_block_holds(spec: BlockSpec) -> None:
    held = {module.op_type for module in spec.build(**spec.test_preset).modules() if isinstance(module, AttentionCore)}
    assert (spec.plugin in held) if spec.plugin else not held


@blocks
def test_published_preset_builds(spec: BlockSpec) -> None:
    with torch.device("meta"):
        spec.build(**spec.published_preset)


def export(spec: BlockSpec, block: torch.nn.Module, *, dynamic: bool) -> onnx.ModelProto:
    inputs = spec.example_inputs(spec.test_preset, 2, 5, 7)
    outputs = run(spec, block, inputs)
    return to_onnx(
        block,
        inputs,
        input_names=[f"input_{index}" for index in range(len(inputs))],
        output_names=[f"output_{index}" for index in range(len(outputs))],
        dynamic_axes=spec.dynamic_axes if dynamic else None,
        method=spec.method,
    )


def check_against_torch(spec: BlockSpec, block: torch.nn.Module, model: onnx.ModelProto, shapes: list[tuple]) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, height, width in shapes:
        inputs = spec.example_inputs(spec.test_preset, batch, height, width, seed=width)
        feed = {f"input_{index}": tensor.numpy() for index, tensor in enumerate(inputs)}
        for actual, expected in zip(session.run(None, feed), run(spec, block, inputs), strict=True):
            assert actual.shape == expected.shape
            assert relative_l2(torch.from_numpy(actual), expected) <= 1e-5, (batch, height, width)


@blocks
def test_dynamic_export_runs_at_other_sizes(spec: BlockSpec) -> None:
    block, _ = build_pair(spec)
    model = export(spec, block, dynamic=True)
    shapes = [(2, 5, 7), (1, 9, 4), (3, 3, 11), (1, 1, 5)]
    check_against_torch(spec, block, model, shapes)
    check_against_torch(spec, block, inline_plugins(model), shapes)


@pytest.mark.parametrize(
    "spec",
    [BLOCKS.get(name) for name in ("rcca", "co-attention-vanilla-gated", "co-attention-symmetric-gated-group")],
    ids=lambda spec: spec.name,
)
def test_static_export_is_lean(spec: BlockSpec) -> None:
    block, _ = build_pair(spec)
    model = export(spec, block, dynamic=False)
    assert spec.plugin in {node.op_type for node in model.graph.node if node.domain == "edgeattn"}
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        assert scopes, f"{node.name} has lost its module path"
        assert "_Selected" not in scopes
        assert "model." not in scopes
    plain = inline_plugins(model)
    check_against_torch(spec, block, plain, [(2, 5, 7)])
    found = {node.op_type for node in plain.graph.node}
    assert found <= OPERATORS, found - OPERATORS
    assert not found & {"Shape", "Range", "Equal", "Einsum", "Loop", "NonZero"}
    for initializer in plain.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        assert values.dtype.kind != "f" or np.isfinite(values).all(), f"{initializer.name} holds infinities"


@pytest.mark.parametrize("spec", [BLOCKS.get("criss-cross")], ids=["criss-cross"])
def test_nothing_quadratic_in_the_positions_is_stored(spec: BlockSpec) -> None:
    block, _ = build_pair(spec)
    plain = inline_plugins(export(spec, block, dynamic=False))
    shaped = onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    batch, height, width = 2, 5, 7
    channels = spec.test_preset["in_dim"]
    limit = batch * height * width * max(height + width, channels)
    largest = max(
        int(np.prod([dim.dim_value for dim in value.type.tensor_type.shape.dim])) for value in shaped.graph.value_info
    )
    assert largest <= limit
