"""The way through graph-surgeon, plugin form, stripped form, plain form, and convolution folding."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeattn.export.graph import (
    CLASS_HIERARCHY,
    NAMESPACE,
    export_graph,
    import_graph,
    module_path,
    stable_sort,
)
from edgeattn.export.metadata import NAME_SCOPES
from edgeattn.export.names import unique_node_names
from edgeattn.export.surgery import attach_plugins, fold_conv_batchnorm, inline_plugins, strip_bodies
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PLUGINS

SCOPES = "['', 'head', 'head.cca', 'criss_cross']"


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimise: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def two_calls(shape: str = "1, {c}, 5, 7", kind: str = "float") -> onnx.ModelProto:
    """Two criss-cross nodes that share query and key, with metadata, as torch's exporter leaves them."""
    small, large = (f"{kind}[{shape.format(c=channels)}]" for channels in (2, 6))
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18, "edgeattn" : 1]>'
        f"g ({small} q, {small} k, {large} v) => ({large} z)"
        "{ y = edgeattn.CrissCrossAttention (q, k, v, v)  w = Relu (y)  z = edgeattn.CrissCrossAttention (q, k, w, y) }"
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
        node.metadata_props.add(key=NAME_SCOPES, value=SCOPES.replace("cca", f"cca{index}"))
    return model


def inputs(kind: type = np.float32, *, size: tuple[int, int] = (5, 7), batch: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal((batch, channels, *size)).astype(kind)
        for name, channels in (("q", 2), ("k", 2), ("v", 6))
    }


@pytest.mark.parametrize(
    "name", ["bmm", "bmm-unoptimised", "bmm-dynamic", "einsum-legacy", "matmul-filled-unoptimised", "co-bmm", "text"]
)
def test_round_trip_of_exports_loses_nothing(corpus, name):
    model = corpus.graph(name)
    returned = export_graph(import_graph(model), model)
    expected = copy.deepcopy(model)
    expected.ir_version = max(10, model.ir_version)
    for node, unique in zip(expected.graph.node, unique_node_names(model.graph), strict=True):
        node.name = unique
    assert returned == expected


def rich_model() -> onnx.ModelProto:
    """Every kind of thing that a graph library may forget."""
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "captured"], ["inner"], name="in_body")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    body.node[0].metadata_props.add(key="k", value="in body")
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["other"])],
        "else",
        [],
        [helper.make_tensor_value_info("other", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["flag"], ["y"], name="branch", then_branch=body, else_branch=other)
    call = helper.make_node("Twice", ["y"], ["z"], name="call", domain="mine", amount=2, words=["a", "b"])
    squeeze = helper.make_node("Squeeze", ["z"], ["s"], name="squeeze")
    graph = helper.make_graph(
        [branch, call, squeeze],
        "rich",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones((1, 3), np.float32), "captured"),
            helper.make_tensor("brain", TensorProto.BFLOAT16, [2], [1.0, 2.0]),
        ],
        doc_string="graph text",
        value_info=[helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3], doc_string="value text")],
    )
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    function.node[0].metadata_props.add(key="k", value="in function")
    model = helper.make_model(
        graph,
        functions=[function],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("mine", 3)],
        ir_version=10,
        producer_name="someone",
        doc_string="model text",
    )
    for holder, value in ((model, "model"), (model.graph, "graph"), (model.graph.node[1], "node")):
        holder.metadata_props.add(key="k", value=value)
    model.graph.node[2].doc_string = "node text"
    return model


def test_round_trip_keeps_what_graph_surgeon_forgets():
    model = rich_model()
    assert export_graph(import_graph(model), model) == model


def test_unique_node_names():
    graph = helper.make_graph(
        [
            helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=name)
            for i, name in enumerate(["a", "", "a", "", "Relu_1"])
        ],
        "g",
        [],
        [],
    )
    names = unique_node_names(graph)
    assert names == ["a", "Relu_1_2", "a_2", "Relu_3", "Relu_1"]


def test_export_sorts_and_inherits():
    model = two_calls()
    graph = import_graph(model)
    relu = graph.nodes[1]
    late = gs.Node("Neg", "negated", inputs=[relu.outputs[0]], outputs=[gs.Variable("n", dtype=np.float32)])
    last = graph.nodes[2]
    last.inputs[2] = late.outputs[0]
    graph.nodes.append(late)
    assert [node.name for node in stable_sort(graph.nodes)] == ["node_0", "node_1", "negated", "node_2"]
    result = export_graph(graph, model, inherited={"negated": ["node_0", "node_1"]})
    onnx.checker.check_model(result)
    assert [node.name for node in result.graph.node] == ["node_0", "node_1", "negated", "node_2"]
    assert module_path(result.graph.node[2]) == "head"
    assert [value.name for value in result.graph.value_info] == ["n"]


def test_inherited_metadata_is_the_common_module():
    model = two_calls()
    entries = {
        CLASS_HIERARCHY: "['Net', 'Head', '{}', 'aten.op']",
        NAMESPACE: ": Net/head: Head/head.cca: {}/op: aten.op",
        "pkg.torch.onnx.fx_node": "%op{}",
    }
    for index, node in enumerate(model.graph.node):
        for key, value in entries.items():
            node.metadata_props.add(key=key, value=value.format(index))
    graph = import_graph(model)
    graph.nodes[1].name = "fresh"
    result = export_graph(graph, model, inherited={"fresh": ["node_0", "node_2"]})
    metadata = {entry.key: entry.value for entry in result.graph.node[1].metadata_props}
    assert metadata[NAME_SCOPES] == "['', 'head', 'fresh']"
    assert metadata[CLASS_HIERARCHY] == "['Net', 'Head', 'onnx.Relu']"
    assert metadata[NAMESPACE] == ": Net/head: Head/fresh: onnx.Relu"
    assert metadata["pkg.torch.onnx.fx_node"] == "%op2"


def test_edited_attributes_and_constants_are_exported():
    model = norm_model(1, bias=True)
    graph = import_graph(model)
    graph.nodes[1].attrs["epsilon"] = 0.5
    graph.nodes[1].attrs["momentum"] = 0.25
    graph.nodes[0].inputs[2].values = np.arange(8, dtype=np.float32)
    assert graph.nodes[2].inputs[1].values.any()  # read, not edited
    result = export_graph(graph, model)
    values = {item.name: helper.get_attribute_value(item) for item in result.graph.node[1].attribute}
    assert values == {"epsilon": 0.5, "momentum": 0.25}
    before, after = ({tensor.name: tensor for tensor in item.graph.initializer} for item in (model, result))
    np.testing.assert_array_equal(numpy_helper.to_array(after.pop("b_a")), np.arange(8))
    assert all(tensor == before[name] for name, tensor in after.items())
    assert [node for node in result.graph.node if node.name != "bn_a"] == [
        node for node in model.graph.node if node.name != "bn_a"
    ]


def test_attach_gives_attributes_and_bodies():
    model = two_calls()
    before = model.SerializeToString()
    attached = attach_plugins(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(attached, full_check=True)
    assert [function.name for function in attached.functions] == ["CrissCrossAttention"]
    assert attached.functions[0].opset_import[0].version == 18
    for node in (attached.graph.node[0], attached.graph.node[2]):
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        assert values == {"plugin_namespace": b"edgeattn", "plugin_version": b"1"}
    assert [node.metadata_props for node in attached.graph.node] == [node.metadata_props for node in model.graph.node]
    assert np.isfinite(run(attached, inputs())[0]).all()


def test_attach_is_idempotent_and_replaces_bodies():
    once = attach_plugins(two_calls())
    assert attach_plugins(once) == once
    island = attach_plugins(once, fp32_island=True)
    assert len(island.functions) == 1
    assert sum(node.op_type == "Cast" for node in island.functions[0].node) == 2
    assert attach_plugins(island) == once


def test_attach_without_attention_changes_nothing():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 11]> g (float[1] x) => (float[1] y) { y = Relu (x) }'
    )
    model.graph.node[0].name = "r"
    assert attach_plugins(model) == model


def test_attach_refuses_two_arities():
    names = ", ".join(f"float[1, 4, 5, 7] {name}" for name in "abcd")
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18, "edgeattn" : 1]> g ({names}) => (float[1, 4, 5, 7] y)'
        "<float[1, 4] w = {1, 1, 1, 1}, float[1] bias = {0}>"
        "{ x = edgeattn.CoAttentionOneWay (a, b, c)  y = edgeattn.CoAttentionOneWay (x, b, c, w, bias) }"
    )
    with pytest.raises(UserError, match=r"CoAttentionOneWay with 3 inputs .* and 5 inputs"):
        attach_plugins(model)


def test_attach_refuses_old_opset_and_unknown_operation():
    old = two_calls()
    old.opset_import[0].version = 17
    with pytest.raises(UserError, match="opset 17"):
        attach_plugins(old)
    unknown = two_calls()
    unknown.graph.node[0].op_type = "CrossCriss"
    with pytest.raises(UserError, match="no operation CrossCriss"):
        attach_plugins(unknown)


def test_attach_refuses_control_flow():
    model = rich_model()
    model.opset_import.append(helper.make_opsetid("edgeattn", 1))
    inner = model.graph.node[0].attribute[0].g.node[0]
    inner.domain, inner.op_type = "edgeattn", "CrissCrossAttention"
    with pytest.raises(UserError, match="control-flow"):
        attach_plugins(model)


def test_strip_leaves_the_rest():
    attached = attach_plugins(two_calls())
    stripped = strip_bodies(attached)
    assert not stripped.functions
    assert stripped.graph == attached.graph
    assert len(attached.functions) == 1
    onnx.checker.check_model(stripped)
    with pytest.raises(UserError, match="no body"):
        inline_plugins(stripped)


FIXED, FREE = "1, {c}, 5, 7", "batch, {c}, height, width"


@pytest.mark.parametrize("shape", [FIXED, FREE], ids=["fixed", "free"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_inlined_form(shape, kind):
    island = kind == "float16"
    attached = attach_plugins(two_calls(shape, kind), fp32_island=island)
    plain = inline_plugins(attached)
    onnx.checker.check_model(plain, full_check=True)
    assert not plain.functions
    assert [entry.domain for entry in plain.opset_import] == [""]
    operators = {node.op_type for node in plain.graph.node}
    assert not operators & {"Einsum", "Loop", "Scatter", "ScatterElements", "ScatterND", "NonZero", "CastLike"}
    assert ("Cast" in operators) == island
    names = [node.name for node in plain.graph.node]
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} == {"node_0", "node_1", "node_2"}
    for node in plain.graph.node:
        assert module_path(node) == f"head.cca{node.name[5]}"
    read = {name for node in plain.graph.node for name in node.input}
    assert {tensor.name for tensor in plain.graph.initializer} <= read
    feeds = inputs(np.float16 if island else np.float32)
    np.testing.assert_array_equal(run(plain, feeds)[0], run(attached, feeds)[0])
    assert inline_plugins(attached).SerializeToString() == plain.SerializeToString()


def test_fixed_size_folds_the_mask_and_free_size_does_not():
    fixed, free = (inline_plugins(attach_plugins(two_calls(shape))) for shape in (FIXED, FREE))
    assert not {node.op_type for node in fixed.graph.node} & {"Shape", "Range", "Equal", "Squeeze", "Unsqueeze"}
    (mask,) = [tensor for tensor in fixed.graph.initializer if tensor.data_type == TensorProto.BOOL]
    np.testing.assert_array_equal(numpy_helper.to_array(mask), np.eye(5, dtype=bool))
    assert sum(node.op_type == "Range" for node in free.graph.node) == 1  # both calls share one mask
    assert run(free, inputs(size=(4, 9), batch=3))[0].shape == (3, 6, 4, 9)


def test_inlining_leaves_quantisation_and_large_weights_alone():
    model = two_calls()
    weight = np.random.default_rng(0).standard_normal((6, 6, 1, 1)).astype(np.float32)
    extra = [
        numpy_helper.from_array(np.clip(weight * 50, -127, 127).astype(np.int8), "weight"),
        numpy_helper.from_array(np.float32(0.02), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    model.graph.initializer.extend(extra)
    dequantise = helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["kernel"], name="dequantise")
    convolution = helper.make_node("Conv", ["v", "kernel"], ["c"], name="convolution")
    for node in model.graph.node:
        node.input[:] = ["c" if name == "v" else name for name in node.input]
    nodes = [dequantise, convolution, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    plain = inline_plugins(attach_plugins(model))
    assert [node.op_type for node in plain.graph.node][:2] == ["DequantizeLinear", "Conv"]
    kept = {tensor.name: tensor for tensor in plain.graph.initializer}
    assert all(kept[tensor.name] == tensor for tensor in extra)


@pytest.mark.parametrize("spec", PLUGINS, ids=lambda spec: spec.name)
def test_every_operation_can_be_inlined(spec):
    shapes = {"batch": 2, "head_channels": 3, "channels": 4, "1": 1, "height": 5, "width": 7}
    shapes |= {"height_a": 5, "width_a": 7, "height_b": 4, "width_b": 3, "queries": 9, "keys": 6}
    values = [
        helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, [shapes[axis] for axis in tensor.shape])
        for tensor in (*spec.inputs, *spec.outputs)
    ]
    count = len(spec.inputs)
    call = helper.make_node(
        spec.op_type, [t.name for t in spec.inputs], [t.name for t in spec.outputs], domain="edgeattn", name="call"
    )
    graph = helper.make_graph([call], "g", values[:count], values[count:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    attached = attach_plugins(helper.make_model(graph, opset_imports=imports, ir_version=10))
    plain = inline_plugins(attached)
    onnx.checker.check_model(plain, full_check=True)
    assert not {node.op_type for node in plain.graph.node} & {"Shape", "CastLike", "Cast", "Constant"}
    generator = np.random.default_rng(1)
    feeds = {
        tensor.name: generator.standard_normal([shapes[axis] for axis in tensor.shape]).astype(np.float32)
        for tensor in spec.inputs
    }
    for mine, theirs in zip(run(plain, feeds), run(attached, feeds), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def norm_model(groups: int, *, bias: bool, shared: str = "", fan_out: bool = False, seed: int = 0) -> onnx.ModelProto:
    """Two branches Conv + BatchNormalization; `shared` names what they share: weight, norm or both."""
    generator = np.random.default_rng(seed)
    nodes, tensors = [], {}
    for branch in "ab":
        kernel = "a" if shared in ("weight", "both") else branch
        norm = "a" if shared in ("norm", "both") else branch
        sizes = {"w": (kernel, (8, 4 // groups, 3, 3)), "b": (kernel, (8,))}
        sizes |= dict.fromkeys(("gain", "shift", "mean", "variance"), (norm, (8,)))
        for name, (owner, shape) in sizes.items():
            array = generator.standard_normal(shape).astype(np.float32)
            tensors.setdefault(f"{name}_{owner}", np.abs(array) + 0.1 if name == "variance" else array)
        parameters = [f"w_{kernel}", f"b_{kernel}"][: 1 + bias]
        convolution = helper.make_node(
            "Conv", ["x", *parameters], [f"c_{branch}"], name=f"conv_{branch}", group=groups, pads=[1] * 4
        )
        convolution.metadata_props.add(key=NAME_SCOPES, value=f"['', '{branch}', 'conv2d']")
        read = [f"{name}_{norm}" for name in ("gain", "shift", "mean", "variance")]
        nodes += [
            convolution,
            helper.make_node(
                "BatchNormalization", [f"c_{branch}", *read], [f"y_{branch}"], name=f"bn_{branch}", epsilon=1e-3
            ),
        ]
    if fan_out:
        nodes.append(helper.make_node("Relu", ["c_a"], ["r"], name="relu"))
    outputs = ["y_a", "y_b", *(["r"] if fan_out else [])]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 5])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 6, 5]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@settings(max_examples=20, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    shared=st.sampled_from(["", "weight", "norm", "both"]),
    seed=st.integers(0, 1000),
)
def test_batchnorm_folds_into_convolution(groups, bias, shared, seed):
    model = norm_model(groups, bias=bias, shared=shared, seed=seed)
    folded = fold_conv_batchnorm(model)
    onnx.checker.check_model(folded, full_check=True)
    assert [(node.op_type, node.name) for node in folded.graph.node] == [("Conv", "conv_a"), ("Conv", "conv_b")]
    assert [module_path(node) for node in folded.graph.node] == ["a", "b"]
    assert len(folded.graph.initializer) == (2 if shared == "both" else 4)
    x = {"x": np.random.default_rng(seed + 1).standard_normal((1, 4, 6, 5)).astype(np.float32)}
    for mine, theirs in zip(run(folded, x), run(model, x, optimise=False), strict=True):
        # FP32 rounding of the weights and of sums over at most 4 * 9 terms, relative to the size of the result.
        assert np.linalg.norm(mine - theirs) <= 2e-6 * np.linalg.norm(theirs)


def test_batchnorm_is_left_where_folding_would_be_wrong():
    model = norm_model(1, bias=True, fan_out=True)
    training = norm_model(1, bias=True)
    training.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    assert [node.name for node in fold_conv_batchnorm(model).graph.node] == ["conv_a", "bn_a", "conv_b", "relu"]
    assert [node.name for node in fold_conv_batchnorm(training).graph.node] == ["conv_a", "bn_a", "conv_b"]


def test_folding_takes_constant_nodes_too():
    model = norm_model(1, bias=False)
    tensor = model.graph.initializer.pop(0)
    constant = helper.make_node("Constant", [], [tensor.name], name="constant", value=tensor)
    nodes = [constant, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [node.name for node in fold_conv_batchnorm(model).graph.node] == ["conv_a", "conv_b"]
