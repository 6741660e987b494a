"""FP16 emulation against torch's own half precision, and what ONNX Runtime does to it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeattn.export.emulation import emulate_fp16
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import spec_of
from edgeattn.plugins_trt.onnx_form import local_function

LEVELS = [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]


def parse(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def run(
    model: onnx.ModelProto, level: ort.GraphOptimizationLevel | None = None, **inputs: np.ndarray
) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


# The parser takes float16 literals as bit patterns: 10854 is 0.05, 11878 is 0.1.
assert np.uint16([10854, 11878]).view(np.float16).tolist() == np.float16([0.05, 0.1]).tolist()


def half(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float16)


def test_overflow_that_onnx_runtime_hides() -> None:
    model = parse(
        "net (float16[1] x) => (float16[1] y) { t = Mul (x, a)  y = Mul (t, b) }",
        a=np.float16([300]),
        b=np.float16([0.001]),
    )
    direct = run(model, x=np.float16([300]))[0]
    assert np.isfinite(direct).all()  # the reason for this module; when it fails, ONNX Runtime has learnt to round
    emulated = emulate_fp16(model)
    assert np.isposinf(run(emulated, x=np.float32([300]))[0]).all()  # at the default level
    assert np.isposinf((torch.tensor([300.0]).half() * 300 * torch.tensor(0.001).half()).numpy()).all()


@pytest.mark.parametrize("level", LEVELS)
def test_chain_equals_torch_half(level: ort.GraphOptimizationLevel) -> None:
    rng = np.random.default_rng(0)
    weight, bias = half(rng, 8, 3, 3, 3), half(rng, 8)
    model = parse(
        """net (float16[1,3,6,6] x) => (float16[1,8,16] y, float16[1,16,16] s) {
            c = Conv (x, w, b)  r = Relu (c)  shape = Constant <value = int64[3] {1, 8, 16}> ()
            f = Reshape (r, shape)  t = Transpose <perm = [0, 2, 1]> (f)  e = MatMul (t, f)
            k = Constant <value = float16 {10854}> ()  m = Mul (e, k)
            s = Softmax <axis = -1> (m)  y = MatMul (f, s) }""",
        w=weight,
        b=bias,
    )
    x = half(rng, 1, 3, 6, 6)
    flat = torch.relu(torch.conv2d(*map(torch.from_numpy, (x, weight, bias)))).reshape(1, 8, 16)
    attention = torch.softmax((flat.mT @ flat) * torch.tensor(0.05).half(), -1)
    emulated = emulate_fp16(model)
    y, s = run(emulated, level, x=x.astype(np.float32))
    assert y.dtype == np.float32
    # Both round each result once; sums in another order may move a result to the neighbouring FP16 number, and two
    # more operators may carry that on: three FP16 steps of 2^-10.
    np.testing.assert_allclose(s, attention.float().numpy(), rtol=3 * 2.0**-10, atol=1e-6)
    np.testing.assert_allclose(y, (flat @ attention).float().numpy(), rtol=3 * 2.0**-10, atol=1e-3)
    for output in (y, s):
        assert np.array_equal(output, output.astype(np.float16).astype(np.float32))  # FP16 numbers only
    direct = run(model, level, x=x)[0].astype(np.float32)
    assert np.abs(y - (flat @ attention).float().numpy()).sum() < np.abs(y - direct).sum()


@given(
    st.lists(st.floats(width=16, allow_subnormal=True), min_size=4, max_size=4),
    st.sampled_from(["Add", "Mul", "Sub", "Div"]),
)
@settings(max_examples=40, deadline=None)
def test_single_operations_are_exact(numbers: list[float], op: str) -> None:
    """FP32 holds sums and products of two FP16 numbers closely enough that rounding its result is rounding once."""
    model = parse(f"net (float16[2] a, float16[2] b) => (float16[2] y) {{ y = {op} (a, b) }}")
    a, b = np.float16(numbers[:2]), np.float16(numbers[2:])
    with np.errstate(all="ignore"):
        expected = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract, "Div": np.divide}[op](a, b)
    (y,) = run(emulate_fp16(model), a=a.astype(np.float32), b=b.astype(np.float32))
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_nan_from_infinite_energies() -> None:
    model = parse("net (float16[2,2] x) => (float16[2,2] y) { e = MatMul (x, x)  y = Softmax <axis = -1> (e) }")
    (y,) = run(emulate_fp16(model), x=np.float32([[300, 300], [300, 300]]))
    assert np.isnan(y).all()


def test_fp32_islands_are_untouched() -> None:
    model = parse(
        """net (float16[2] x) => (float16[2] y) {
            w = Cast <to = 1> (x)  e = Mul (w, w)  f = Sqrt (e)  y = Cast <to = 10> (f) }"""
    )
    emulated = emulate_fp16(model)
    np.testing.assert_array_equal(run(emulated, x=np.float32([300, 2]))[0], np.float32([300, 2]))
    island = {"Mul": 1, "Sqrt": 1}
    counts = {op: sum(node.op_type == op for node in emulated.graph.node) for op in island}
    assert counts == island
    narrowed = [node.input[0] for node in emulated.graph.node if node.op_type == "Cast" and node.attribute[0].i == 10]
    assert narrowed == ["y_exact"]


@pytest.mark.parametrize("level", LEVELS)
def test_quantisation_with_fp16_scales(level: ort.GraphOptimizationLevel) -> None:
    model = parse(
        """net (float16[64] x) => (float16[64] y, int8[64] q) {
            q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  y = Mul (d, k) }""",
        s=np.float16(0.0123),
        z=np.int8(0),
        k=np.float16(1.1),
    )
    x = (np.random.default_rng(1).standard_normal(64)).astype(np.float16)
    y, q = run(emulate_fp16(model), level, x=x.astype(np.float32))
    scale = np.float32(np.float16(0.0123))
    levels = np.clip(np.rint(x.astype(np.float32) / scale), -128, 127)
    np.testing.assert_array_equal(q, levels)
    dequantised = (levels * scale).astype(np.float16)
    np.testing.assert_array_equal(y, (dequantised * np.float16(1.1)).astype(np.float32))


def test_attributes_constants_and_casts() -> None:
    model = parse(
        """net (float16[2] x) => (float16[2] y) {
            shape = Constant <value = int64[1] {2}> ()
            c = ConstantOfShape <value = float16[1] {11878}> (shape)
            i = Constant <value = int64[2] {4097, 70000}> ()
            n = CastLike (i, x)  a = Add (x, c)  y = Add (a, n) }"""
    )
    tenth = np.float32(np.float16(0.1))
    (y,) = run(emulate_fp16(model), x=np.float32([0, 0]))
    np.testing.assert_array_equal(y, [np.float16(4096 + tenth), np.inf])


def test_functions_names_and_metadata() -> None:
    names = ["query", "key", "value", "residual"]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", 4, "H", "W"]) for name in names]
    node = helper.make_node("CrissCrossAttention", names, ["out"], name="core", domain="edgeattn")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'cca', 'core']")
    graph = helper.make_graph(
        [node], "net", infos, [helper.make_tensor_value_info("out", TensorProto.FLOAT16, ["B", 4, "H", "W"])]
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    function = local_function(spec_of("CrissCrossAttention", 4), 18, fp32_island=True)
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    before = model.SerializeToString()
    emulated = emulate_fp16(model)
    assert model.SerializeToString() == before
    assert not emulated.functions
    assert emulated.ir_version == 10
    assert [info.type.tensor_type.elem_type for info in emulated.graph.input] == [TensorProto.FLOAT] * 4
    assert [info.name for info in emulated.graph.output] == ["out"]
    rng = np.random.default_rng(0)
    inputs = {name: half(rng, 2, 4, 5, 3) for name in names}
    (output,) = run(emulated, **{name: array.astype(np.float32) for name, array in inputs.items()})
    (reference,) = run(model, **inputs)
    assert np.linalg.norm(output - reference) / np.linalg.norm(output) < 2e-3
    assert emulate_fp16(model).SerializeToString() == emulated.SerializeToString()


def test_fp16_inside_control_flow_is_refused() -> None:
    model = parse(
        """net (float16[2] x, bool c) => (float16[2] y) {
            y = If (c) <then_branch = t () => (float16[2] p) { p = Add (x, x) },
                        else_branch = e () => (float16[2] q) { q = Identity (x) }> }"""
    )
    with pytest.raises(UserError, match="Loop"):
        emulate_fp16(model)


def test_fp32_model_is_left_alone() -> None:
    model = parse("net (float[2] x) => (float[2] y) { t = Relu (x)  y = Mul (t, t) }")
    assert [node.op_type for node in emulate_fp16(model).graph.node] == ["Relu", "Mul"]
