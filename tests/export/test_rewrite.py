"""Attention in graphs of other origin: what is recognised, what is refused, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from edgeattn.export.graph import module_path
from edgeattn.export.rewrite import rewrite, verify
from edgeattn.export.surgery import attach_plugins, inline_plugins
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PIXEL_ATTENTION, PLUGINS

# Operation, number of its inputs, and how often it occurs.
CRISS_CROSS = ("CrissCrossAttention", 4, 2)
GATED = ("CoAttention", 6, 1)
EXPECTED = {
    "bmm": CRISS_CROSS,
    "bmm+basic": CRISS_CROSS,
    "bmm-dynamic": CRISS_CROSS,
    "bmm-dynamic+basic": CRISS_CROSS,
    "bmm-unoptimised": CRISS_CROSS,
    "bmm-unoptimised+basic": CRISS_CROSS,
    "einsum-dynamic": CRISS_CROSS,
    "einsum-legacy": CRISS_CROSS,
    "einsum-legacy+basic": CRISS_CROSS,
    "matmul-filled": CRISS_CROSS,
    "matmul-filled-unoptimised": CRISS_CROSS,
    "where-legacy": CRISS_CROSS,
    "where-legacy-dynamic": CRISS_CROSS,
    "where-legacy-dynamic+basic": CRISS_CROSS,
    "scaled-axis-one": CRISS_CROSS,
    "fused-projection": CRISS_CROSS,
    "channels-last": CRISS_CROSS,
    "text": ("CrissCrossAttention", 4, 1),
    "co-bmm": GATED,
    "co-bmm+basic": GATED,
    "co-bmm-dynamic": GATED,
    "co-bmm-ungated": ("CoAttention", 4, 1),
    "co-bilinear": GATED,
    "co-einsum": GATED,
    "co-einsum+basic": GATED,
    "co-one-way": ("CoAttentionOneWay", 5, 1),
    "co-one-way-tokens": ("CoAttentionOneWay", 5, 1),
    "co-group": ("CoAttentionOneWay", 3, 1),
}
# ONNX Runtime's CPU provider has no boolean EyeLike, which torch's older exporter writes; the mask disappears with it.
UNRUNNABLE = {"fused-projection"}


def run(model: onnx.ModelProto, *, seed: int = 0, size: tuple[int, int] = (10, 13)) -> list[np.ndarray]:
    """Run a model on normal inputs; free axes get batch 2 and an odd size."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in session.get_inputs():
        free = (2, 0, *size)
        shape = [axis if isinstance(axis, int) else free[place] for place, axis in enumerate(value.shape)]
        feeds[value.name] = generator.standard_normal(shape).astype(np.float32)
    return session.run(None, feeds)


def difference(first: onnx.ModelProto, second: onnx.ModelProto, **options: object) -> float:
    """Return the largest relative L2 difference of two models' outputs."""
    pairs = zip(run(first, **options), run(second, **options), strict=True)
    return max(float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)) for mine, theirs in pairs)


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "edgeattn"]


@pytest.mark.parametrize("name", EXPECTED)
def test_core_is_found_and_replaced(corpus, name):
    model = corpus.graph(name)
    before = model.SerializeToString()
    result = rewrite(model)
    operation, inputs, count = EXPECTED[name]
    assert [item.operation for item in result.accepted] == [operation] * count
    assert result.refused == ()
    assert [len(node.input) for node in plugin_nodes(result.model)] == [inputs] * count
    assert all(item.difference <= 1e-5 for item in result.accepted)
    assert not any(node.op_type in ("Softmax", "Range", "Equal", "Where") for node in result.model.graph.node)
    onnx.checker.check_model(result.model, full_check=True)
    assert model.SerializeToString() == before
    if name not in UNRUNNABLE:
        # Both sides round the energies and a sum over one line (or one map) in FP32, in different orders.
        assert difference(result.model, model, size=(40, 56) if name.startswith("bmm-dynamic") else (10, 13)) <= 1e-5


def test_corpus_is_large_enough(corpus):
    assert len({name.partition("+")[0] for name in EXPECTED}) >= 12
    assert len(corpus.zoo.NEAR_CRISS_CROSS) + len(corpus.zoo.NEAR_CO_ATTENTION) >= 12


def test_unrunnable_mask_is_replaced(corpus):
    """The older exporter's boolean EyeLike keeps ONNX Runtime from loading the graph; the rewritten one runs."""
    result = rewrite(corpus.graph("matmul-filled-legacy"))
    assert len(result.accepted) == 2
    assert difference(result.model, corpus.graph("matmul-filled")) <= 1e-5


def test_almost_criss_cross_is_refused(corpus, line_fault):
    zoo = corpus.zoo
    size = (6, 6) if line_fault == "branches exchanged" else None
    model = zoo.export(zoo.Network(zoo.AlmostCrissCross(line_fault), recurrences=1), legacy=True, size=size)
    result = rewrite(model)
    assert result.accepted == ()
    assert result.model is model
    assert len(result.refused) == 1
    assert zoo.NEAR_CRISS_CROSS[line_fault] in result.refused[0].reason


def test_almost_co_attention_is_refused(corpus, map_fault):
    zoo = corpus.zoo
    result = rewrite(zoo.export(zoo.AlmostCoAttention(map_fault), legacy=True))
    assert result.accepted == ()
    assert any(zoo.NEAR_CO_ATTENTION[map_fault] in item.reason for item in result.refused)


def test_without_a_fault_both_are_accepted(corpus):
    """What the faults are applied to is a core, so that each refusal is due to its fault."""
    zoo = corpus.zoo
    for model in (zoo.Network(zoo.AlmostCrissCross(""), recurrences=1), zoo.AlmostCoAttention("")):
        assert len(rewrite(zoo.export(model, legacy=True)).accepted) == 1


def test_near_miss_with_free_size_is_refused(corpus):
    zoo = corpus.zoo
    result = rewrite(zoo.export(zoo.Network(zoo.AlmostCrissCross("no mask")), legacy=True, dynamic=True))
    assert result.accepted == ()
    assert ["counted twice" in item.reason for item in result.refused] == [True, True]


def test_classifier_softmax_is_not_mentioned():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 4] x, float[4, 3] w) => (float[1, 3] y)'
        "{ z = MatMul (x, w) y = Softmax (z) }"
    )
    result = rewrite(model)
    assert result.model is model
    assert (result.accepted, result.refused) == ((), ())


def test_attention_map_that_is_an_output_is_refused(corpus):
    model = onnx.ModelProto()
    model.CopyFrom(corpus.graph("text"))
    model.graph.output.append(helper.make_tensor_value_info("attention", onnx.TensorProto.FLOAT, None))
    result = rewrite(model)
    assert result.accepted == ()
    assert "output of the model" in result.refused[0].reason


def test_mask_from_an_input_is_refused(corpus):
    model = onnx.ModelProto()
    model.CopyFrom(corpus.graph("text"))
    model.graph.input.append(helper.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, ["height", "height"]))
    adder = next(node for node in model.graph.node if node.op_type == "Add")
    adder.input[0] = "bias"
    result = rewrite(model)
    assert result.accepted == ()
    assert result.model is model


def test_half_precision_is_refused():
    spec = next(spec for spec in PLUGINS if spec.name == "CrissCrossAttention")
    names = ", ".join(f"float16[1, 4, 5, 7] {tensor.name}" for tensor in spec.inputs)
    text = f'<ir_version: 10, opset_import: ["" : 18]> g ({names}) => (float16[1, 4, 5, 7] out)'
    call = "{ out = edgeattn.CrissCrossAttention (query, key, value, residual) }"
    model = onnx.parser.parse_model(text.replace('"" : 18', '"" : 18, "edgeattn" : 1') + call)
    result = rewrite(inline_plugins(attach_plugins(model)))
    assert result.accepted == ()
    assert "float32" in result.refused[0].reason


def test_old_opset_is_an_error(corpus):
    model = onnx.ModelProto()
    model.CopyFrom(corpus.graph("text"))
    model.opset_import[0].version = 17
    with pytest.raises(UserError, match="opset 17"):
        rewrite(model)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("spec", PLUGINS, ids=lambda spec: spec.name)
def test_rewriting_undoes_inlining(spec, free):
    """The bodies themselves are recognised, with all their inputs; pixel attention has no pattern and stays."""
    sizes = {"head_channels": 4, "channels": 8, "1": 1, "batch": 1, "height": 5, "width": 7}
    sizes |= {"height_a": 5, "width_a": 7, "height_b": 6, "width_b": 4, "queries": 9, "keys": 6}
    fixed = {"head_channels", "channels", "1"}

    def value(tensor):
        shape = [sizes[axis] if axis in fixed or not free else axis for axis in tensor.shape]
        return helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, shape)

    maps = [tensor for tensor in spec.inputs if not tensor.name.startswith("gate")]
    gates = [
        onnx.numpy_helper.from_array(np.full([sizes[axis] for axis in tensor.shape], 0.3, np.float32), tensor.name)
        for tensor in spec.inputs
        if tensor.name.startswith("gate")
    ]
    call = helper.make_node(
        spec.op_type, [t.name for t in spec.inputs], [t.name for t in spec.outputs], domain="edgeattn"
    )
    graph = helper.make_graph([call], "g", [value(t) for t in maps], [value(t) for t in spec.outputs], gates)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    plugin = attach_plugins(helper.make_model(graph, opset_imports=imports, ir_version=10))
    result = rewrite(inline_plugins(plugin))
    if spec is PIXEL_ATTENTION:
        assert not result.accepted
        return
    assert [item.operation for item in result.accepted] == [spec.op_type]
    (node,) = result.model.graph.node
    assert len(node.input) == len(spec.inputs)
    assert list(node.input)[: len(maps)] == [tensor.name for tensor in maps]


def test_gamma_is_folded_into_the_value_projection(corpus):
    model = corpus.graph("bmm")
    result = rewrite(model)
    operators = [node.op_type for node in result.model.graph.node]
    assert operators == [*("Conv", "Relu"), *("Conv", "Conv", "Conv", "CrissCrossAttention") * 2, "Conv"]
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    scaled = [node for node in result.model.graph.node if "scaled" in "".join(node.input)]
    assert len(scaled) == 2
    assert scaled[0].input[1:] == scaled[1].input[1:]  # the recurrences share weights, before and after
    old = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    expected = old["cca.value_conv.weight"] * np.float64(old["cca.gamma"])
    np.testing.assert_array_equal(arrays[scaled[0].input[1]], expected.astype(np.float32))
    assert "cca.gamma" not in arrays
    assert "cca.value_conv.weight" not in arrays


def test_matrix_inside_an_einsum_becomes_a_projection(corpus):
    result = rewrite(corpus.graph("co-bilinear"))
    (node,) = plugin_nodes(result.model)
    projection = next(item for item in result.model.graph.node if node.input[0] in item.output)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    old = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in corpus.graph("co-bilinear").graph.initializer}
    assert projection.op_type == "Conv"
    np.testing.assert_array_equal(arrays[projection.input[1]][:, :, 0, 0], old["linear_e.weight"].T)


def test_token_attention_is_not_mentioned():
    """Heads over tokens compare positions of no map."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        tokens (float[2, 9, 8] x, float[8, 8] wq, float[8, 8] wk) => (float[2, 2, 9, 4] y)
        <int64[4] heads = {2, 9, 2, 4}>
        {
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            q_split = Reshape (q, heads)
            k_split = Reshape (k, heads)
            q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
            k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
            v_heads = Transpose <perm = [0, 2, 1, 3]> (k_split)
            energy = MatMul (q_heads, k_heads)
            attention = Softmax (energy)
            y = MatMul (attention, v_heads)
        }"""
    )
    result = rewrite(model)
    assert (result.accepted, result.refused) == ((), ())


def test_missing_residual_becomes_zeros(corpus):
    result = rewrite(corpus.graph("scaled-axis-one"))
    operators = [node.op_type for node in result.model.graph.node]
    assert operators.count("Expand") == 2
    assert "Mul" not in operators  # the scale of the energies is in the query's projection


def test_the_rest_stays_and_metadata_is_inherited(corpus):
    model = corpus.graph("bmm")
    result = rewrite(model)
    kept = {node.name: node for node in result.model.graph.node}
    for node in model.graph.node:
        if node.name in kept and not any("scaled" in name for name in kept[node.name].input):
            assert kept[node.name] == node
    assert [item.module for item in result.accepted] == ["cca", "cca"]
    assert [module_path(node) for node in plugin_nodes(result.model)] == ["cca", "cca"]
    assert [item.node for item in result.accepted] == [node.name for node in plugin_nodes(result.model)]
    assert len({node.name for node in result.model.graph.node}) == len(result.model.graph.node)


def test_refusal_names_module_and_node(corpus):
    zoo = corpus.zoo
    result = rewrite(zoo.export(zoo.Network(zoo.AlmostCrissCross("two keys"), recurrences=1)))
    (refusal,) = result.refused
    assert refusal.module == "cca"
    assert "oftmax" in refusal.node


def test_mixed_gates_leave_the_gates_outside(corpus):
    """One model cannot hold an operation with and without its gate, so neither core takes its gate in."""
    gated = onnx.compose.add_prefix(corpus.graph("co-bmm"), "a_")
    plain = onnx.compose.add_prefix(corpus.zoo.export(corpus.zoo.CoAttention(gate=False), legacy=True), "b_")
    model = onnx.compose.merge_graphs(gated.graph, plain.graph, io_map=[])
    both = helper.make_model(model, opset_imports=gated.opset_import, ir_version=10)
    result = rewrite(both)
    assert [item.operation for item in result.accepted] == ["CoAttention", "CoAttention"]
    assert [len(node.input) for node in plugin_nodes(result.model)] == [4, 4]
    assert sum(node.op_type == "Sigmoid" for node in result.model.graph.node) == 2
    assert difference(result.model, both) <= 1e-5


def test_rewriting_twice_changes_nothing(corpus):
    once = rewrite(corpus.graph("bmm")).model
    again = rewrite(once)
    assert again.model is once
    assert again.accepted == ()


def test_result_does_not_depend_on_the_run(corpus):
    first, second = (rewrite(corpus.graph("co-bmm-dynamic")).model.SerializeToString() for _ in range(2))
    assert first == second


def chain(model: onnx.ModelProto, blocks: int) -> onnx.ModelProto:
    """Repeat the first recurrence of a network."""
    nodes = list(model.graph.node)
    start = next(index for index, node in enumerate(nodes) if node.op_type == "Relu")
    source = nodes[start].output[0]
    end = next(index for index, node in enumerate(nodes) if node.op_type == "Add" and source in node.input)
    block = nodes[start + 1 : end + 1]
    made = {name for node in block for name in node.output}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.value_info[:]
    result.graph.node.extend(nodes[: start + 1])
    current = source
    for number in range(blocks):
        for node in block:
            copy = result.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{number}/{node.name}"
            renamed = {name: f"{number}/{name}" for name in made} | {source: current}
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed[name] for name in node.output]
        current = f"{number}/{block[-1].output[0]}"
    head = result.graph.node.add()
    head.CopyFrom(nodes[-1])
    head.input[0] = current
    return result


def test_every_block_of_a_chain_is_found_and_equal_blocks_are_run_once(corpus, monkeypatch):
    """What makes long networks fast; benchmarks/rewrite_chain.py measures how fast."""
    runs = []
    compare = verify.Verifier._compare
    monkeypatch.setattr(verify.Verifier, "_compare", lambda *arguments: runs.append(1) or compare(*arguments))
    model = chain(corpus.graph("bmm"), 60)
    assert len(model.graph.node) >= 2460
    assert len(rewrite(model).accepted) == 60
    assert len(runs) == 1
