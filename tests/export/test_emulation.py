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

from edgeattn.export.accumulation import ACCUMULATION_BLOCK
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


# ---------------------------------------------------------------------------------------------------------------- BF16


def test_bf16_equals_torch() -> None:
    """BF16 results of single operations and of a product, at the default optimisation level."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((6, 40)).astype(np.float32)).bfloat16() for _ in range(2))
    model = parse(
        "net (bfloat16[6,40] a, bfloat16[6,40] b) => (bfloat16[6,40] s, bfloat16[6,6] m)"
        "{ p = Mul (a, b)  s = Add (p, b)  t = Transpose (b)  m = MatMul (a, t) }"
    )
    s, m = run(emulate_fp16(model), a=a.float().numpy(), b=b.float().numpy())
    np.testing.assert_array_equal(s, (a * b + b).float().numpy())
    # Sums in another order may round to the neighbour.
    np.testing.assert_allclose(m, (a @ b.T).float().numpy(), rtol=2.0**-7, atol=1e-3)


# -------------------------------------------------------------------------------------------------- FP16 accumulation

UNIFORM = np.random.default_rng(5)


def uniform(*shape: int) -> np.ndarray:
    """Numbers from 0 to 1, so that running totals grow; FP16 numbers."""
    return UNIFORM.uniform(0, 1, shape).astype(np.float16)


def totals(left: np.ndarray, right: np.ndarray, block: int = ACCUMULATION_BLOCK) -> np.ndarray:
    """Return a product whose running total is rounded to FP16 after every block, as numpy adds up."""
    total = np.zeros((), np.float16)
    for start in range(0, left.shape[-1], block):
        terms = slice(start, start + block)
        partial = left[..., terms].astype(np.float32) @ right[..., terms, :].astype(np.float32)
        total = (total.astype(np.float32) + partial).astype(np.float16)
    return total.astype(np.float32)


@pytest.mark.parametrize("level", LEVELS)
def test_products_accumulate_in_fp16(level: ort.GraphOptimizationLevel) -> None:
    a, b = uniform(3, 5, 100), uniform(100, 7)
    model = parse("net (float16[3,5,100] a, float16[100,7] b) => (float16[3,5,7] y) { y = MatMul (a, b) }")
    inputs = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    (rounded,) = run(emulate_fp16(model, accumulation=ACCUMULATION_BLOCK), level, **inputs)
    np.testing.assert_array_equal(rounded, totals(a, b))
    assert np.abs(rounded - run(emulate_fp16(model), level, **inputs)[0]).max() > 0
    (whole,) = run(emulate_fp16(model, accumulation=100), level, **inputs)
    np.testing.assert_array_equal(whole, run(emulate_fp16(model), level, **inputs)[0])


@pytest.mark.parametrize(("transposed", "alpha", "beta"), [(0, 1.0, 1.0), (1, 0.5, 2.0)])
def test_general_products_accumulate_in_fp16(transposed: int, alpha: float, beta: float) -> None:
    a, b, c = uniform(4, 50), uniform(50, 6), uniform(6)
    given = b.T.copy() if transposed else b
    model = parse(
        f"net (float16[4,50] a) => (float16[4,6] y)"
        f"{{ y = Gemm <transB = {transposed}, alpha = {alpha}, beta = {beta}> (a, b, c) }}",
        b=given,
        c=c,
    )
    (rounded,) = run(emulate_fp16(model, accumulation=16), a=a.astype(np.float32))
    expected = totals((a.astype(np.float32) * alpha), b) + np.float32(beta) * c.astype(np.float32)
    np.testing.assert_array_equal(rounded, expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("channels", "kernel", "groups"), [(40, 1, 1), (12, 3, 1), (80, 1, 2), (24, 3, 2)])
def test_convolutions_accumulate_in_fp16(channels: int, kernel: int, groups: int) -> None:
    x, weight, bias = uniform(2, channels, 5, 4), uniform(6, channels // groups, kernel, kernel), uniform(6)
    pad = kernel // 2
    model = parse(
        f"net (float16[2,{channels},5,4] x) => (float16[2,6,5,4] y)"
        f"{{ y = Conv <group = {groups}, pads = [{pad}, {pad}, {pad}, {pad}]> (x, w, b) }}",
        w=weight,
        b=bias,
    )
    (rounded,) = run(emulate_fp16(model, accumulation=16), x=x.astype(np.float32))
    step, inside = max(1, 16 // kernel**2), channels // groups
    total = torch.zeros(2, 6, 5, 4)
    for start in range(0, inside, step):
        chosen = [
            group * inside + place for group in range(groups) for place in range(start, min(start + step, inside))
        ]
        block = torch.from_numpy(x[:, chosen].astype(np.float32))
        part = torch.from_numpy(weight[:, start : start + step].astype(np.float32))
        total = (total + torch.conv2d(block, part, padding=pad, groups=groups)).half().float()
    expected = (total + torch.from_numpy(bias.astype(np.float32))[:, None, None]).half().float().numpy()
    # Within a block the order of FP32 sums differs, which may tip a rounding.
    np.testing.assert_allclose(rounded, expected, rtol=2.0**-10)
    assert np.mean(rounded == expected) > 0.95


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("ReduceSum <keepdims = 0> (x, axes)", "2,3"),
        ("ReduceMean <keepdims = 1> (x, axes)", "2,3,1,1"),
        ("GlobalAveragePool (x)", "2,3,1,1"),
    ],
)
def test_reductions_accumulate_in_fp16(node: str, shape: str) -> None:
    x = uniform(2, 3, 20, 15)
    text = f"net (float16[2,3,20,15] x) => (float16[{shape}] y) <int64[2] axes = {{2, 3}}> {{ y = {node} }}"
    (rounded,) = run(emulate_fp16(parse(text.replace('": 19', '": 18')), accumulation=16), x=x.astype(np.float32))
    expected = totals(x.reshape(2, 3, 300), np.ones((2, 300, 1), np.float16))[..., 0]
    if "Sum" not in node:
        expected = (expected / 300).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(rounded.reshape(2, 3), expected)


def test_softmax_denominators_accumulate_in_fp16() -> None:
    x = uniform(2, 400, 3)
    model = parse("net (float16[2,400,3] x) => (float16[2,400,3] y) { y = Softmax <axis = 1> (x) }")
    (rounded,) = run(emulate_fp16(model, accumulation=16), x=x.astype(np.float32))
    weights = np.exp((x - x.max(1, keepdims=True)).astype(np.float32)).astype(np.float16)
    denominator = totals(weights.transpose(0, 2, 1), np.ones((2, 400, 1), np.float16)).transpose(0, 2, 1)
    expected = (weights.astype(np.float32) / denominator).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(rounded, expected, rtol=2.0**-10)


def test_means_of_many_numbers_overflow() -> None:
    model = parse("net (float16[1,1,400,256] x) => (float16[1,1,1,1] y) { y = GlobalAveragePool (x) }")
    x = np.full((1, 1, 400, 256), 1.5, np.float32)
    assert run(emulate_fp16(model), x=x)[0].item() == 1.5
    assert run(emulate_fp16(model, accumulation=16), x=x)[0].item() == np.inf


def test_what_does_not_accumulate_in_fp16() -> None:
    """FP32 islands, BF16, INT8 products, and sums of one block."""
    island = parse(
        """net (float16[4,64] x) => (float16[4,4] y) {
            w = Cast <to = 1> (x)  t = Transpose (w)  e = MatMul (w, t)  y = Cast <to = 10> (e) }"""
    )
    short = parse("net (float16[4,16] a, float16[16,4] b) => (float16[4,4] y) { y = MatMul (a, b) }")
    brain = parse("net (bfloat16[4,64] a, bfloat16[64,4] b) => (bfloat16[4,4] y) { y = MatMul (a, b) }")
    int8 = parse(
        """net (int8[4,64] a, int8[64,4] b) => (float16[4,4] y) {
            c = DequantizeLinear (a, s)  d = DequantizeLinear (b, s)  y = MatMul (c, d) }""",
        s=np.float16(0.5),
    )
    for model in (island, short, brain, int8):
        assert emulate_fp16(model, accumulation=16).SerializeToString() == emulate_fp16(model).SerializeToString()


def test_accumulation_needs_fixed_sizes() -> None:
    model = parse("net (float16[N,K] a, float16[K,4] b) => (float16[N,4] y) { y = MatMul (a, b) }")
    with pytest.raises(UserError, match="without --dynamic"):
        emulate_fp16(model, accumulation=16)
