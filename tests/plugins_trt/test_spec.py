"""Plugin declarations: the standard-op bodies compute what the torch cores compute, in any runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from edgeattn.blocks import AttentionCore
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PLUGINS, PluginSpec, spec_of
from edgeattn.plugins_trt.onnx_form import local_function

SIZES = {
    "batch": 2,
    "channels": 6,
    "head_channels": 4,
    "height": 5,
    "width": 7,
    "height_a": 3,
    "width_a": 5,
    "height_b": 4,
    "width_b": 2,
    "queries": 9,
    "keys": 8,
}
plugins = pytest.mark.parametrize("spec", list(PLUGINS), ids=lambda spec: spec.name)


def example(spec: PluginSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {t.name: rng.standard_normal(spec.shape_of(t, SIZES)).astype(np.float32) for t in spec.inputs}


def core_of(spec: PluginSpec) -> AttentionCore:
    (core,) = [core for core in AttentionCore.__subclasses__() if core.op_type == spec.op_type]
    return core()


@plugins
@pytest.mark.parametrize("opset", [18, 20, 22])
@pytest.mark.parametrize("fp32_island", [False, True])
def test_body_equals_torch_core(one_node_model: Callable, spec: PluginSpec, opset: int, fp32_island: bool) -> None:
    model = one_node_model(spec, TensorProto.FLOAT, opset, SIZES, fp32_island=fp32_island)
    onnx.checker.check_model(model, full_check=True)
    feed = example(spec)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = core_of(spec)(*(torch.from_numpy(value) for value in feed.values()))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for actual, wanted in zip(session.run(None, feed), expected, strict=True):
        assert actual.shape == wanted.shape
        assert np.linalg.norm(actual - wanted.numpy()) <= 1e-6 * np.linalg.norm(wanted.numpy())


@plugins
def test_half_body_keeps_the_softmax_path_in_fp32(one_node_model: Callable, spec: PluginSpec) -> None:
    model = one_node_model(spec, TensorProto.FLOAT16, 18, SIZES, fp32_island=True)
    inlined = onnx.inliner.inline_local_functions(model)
    shaped = onnx.shape_inference.infer_shapes(inlined, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in shaped.graph.value_info}
    softmaxes = [node for node in inlined.graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for node in softmaxes:
        assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
    first_product = next(node for node in inlined.graph.node if node.op_type == "MatMul")
    assert types[first_product.output[0]] == TensorProto.FLOAT
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@plugins
def test_formal_names_cannot_meet_names_of_a_graph(spec: PluginSpec) -> None:
    function = local_function(spec, 18)
    names = {*function.input, *function.output, *(name for node in function.node for name in node.output)}
    assert all(name.startswith(f"__edgeattn_{spec.name}_") for name in names)
    assert all("" not in list(node.input) for node in function.node)


def test_operations_are_told_apart_by_their_inputs() -> None:
    assert spec_of("CoAttention", 4).name == "CoAttention"
    assert spec_of("CoAttention", 6).name == "CoAttentionGated"
    with pytest.raises(UserError, match="CoAttention with 5 inputs"):
        spec_of("CoAttention", 5)
