"""FP16 conversion: types, closed islands, casts, names, constants, Q/DQ scales."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_bf16, to_fp16
from edgeattn.export.precision_types import BF16, FP16, check_types
from edgeattn.export.ranges import OVERFLOW_MARGIN, measure_ranges
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import spec_of
from edgeattn.plugins_trt.onnx_form import local_function

SCOPES = "pkg.torch.onnx.name_scopes"
CONVS = {
    "w_stem": (8, 3, 3, 3),
    "w_mid": (8, 8, 3, 3),
    "w_q": (4, 8, 1, 1),
    "w_k": (4, 8, 1, 1),
    "w_v": (8, 8, 1, 1),
    "w_head": (5, 8, 1, 1),
}
STEM = """
    stem = Conv <pads = [1, 1, 1, 1]> (image, w_stem)
    stem_relu = Relu (stem)
    mid = Conv <pads = [1, 1, 1, 1]> (stem_relu, w_mid)
    feature = Add (mid, stem_relu)
    query = Conv (feature, w_q)
    key = Conv (feature, w_k)
    value = Conv (feature, w_v)
"""
PLAIN = (
    STEM
    + """
    flat = Constant <value = int64[3] {0, 0, -1}> ()
    query_flat = Reshape (query, flat)
    key_flat = Reshape (key, flat)
    value_flat = Reshape (value, flat)
    query_rows = Transpose <perm = [0, 2, 1]> (query_flat)
    energy = MatMul (query_rows, key_flat)
    factor = Constant <value = float {0.5}> ()
    scaled = Mul (energy, factor)
    masked = Add (scaled, mask)
    attention = Softmax <axis = -1> (masked)
    attention_t = Transpose <perm = [0, 2, 1]> (attention)
    context = MatMul (value_flat, attention_t)
    shape = Shape (feature)
    context_map = Reshape (context, shape)
    attended = Add (context_map, feature)
    logits = Conv (attended, w_head)
"""
)
PLUGIN = (
    STEM
    + """
    attended = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn", plugin_version = "1">
        (query, key, value, feature)
    logits = Conv (attended, w_head)
"""
)


def build(body: str, *, plugin: bool = False, mask: bool = False) -> onnx.ModelProto:
    """Parse a network, name its nodes, give them torch scopes and random weights."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18, "edgeattn": 1]>\n'
        f"net (float[batch,3,height,width] image) => (float[batch,5,height,width] logits) {{{body}}}"
    )
    rng = np.random.default_rng(0)
    for name, shape in CONVS.items():
        weight = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    if mask:
        model.graph.initializer.append(numpy_helper.from_array(np.float32([-1e9] + [0] * 62), "mask"))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        module = "cca" if node.output[0] in {"energy", "attention", "query", "attended"} else "trunk"
        node.metadata_props.add(key=SCOPES, value=f"['', '{module}', '{node.output[0]}']")
    if plugin:
        model.functions.append(local_function(spec_of("CrissCrossAttention", 4), 18))
    check_types(model)
    return model


def small(body: str, inputs: str = "float[N,4] x", outputs: str = "float[N,4] y", head: str = "") -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]>\nnet ({inputs}) => ({outputs}) {head} {{{body}}}'
    )
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return model


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output)}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def casts(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(node.input[0], node.output[0]) for node in model.graph.node if node.op_type == "Cast"]


IMAGE = np.random.default_rng(1).standard_normal((1, 3, 9, 7)).astype(np.float32)


def relative(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="module")
def plain() -> onnx.ModelProto:
    return build(PLAIN, mask=True)


@pytest.fixture(scope="module")
def plugin() -> onnx.ModelProto:
    return build(PLUGIN, plugin=True)


def test_plain_attention_is_a_closed_fp32_island(plain: onnx.ModelProto) -> None:
    result = to_fp16(plain)
    types = types_of(result.model)
    assert {types[name] for name in ("energy", "scaled", "masked", "attention", "mask")} == {TensorProto.FLOAT}
    half = ("stem", "stem_relu", "mid", "feature", "query", "query_rows", "context", "attended", "w_stem")
    assert {types[name] for name in half} == {TensorProto.FLOAT16}
    assert set(result.fp32_nodes) == {"node_energy", "node_scaled", "node_masked", "node_attention"}
    assert result.notes == ()  # the mask's -1e9 lies inside the island
    assert [source for source, _ in casts(result.model)] == [
        "image", "key_flat", "query_rows", "attention", "logits_fp16"
    ]  # fmt: skip


def test_results_and_boundary(plain: onnx.ModelProto) -> None:
    before = plain.SerializeToString()
    result = to_fp16(plain).model
    assert plain.SerializeToString() == before
    assert result.ir_version == 10
    assert to_fp16(plain).model.SerializeToString() == result.SerializeToString()
    assert [list(info.type.tensor_type.shape.dim) for info in result.graph.input] == [
        list(info.type.tensor_type.shape.dim) for info in plain.graph.input
    ]
    (reference,), (output,), (rounded,) = (run(m, image=IMAGE) for m in (plain, result, emulate_fp16(result)))
    assert output.dtype == np.float32
    assert 0 < relative(rounded, reference) < 4e-3


def test_half_inputs_and_outputs(plain: onnx.ModelProto) -> None:
    result = to_fp16(plain, keep_io=False).model
    (output,) = run(result, image=IMAGE.astype(np.float16))
    assert output.dtype == np.float16
    assert [source for source, _ in casts(result)] == ["key_flat", "query_rows", "attention"]
    assert relative(output.astype(np.float32), run(plain, image=IMAGE)[0]) < 4e-3


def test_names_metadata_and_plugin_survive(plugin: onnx.ModelProto) -> None:
    result = to_fp16(plugin).model
    scopes = {node.name: {e.key: e.value for e in node.metadata_props} for node in result.graph.node}
    for node in plugin.graph.node:
        assert scopes[node.name] == {e.key: e.value for e in node.metadata_props}
    assert all(SCOPES in entries for entries in scopes.values())  # casts too
    assert len(scopes) == len(result.graph.node)
    node = next(node for node in result.graph.node if node.domain == "edgeattn")
    assert {attribute.name for attribute in node.attribute} == {"plugin_namespace", "plugin_version"}
    assert list(node.input) == ["query", "key", "value", "feature"]
    types = types_of(result)
    assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    assert result.functions[0] == local_function(spec_of("CrissCrossAttention", 4), 18, fp32_island=True)
    assert casts(result) == [("image", "image_fp16"), ("logits_fp16", "logits")]
    assert relative(run(emulate_fp16(result), image=IMAGE)[0], run(plugin, image=IMAGE)[0]) < 4e-3


def test_plugin_without_body(plugin: onnx.ModelProto) -> None:
    """The form for old TensorRT versions: the types behind the node come from the graph's records, or its inputs."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(plugin)
    del stripped.functions[:]
    result = to_fp16(stripped)
    assert result.fp32_nodes == {}
    assert casts(result.model) == [("image", "image_fp16"), ("logits_fp16", "logits")]


def test_value_info_invents_no_sizes(plugin: onnx.ModelProto) -> None:
    known = {dim.dim_param for info in plugin.graph.input for dim in info.type.tensor_type.shape.dim}
    for info in to_fp16(plugin).model.graph.value_info:
        assert {dim.dim_param for dim in info.type.tensor_type.shape.dim} - {""} <= known


@pytest.mark.parametrize("entry", ["node_attended", "cca"])
def test_keep_fp32(plugin: onnx.ModelProto, entry: str) -> None:
    result = to_fp16(plugin, keep_fp32=[entry])
    assert result.fp32_nodes["node_attended"] == "asked for"
    types = types_of(result.model)
    assert types["attended"] == TensorProto.FLOAT
    assert types["query"] == (TensorProto.FLOAT if entry == "cca" else TensorProto.FLOAT16)
    assert relative(run(emulate_fp16(result.model), image=IMAGE)[0], run(plugin, image=IMAGE)[0]) < 4e-3


@pytest.mark.parametrize("entry", ["node_attendet", "cc", ""])
def test_keep_fp32_rejects_unknown_names(plugin: onnx.ModelProto, entry: str) -> None:
    with pytest.raises(UserError, match="keep_fp32"):
        to_fp16(plugin, keep_fp32=[entry])


def test_fp16_model_is_refused(plain: onnx.ModelProto) -> None:
    with pytest.raises(UserError, match="already has FP16"):
        to_fp16(to_fp16(plain).model)


# ------------------------------------------------------------------------------------------ the overflowing attention


def co_attention(kind: int, *, island: bool) -> onnx.ModelProto:
    """A co-attention node whose inputs are cast to `kind` first."""
    names = ["query_a", "key_b", "value_a", "value_b"]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 4, 5]) for name in names]
    nodes = [helper.make_node("Cast", [name], [f"{name}_in"], to=kind) for name in names]
    nodes.append(helper.make_node("CoAttention", [f"{name}_in" for name in names], ["a", "b"], domain="edgeattn"))
    nodes += [helper.make_node("Cast", [name], [f"attended_{name}"], to=TensorProto.FLOAT) for name in "ab"]
    outputs = [helper.make_tensor_value_info(f"attended_{name}", TensorProto.FLOAT, [1, 16, 4, 5]) for name in "ab"]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    function = local_function(spec_of("CoAttention", 4), 18, fp32_island=island)
    return helper.make_model(
        helper.make_graph(nodes, "co", infos, outputs), opset_imports=imports, functions=[function], ir_version=10
    )


def stress_inputs() -> dict[str, np.ndarray]:
    """Energies of up to about 8e4, so beyond FP16; queries and keys are FP16 numbers, so the island has no excuse."""
    rng = np.random.default_rng(3)
    inputs = {name: rng.standard_normal((1, 16, 4, 5)) for name in ("query_a", "key_b", "value_a", "value_b")}
    inputs = {name: (array * (80 if name[0] in "qk" else 1)).astype(np.float16) for name, array in inputs.items()}
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def test_energies_beyond_fp16() -> None:
    inputs = stress_inputs()
    affinity = np.einsum("bchw,bcij->bhwij", inputs["query_a"], inputs["key_b"])
    assert 7e4 < np.abs(affinity).max() < 2e5
    reference = run(co_attention(TensorProto.FLOAT, island=False), **inputs)
    open_form = emulate_fp16(co_attention(TensorProto.FLOAT16, island=False))
    assert not all(np.isfinite(output).all() for output in run(open_form, **inputs))
    fp32 = co_attention(TensorProto.FLOAT, island=False)
    plain_fp32 = onnx.inliner.inline_local_functions(fp32)
    for model in (fp32, plain_fp32):
        closed = emulate_fp16(to_fp16(model, keep_io=False).model)
        for output, expected in zip(run(closed, **inputs), reference, strict=True):
            assert relative(output, expected) < 1e-3


def test_fp32_softmax_alone_protects_nothing() -> None:
    """The island has to begin at the energies: with the Softmax alone in FP32 the same inputs give NaN."""
    body = "e = MatMul (a, b)  f = Cast <to = 1> (e)  s = Softmax <axis = -1> (f)  y = Cast <to = 10> (s)"
    leaky = small(body, "float16[8,16] a, float16[16,8] b", "float16[8,8] y")
    closed = to_fp16(
        small("e = MatMul (a, b)  y = Softmax <axis = -1> (e)", "float[8,16] a, float[16,8] b", "float[8,8] y")
    ).model
    rng = np.random.default_rng(0)
    inputs = {"a": 400 * rng.standard_normal((8, 16)), "b": 400 * rng.standard_normal((16, 8))}
    inputs = {name: array.astype(np.float16).astype(np.float32) for name, array in inputs.items()}
    assert np.isnan(run(emulate_fp16(leaky), **inputs)[0]).any()
    assert np.isfinite(run(emulate_fp16(closed), **inputs)[0]).all()


@pytest.mark.parametrize(
    ("path", "island"),
    [
        ("e = Einsum <equation = 'ij,jk->ik'> (q, k)  f = Neg (e)  y = Softmax (f)", {"e", "f", "y"}),
        ("e = Gemm <transB = 0> (q, k)  f = Transpose <perm = [0, 1]> (e)  y = LogSoftmax (f)", {"e", "f", "y"}),
        ("e = MatMul (q, k)  c = IsNaN (e)  f = Where (c, low, e)  y = Softmax (f)", {"e", "f", "y"}),
        (
            "e = MatMul (q, k)  m = ReduceMax (e)  d = Sub (e, m)  p = Exp (d)  s = ReduceSum (p)  y = Div (p, s)",
            {"e", "m", "d", "p", "s", "y"},
        ),
    ],
)
def test_islands_in_other_spellings(path: str, island: set[str]) -> None:
    body = f"q = Relu (x)  k = Sigmoid (q)  {path}".replace("'", '"')
    model = small(body, "float[4,4] x", "float[4,4] y", "<float low = {-1e9}>")
    result = to_fp16(model)
    assert {f"node_{name}" for name in island} <= set(result.fp32_nodes)
    assert not {"node_q", "node_k"} & set(result.fp32_nodes)
    graph = ir.from_proto(result.model).graph
    for node in graph:
        if node.op_type == "Cast":  # a cast inside would sit between two island nodes
            sources = {f"node_{name}" for name in island}
            readers = {reader.name for reader, _ in node.outputs[0].uses()}
            producer = node.inputs[0].producer()
            assert not (producer is not None and producer.name in sources and readers & sources)


# ---------------------------------------------------------------------------------------------- other FP32 operators


@pytest.mark.parametrize(
    ("body", "fp32", "fp16"),
    [
        ("a = Relu (x)  s = ReduceMean <keepdims = 1> (a)  y = Mul (a, s)", {"s"}, {"a", "y"}),
        ("a = Relu (x)  b = Mul (a, a)  s = ReduceSum <keepdims = 1> (b)  y = Add (a, s)", {"b", "s"}, {"a", "y"}),
        ("a = Relu (x)  n = ReduceL2 <keepdims = 1> (a)  y = Div (a, n)", {"n", "y"}, {"a"}),
        ("a = Relu (x)  h = Cast <to = 7> (a)  f = Cast <to = 1> (h)  y = Sub (a, f)", {"f"}, {"a", "y"}),
    ],
)
def test_sums_norms_squares_and_integers(body: str, fp32: set[str], fp16: set[str]) -> None:
    kept = set(to_fp16(small(body)).fp32_nodes)
    assert {f"node_{name}" for name in fp32} <= kept
    assert not {f"node_{name}" for name in fp16} & kept


def test_index_arithmetic_stays_exact() -> None:
    body = """
        a = Relu (x)  s = Shape (a)  f = Cast <to = 1> (s)  g = Mul (f, two)  i = Cast <to = 7> (g)
        r = Reshape (a, i)  y = Relu (r)
    """
    model = small(body, "float[N,4] x", "float[M,K] y", "<float[2] two = {0.5, 2.0}>")
    result = to_fp16(model)
    assert {"node_f", "node_g"} <= set(result.fp32_nodes)
    tall = np.ones((4098, 4), np.float32)
    assert run(emulate_fp16(result.model), x=tall)[0].shape == (2049, 8)  # 4098 * 0.5 is no FP16 number
    assert casts(result.model)[0] == ("x", "x_fp16")
    assert len(casts(result.model)) == 2 + 2  # graph boundary, and the model's own two


def test_arithmetic_on_constants_stays_exact() -> None:
    head = "<float c = {300.0}, float d = {400.0}, float e = {0.0001}>"
    result = to_fp16(small("a = Relu (x)  p = Mul (c, d)  q = Mul (p, e)  y = Mul (a, q)", head=head))
    assert set(result.fp32_nodes) == {"node_p", "node_q"}
    np.testing.assert_allclose(run(emulate_fp16(result.model), x=np.ones((1, 4), np.float32))[0], 12, rtol=2e-3)


def test_resize_keeps_float_scales() -> None:
    body = "a = Relu (x)  b = Resize <mode = 'linear'> (a, , scales)  y = Relu (b)".replace("'", '"')
    model = small(body, "float[1,1,4,4] x", "float[1,1,8,8] y", "<float[4] scales = {1.0, 1.0, 2.0, 2.0}>")
    result = to_fp16(model)
    types = types_of(result.model)
    assert (types["b"], types["scales"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)
    assert result.fp32_nodes == {}


@pytest.mark.parametrize(
    ("number", "defect"), [("1e6", "exceeds"), ("-70000.0", "exceeds"), ("1e-9", "vanishes"), ("1.5e-7", "becomes")]
)
def test_constants_that_fp16_cannot_hold(number: str, defect: str) -> None:
    result = to_fp16(small("a = Relu (x)  y = Add (a, c)", head=f"<float c = {{{number}}}>"))
    assert "node_y" in result.fp32_nodes
    assert len(result.notes) == 1
    assert defect in result.notes[0]
    assert "node_y" in result.notes[0]


def test_vanishing_weights_are_counted() -> None:
    model = small("a = Relu (x)  y = Mul (a, c)", head="<float[4] c = {1.0, 1e-9, 0.0, -1e-10}>")
    result = to_fp16(model)
    assert result.fp32_nodes == {}
    assert result.notes == ("2 small numbers in 1 constants become 0 in FP16, most of them in c (2 of 4).",)


def test_infinite_constants_are_fp16() -> None:
    model = small("a = Relu (x)  c = Greater (a, one)  y = Where (c, low, a)", head="<float one = {1.0}>")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-np.inf), "low"))
    result = to_fp16(model)
    assert (result.fp32_nodes, result.notes) == ({}, ())
    assert run(result.model, x=np.float32([[0, 2, 1, 3]]))[0].tolist() == [[0, -np.inf, 1, -np.inf]]


def test_constant_shared_by_both_precisions() -> None:
    model = small(
        "a = Relu (x)  p = Mul (a, c)  q = Add (a, c)  s = ReduceSum <keepdims = 1> (q)  y = Add (p, s)",
        head="<float[4] c = {1.0, 2.0, 3.0, 0.1}>",
    )
    result = to_fp16(model, keep_fp32=["node_q"])
    types = types_of(result.model)
    assert (types["c"], types["c_fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_allclose(run(result.model, x=x)[0], run(model, x=x)[0], rtol=2e-3)


def test_no_cast_round_trips_between_fp32_nodes() -> None:
    body = """
        a = Relu (x)  s = ReduceSum <keepdims = 1> (a)  t = Transpose <perm = [1, 0]> (s)  u = Tanh (t)
        v = ReduceMean <keepdims = 1> (u)  y = Relu (v)
    """
    result = to_fp16(small(body, "float[4,4] x", "float[1,1] y"))
    assert set(result.fp32_nodes) == {"node_s", "node_t", "node_u", "node_v", "node_y"}
    assert casts(result.model) == [("x", "x_fp16"), ("a", "a_fp32")]


def test_output_that_is_read_inside_is_cast_once() -> None:
    body = "a = Relu (x)  h = Sigmoid (a)  s = ReduceSum <keepdims = 1> (h)  y = Mul (a, s)"
    result = to_fp16(small(body, outputs="float[N,4] h, float[N,4] y")).model
    assert ("h_fp16", "h") in casts(result)
    assert [node.input[0] for node in result.graph.node if node.op_type == "ReduceSum"] == ["h"]


def test_control_flow_stays_fp32() -> None:
    body = """
        a = Relu (x)  c = Constant <value = bool {1}> ()
        b = If (c) <then_branch = t () => (float[N,4] p) { p = Add (a, a) },
                    else_branch = e () => (float[N,4] q) { q = Identity (a) }>
        y = Sigmoid (b)
    """
    result = to_fp16(small(body))
    x = np.float32([[1, 2, 3, 4]])
    assert result.fp32_nodes["node_b"] == "control flow"
    np.testing.assert_allclose(run(emulate_fp16(result.model), x=x)[0], 1 / (1 + np.exp(-2 * x)), atol=1e-3)


UNARY = ["Relu", "Sigmoid", "Neg", "Transpose", "Softmax", "ReduceSum", "Identity"]
BINARY = ["Add", "Mul", "MatMul", "Max", "Sub"]
steps = st.lists(
    st.tuples(st.sampled_from(UNARY + BINARY), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=14
)


@given(steps, st.sets(st.integers(0, 13), max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_graph(steps: list[tuple[str, int, int]], kept: set[int], keep_io: bool) -> None:
    """Whatever the graph, types fit, numbers agree, and no tensor is cast twice, to and fro, or for nobody."""
    names, nodes = ["x", "c"], []
    for index, (op, first, second) in enumerate(steps):
        inputs = [names[first % len(names)]] + ([names[second % len(names)]] if op in BINARY else [])
        options = {"noop_with_empty_axes": 1} if op == "ReduceSum" else {}  # a sum over no axis keeps the shape
        nodes.append(helper.make_node(op, inputs, [f"t{index}"], name=f"n{index}", **options))
        names.append(f"t{index}")
    read = {name for node in nodes for name in node.input}
    tensor = helper.make_tensor_value_info
    outputs = [tensor(n, TensorProto.FLOAT, [2, 2]) for n in names[2:] if n not in read or n == "t0"]
    constant = numpy_helper.from_array(np.float32([[0.1, 0.2], [-0.3, 0.4]]), "c")
    graph = helper.make_graph(nodes, "net", [tensor("x", TensorProto.FLOAT, [2, 2])], outputs, [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    chosen = [f"n{index}" for index in kept if index < len(nodes)]
    result = to_fp16(model, keep_fp32=chosen, keep_io=keep_io)
    assert set(chosen) <= set(result.fp32_nodes)
    pairs = [(node.input[0], node.attribute[0].i) for node in result.model.graph.node if node.op_type == "Cast"]
    made = {target for _, target in casts(result.model)}
    assert len(set(pairs)) == len(pairs)
    assert not made & {source for source, _ in pairs}
    used = {name for node in result.model.graph.node for name in node.input}
    assert made <= used | {info.name for info in result.model.graph.output}
    x = np.float32([[0.5, -1], [0.25, 2]])
    if not keep_io:
        assert all(o.dtype == np.float16 for o in run(result.model, x=x.astype(np.float16)))
    for expected, output in zip(run(model, x=x), run(emulate_fp16(result.model), x=x), strict=True):
        if np.abs(expected).max() < 1e3:  # products of sums may grow without bound
            np.testing.assert_allclose(output, expected, rtol=0.05, atol=0.05 * (1 + np.abs(expected).max()))


# ------------------------------------------------------------------------------------------------------ Q/DQ scales


def quantised(scale: float, opset: int = 19) -> onnx.ModelProto:
    """A convolution with Q/DQ on its input and its weight, behind and before FP16 operators."""
    body = """
        a = Relu (x)
        q = QuantizeLinear (a, s, z)  d = DequantizeLinear (q, s, z)
        w = DequantizeLinear <axis = 0> (w_int8, w_scale, w_zero)
        c = Conv (d, w)  y = Relu (c)
    """
    model = small(body, "float[1,2,3,3] x", "float[1,2,3,3] y", "<float s = {0.02}, int8 z = {0}>")
    model.opset_import[0].version = opset
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in {
            "w_int8": np.arange(-2, 2, dtype=np.int8).reshape(2, 2, 1, 1) * 50,
            "w_scale": np.float32([0.01, scale]),
            "w_zero": np.zeros(2, np.int8),
        }.items()
    )
    return model


X = np.abs(np.random.default_rng(2).standard_normal((1, 2, 3, 3))).astype(np.float32)


def test_scales_become_fp16_and_opset_rises() -> None:
    result = to_fp16(quantised(0.003, opset=18))
    assert result.model.opset_import[0].version == 19
    assert "opset 18 became 19" in result.notes[0]
    types = types_of(result.model)
    assert {types[name] for name in ("s", "w_scale", "d", "w", "c")} == {TensorProto.FLOAT16}
    assert types["q"] == TensorProto.INT8
    assert relative(run(emulate_fp16(result.model), x=X)[0], run(quantised(0.003), x=X)[0]) < 5e-3


def test_lost_scale_keeps_its_convolution_in_fp32() -> None:
    result = to_fp16(quantised(1e-8))
    types = types_of(result.model)
    assert {types[name] for name in ("w_scale", "w", "d", "c")} == {TensorProto.FLOAT}
    assert types["a"] == TensorProto.FLOAT16
    assert any("w_scale is lost in FP16" in note and "node_c" in note for note in result.notes)
    (reference,), (output,) = run(quantised(1e-8), x=X), run(emulate_fp16(result.model), x=X)
    assert np.abs(reference[0, 1]).max() > 0
    np.testing.assert_allclose(output[0, 1], reference[0, 1], rtol=0.05, atol=1e-6)


def test_dequantised_tensor_read_in_both_precisions_is_not_cast() -> None:
    model = quantised(0.003)
    extra = helper.make_node("Conv", ["d", "w"], ["c2"], name="node_c2")
    model.graph.node.insert(4, extra)
    model.graph.node[-1].CopyFrom(helper.make_node("Add", ["c", "c2"], ["y"], name="node_y"))
    result = to_fp16(model, keep_fp32=["node_c2"]).model
    nodes = {node.output[0]: node for node in result.graph.node}
    second = nodes["c2"]
    assert [nodes[name].op_type for name in second.input] == ["DequantizeLinear"] * 2
    assert types_of(result)["c2"] == TensorProto.FLOAT
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    assert float(scales[nodes[second.input[0]].input[1]]) == float(scales["s"])


def test_old_opset_with_qdq_is_refused() -> None:
    with pytest.raises(UserError, match="opset 17"):
        to_fp16(quantised(0.003, opset=17))


# ---------------------------------------------------------------------------------------------------- measured ranges

SMALL = np.random.default_rng(4).standard_normal((5, 4)).astype(np.float32)


def chain() -> onnx.ModelProto:
    """Numbers that leave FP16's range upwards, come back, leave it downwards and come back."""
    head = "<float[4] up = {9e3, 8e3, -9e3, 7e3}, float[4] down = {1e-4, 2e-4, 1e-4, 1e-4}>"
    body = """
        a = Relu (x)  b = Mul (a, up)  c = Mul (b, up)  t = Transpose <perm = [1, 0]> (c)  d = Transpose (t)
        e = Mul (d, down)  f = Mul (e, down)  g = Mul (f, down)  h = Mul (g, down)  i = Mul (h, down)
        j = Mul (i, up)  y = Sigmoid (j)
    """
    return small(body, "float[N,4] x", "float[N,4] y, float[N,4] b, float[N,4] i", head=head)


def test_measured_ranges_make_closed_islands() -> None:
    model = chain()
    ranges = measure_ranges(model, [{"x": SMALL}, {"x": 0.5 * SMALL}])
    assert ranges.batches == 2
    peak = np.abs(run(model, x=SMALL)[1]).max()
    assert ranges.tensors["b"].peak == pytest.approx(peak)
    policy, result = to_fp16(model), to_fp16(model, ranges=ranges)
    assert not relative(run(emulate_fp16(policy.model), x=SMALL)[0], run(model, x=SMALL)[0]) < 0.1
    for output, expected in zip(run(emulate_fp16(result.model), x=SMALL), run(model, x=SMALL), strict=True):
        assert relative(output, expected) < 4e-3
    # c overflows, i vanishes; what makes and reads them is FP32, as is what lies between them, without a cast inside.
    assert {"node_c", "node_t", "node_d", "node_e"} <= set(result.fp32_nodes)
    assert "node_a" not in result.fp32_nodes
    inner = {source for source, _ in casts(result.model)} & {"c", "t", "d"}
    assert not inner
    assert "on the calibration data c reaches" in result.fp32_nodes["node_c"]
    assert any("that FP16 cannot hold; the worst: on the calibration data" in note for note in result.notes)
    assert types_of(result.model)["a"] == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("factor", "defect"),
    [
        (1.01 * 65504 / OVERFLOW_MARGIN, "exceeds"),
        (0.99 * 65504 / OVERFLOW_MARGIN, None),
        (1.0, None),
        (2.0**-15, None),  # the largest numbers keep ten of their eleven digits, and the norm is theirs
        (2.0**-20, "loses"),
        (1e-30, "loses 100.00%"),
        (1e38, "exceeds"),
        (0.0, None),
    ],
)
def test_what_fp16_cannot_hold(factor: float, defect: str | None) -> None:
    x = (SMALL / np.abs(SMALL).max() * np.float32(factor)).astype(np.float32)
    found = measure_ranges(small("y = Relu (x)"), [{"x": x}]).defect("x")
    assert (found is None) if defect is None else (found is not None and defect in found), found


def test_quantised_tensors_have_the_range_of_their_source() -> None:
    model = quantised(0.003)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(700.0), "s"))
    ranges = measure_ranges(model, [{"x": 5e4 * X}])
    result = to_fp16(model, ranges=ranges)
    types = types_of(result.model)
    assert {types[name] for name in ("a", "d", "c")} == {TensorProto.FLOAT}
    assert "on the calibration data a reaches" in result.fp32_nodes["node_c"]


def test_ranges_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="measured for BF16"):
        to_fp16(chain(), ranges=measure_ranges(chain(), [{"x": SMALL}], BF16))


def test_operator_types_stay_fp32(plain: onnx.ModelProto, plugin: onnx.ModelProto) -> None:
    kept = to_fp16(plain, keep_fp32=["Conv"]).fp32_nodes
    assert {f"node_{name}" for name in ("stem", "mid", "query", "key", "value", "logits")} <= set(kept)
    # An operator inside a plugin's function chooses the plugin.
    assert to_fp16(plugin, keep_fp32=["Softmax"]).fp32_nodes == {"node_attended": "asked for"}


# ---------------------------------------------------------------------------------------------------------------- BF16


def test_bf16_has_the_islands_of_fp16(plain: onnx.ModelProto) -> None:
    result, half = to_bf16(plain), to_fp16(plain)
    assert set(result.fp32_nodes) == set(half.fp32_nodes)
    assert result.model.opset_import[0].version == 22
    assert "opset 18 became 22" in result.notes[0]
    types = types_of(result.model)
    assert {types[name] for name in ("stem", "feature", "context", "w_stem")} == {TensorProto.BFLOAT16}
    assert {types[name] for name in ("energy", "attention", "logits")} == {TensorProto.FLOAT}
    assert len(casts(result.model)) == len(casts(half.model))
    assert not np.any([value == TensorProto.FLOAT16 for value in types.values()])
    (reference,), (rounded,) = run(plain, image=IMAGE), run(emulate_fp16(result.model), image=IMAGE)
    assert BF16.unit / 4 < relative(rounded, reference) < 4 * np.sqrt(2 * 10) * BF16.unit


def test_bf16_of_plugins(plugin: onnx.ModelProto) -> None:
    result = to_bf16(plugin)
    node = next(node for node in result.model.graph.node if node.domain == "edgeattn")
    types = types_of(result.model)
    assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.BFLOAT16}
    assert result.model.functions[0].opset_import[0].version == 22
    assert relative(run(emulate_fp16(result.model), image=IMAGE)[0], run(plugin, image=IMAGE)[0]) < 5e-2


def test_bf16_holds_what_fp16_cannot() -> None:
    model = small("a = Relu (x)  y = Add (a, c)", head="<float c = {1e6}>")
    assert to_fp16(model).notes
    result = to_bf16(model)
    assert result.fp32_nodes == {}
    assert measure_ranges(chain(), [{"x": SMALL}], BF16).defect("c") is None
    assert measure_ranges(chain(), [{"x": SMALL}], FP16).defect("c") is not None


def test_grid_modes_are_renamed() -> None:
    body = 'a = Relu (x)  b = GridSample <mode = "bilinear"> (a, g)  y = Relu (b)'
    model = small(body, "float[1,1,4,4] x, float[1,3,3,2] g", "float[1,1,3,3] y")
    inputs = {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4), "g": np.linspace(-1, 1, 18, dtype=np.float32)}
    inputs["g"] = inputs["g"].reshape(1, 3, 3, 2)
    result = to_bf16(model)
    np.testing.assert_allclose(run(emulate_fp16(result.model), **inputs)[0], run(model, **inputs)[0], rtol=2e-2)


def test_bf16_refuses_operators_that_changed() -> None:
    body = "y = GroupNormalization <num_groups = 2> (x, s, b)"
    head = "<float[2] s = {1.0, 1.0}, float[2] b = {0.0, 0.0}>"
    with pytest.raises(UserError, match=r"GroupNormalization \(node_y\) of opset 18"):
        to_bf16(small(body, "float[1,4,3,3] x", "float[1,4,3,3] y", head))
