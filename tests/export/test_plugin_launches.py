"""One node per kernel launch: the expanded graph computes what the bodies compute, and says so in the same words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.export import plugin_launches
from edgeattn.export.metadata import NAME_SCOPES, metadata_of
from edgeattn.export.plugin_launches import expand_launches
from edgeattn.export.surgery import attach_plugins, strip_bodies
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGINS, PluginSpec
from edgeattn.plugins_trt.expressions import evaluate
from edgeattn.plugins_trt.launch_plugins import LaunchPlugin, launch_plugins
from edgeattn.plugins_trt.variants import variants_of

SM = 87
SIZES = {
    "batch": 2,
    "channels": 40,
    "head_channels": 9,
    "height": 35,
    "width": 6,
    "height_a": 7,
    "width_a": 10,
    "height_b": 4,
    "width_b": 9,
    "queries": 37,
    "keys": 19,
    "1": 1,
}
BOUND = {np.float32: 1e-5, np.float16: 2e-3}
WITH_LAUNCHES = [spec for spec in PLUGINS if spec.launches]


def launch_operators(layout: str = "linear") -> list[type[OpRun]]:
    """Return reference operators for all launches: the Triton kernels in the interpreter, on poisoned outputs."""
    return [
        type(plugin.name, (OpRun,), {"op_domain": DOMAIN, "_run": partial(_run, plugin, layout)})
        for plugin in launch_plugins()
    ]


def _run(plugin: LaunchPlugin, layout: str, *arrays: Any, **_: Any) -> tuple[np.ndarray, ...]:
    """Run one launch, knowing no more than TensorRT does: the tensors that it reads."""
    import torch

    from edgeattn.plugins_trt.torch_host import kernel_function

    def laid_out(tensor: torch.Tensor, follows: bool) -> torch.Tensor:
        last = follows and layout == "channels-last"
        return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    inputs = [
        laid_out(torch.from_numpy(np.ascontiguousarray(array)), tensor.follows_layout)
        for tensor, array in zip(plugin.reads, arrays, strict=True)
    ]
    element = next(
        str(item.dtype) for item, tensor in zip(inputs, plugin.reads, strict=True) if tensor.element == "data"
    )
    element = element.removeprefix("torch.")
    sizes = plugin.sizes({tensor.name: array.shape for tensor, array in zip(plugin.reads, arrays, strict=True)})
    static = {**dict.fromkeys(plugin.spec.static, 1), **sizes}
    variant = next(
        item for item in variants_of(plugin.spec, element, layout, SM, static) if item.launch is plugin.launch
    )
    scope = {**sizes, **variant.scope}
    outputs = []
    for tensor in plugin.writes:
        kind = getattr(torch, element if tensor.element == "data" else tensor.element)
        shape = [evaluate(axis, scope) for axis in tensor.axes]
        outputs.append(laid_out(torch.full(shape, torch.nan, dtype=kind), tensor.follows_layout))
    kernel_function(plugin.launch.kernel)[tuple(variant.grid(sizes))](
        *inputs,
        *variant.scalars(sizes),
        *outputs,
        **variant.constants,
        num_warps=variant.warps,
        num_stages=variant.stages,
    )
    return tuple(output.contiguous().numpy() for output in outputs)


def one_call(spec: PluginSpec, kind: type = np.float32) -> onnx.ModelProto:
    """Return the plugin form of a model that only calls the operation, with metadata as torch's exporter leaves it."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))

    def info(tensors: tuple) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(tensor.name, element, [SIZES[axis] for axis in tensor.shape])
            for tensor in tensors
        ]

    node = helper.make_node(
        spec.op_type, [t.name for t in spec.inputs], [t.name for t in spec.outputs], name="call", domain=DOMAIN
    )
    node.metadata_props.add(key=NAME_SCOPES, value="['', 'head', 'head.attention', 'call']")
    graph = helper.make_graph([node], "one call", info(spec.inputs), info(spec.outputs))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return attach_plugins(model, fp32_island=kind is np.float16)


def feed(spec: PluginSpec, kind: type) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {t.name: rng.standard_normal([SIZES[axis] for axis in t.shape]).astype(kind) for t in spec.inputs}


def body_results(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def assert_near(actual: np.ndarray, wanted: np.ndarray, bound: float) -> None:
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    difference = np.linalg.norm(np.float64(actual) - np.float64(wanted))
    assert difference <= bound * np.linalg.norm(np.float64(wanted)), difference / np.linalg.norm(np.float64(wanted))


@pytest.mark.parametrize("spec", WITH_LAUNCHES, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("kind", "layout"), [(np.float32, "channels-last"), (np.float16, "linear")])
def test_launches_compute_what_the_body_computes(spec: PluginSpec, kind: type, layout: str) -> None:
    model = one_call(spec, kind)
    result = expand_launches(model)
    onnx.checker.check_model(result.model)
    inputs = feed(spec, kind)
    evaluator = ReferenceEvaluator(result.model, new_ops=launch_operators(layout))
    for actual, wanted in zip(evaluator.run(None, inputs), body_results(model, inputs), strict=True):
        assert_near(actual, wanted, BOUND[kind])


@pytest.mark.parametrize("spec", WITH_LAUNCHES, ids=lambda spec: spec.name)
def test_nodes_are_what_the_parser_looks_for(spec: PluginSpec) -> None:
    result = expand_launches(one_call(spec, np.float16))
    nodes = result.model.graph.node
    assert [node.op_type for node in nodes] == [plugin.name for plugin in launch_plugins([spec])]
    for node, launch in zip(nodes, spec.launches, strict=True):
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        assert attributes == {"plugin_namespace": b"edgeattn", "plugin_version": b"1", "aot": 1}
        assert node.domain == "edgeattn"
        assert metadata_of(node)[NAME_SCOPES] == "['', 'head', 'head.attention', 'call']"
        assert node.name == f"call/{launch.name}"
        assert len(node.input) == len(launch.reads)
        assert len(node.output) == len(launch.writes)
    assert not result.model.functions
    assert result.expanded == ("call",)
    assert not result.kept
    assert not result.notes


@pytest.mark.parametrize("spec", WITH_LAUNCHES, ids=lambda spec: spec.name)
def test_types_of_the_tensors_between_are_declared(spec: PluginSpec) -> None:
    model = expand_launches(one_call(spec, np.float16)).model
    declared = {value.name.removeprefix("call/"): value.type.tensor_type for value in model.graph.value_info}
    assert declared.keys() == {buffer.name for buffer in spec.workspaces}
    for plugin in launch_plugins([spec]):
        for tensor in plugin.writes:
            if tensor.name in declared:
                kind = declared[tensor.name]
                assert kind.elem_type == (TensorProto.FLOAT16 if tensor.element == "data" else TensorProto.FLOAT)
                sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
                assert sizes == [SIZES.get(axis) for axis in tensor.axes]
                assert SIZES["batch"] in sizes


def two_calls() -> onnx.ModelProto:
    """Two calls that share tensors, at dynamic sizes, with names that the new ones could meet."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "edgeattn" : 1]>'
        "g (float[n, 4, h, w] q, float[n, 4, h, w] k, float[n, 20, h, w] v) => (float[n, 20, h, w] z)"
        "{ y = edgeattn.CrissCrossAttention (q, k, v, v) w_ = Relu (y) z = edgeattn.CrissCrossAttention (q, k, w_, y) }"
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    model.graph.node[1].output[0] = model.graph.node[2].input[2] = "node_0/partial"
    return attach_plugins(model)


def test_several_calls_of_dynamic_size() -> None:
    model = two_calls()
    before = model.SerializeToString()
    result = expand_launches(model)
    assert model.SerializeToString() == before
    assert result.expanded == ("node_0", "node_2")
    outputs = [name for node in result.model.graph.node for name in node.output]
    assert len(set(outputs)) == len(outputs)
    shapes = {value.name: value.type.tensor_type.shape for value in result.model.graph.value_info}
    assert [dim.dim_param or dim.dim_value for dim in shapes["node_2/partial"].dim] == ["n", "h", "w", 20]
    rng = np.random.default_rng(1)
    shapes_of = {"q": (1, 4, 5, 9), "k": (1, 4, 5, 9), "v": (1, 20, 5, 9)}
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes_of.items()}
    evaluator = ReferenceEvaluator(result.model, new_ops=launch_operators())
    assert_near(evaluator.run(None, inputs)[0], body_results(model, inputs)[0], 1e-5)
    stripped = expand_launches(strip_bodies(model))
    assert stripped.model == result.model


def test_operations_without_kernels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = plugin_launches.launch_plugins_of
    monkeypatch.setattr(
        plugin_launches,
        "launch_plugins_of",
        lambda spec: () if spec.name == "PixelAttention" else everything(spec),
    )
    model = attach_plugins(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 18, "edgeattn" : 1]>'
            "g (float[1, 4, 5, 9] q, float[1, 4, 5, 9] k, float[1, 4, 5, 9] v, float[1, 4, 9] p) => "
            "(float[1, 4, 5, 9] y, float[1, 4, 9] z)"
            "{ y = edgeattn.CrissCrossAttention (q, k, v, v) z = edgeattn.PixelAttention (p, p, p) }"
        )
    )
    result = expand_launches(model)
    assert list(result.kept.values()) == ["PixelAttention"]
    assert [function.name for function in result.model.functions] == ["PixelAttention"]
    assert "PixelAttention) runs its body" in result.notes[0]
    kept = next(node for node in model.graph.node if node.op_type == "PixelAttention")
    assert kept.input == next(node for node in result.model.graph.node if node.op_type == "PixelAttention").input


def test_unread_outputs_are_named_and_missing_ones_refused() -> None:
    spec = PLUGINS.get("CoAttention")
    model = one_call(spec)
    model.graph.node[0].output[1] = ""
    del model.graph.output[1]
    merge = expand_launches(model).model.graph.node[-1]
    assert list(merge.output) == ["attended_a", "call/attended_b"]
    del model.graph.node[0].output[1]
    with pytest.raises(UserError, match=r"'call' .* has 1 outputs, and its kernels write 2"):
        expand_launches(model)
    model.graph.node[0].op_type = "Attention"
    with pytest.raises(UserError, match="no operation Attention"):
        expand_launches(model)


@pytest.fixture(scope="module")
def ccnet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A static CCNet run for a target that takes Python plugins; returns the path of one of its files."""
    folder = tmp_path_factory.mktemp("run")
    request = ExportRequest(
        "ccnet-digits", size=(40, 56), fp16=True, plugins=True, target="jetpack-7.2-orin", plugin_host="python",
        sample_count=1,
    )  # fmt: skip
    ExportRun(request, folder).make_forms()
    return folder.joinpath


@pytest.mark.parametrize(("precision", "bound"), [("", 1e-5), (".fp16", 2e-3)])
def test_trained_network_end_to_end(ccnet: Callable[[str], Path], precision: str, bound: float) -> None:
    form, launches = ccnet(f"model.plugin{precision}.onnx"), ccnet(f"model.plugin{precision}.launches.onnx")
    expanded = onnx.load(launches)
    operators = [node.op_type for node in expanded.graph.node if node.domain == DOMAIN]
    assert operators == ["CrissCrossAttentionColumns", "CrissCrossAttentionRows"] * 2
    scopes = {metadata_of(node)[NAME_SCOPES] for node in onnx.load(form).graph.node if node.domain == DOMAIN}
    assert {metadata_of(node)[NAME_SCOPES] for node in expanded.graph.node if node.domain == DOMAIN} == scopes
    image = np.random.default_rng(2).standard_normal((1, 3, 40, 56)).astype(np.float32)
    evaluator = ReferenceEvaluator(expanded, new_ops=launch_operators())
    for actual, wanted in zip(evaluator.run(None, {"image": image}), body_results(form, {"image": image}), strict=True):
        assert_near(actual, wanted, bound)


def test_files_for_a_target_with_python_plugins(ccnet: Callable[[str], Path]) -> None:
    names = {path.name for path in ccnet("").iterdir() if path.suffix == ".onnx"}
    assert names == {
        f"model{kind}{precision}{form}.onnx"
        for precision in ("", ".fp16")
        for kind, form in (("", ""), (".plugin", ""), (".plugin", ".launches"))
    }
    assert onnx.load(ccnet("model.plugin.onnx")).functions
    assert not onnx.load(ccnet("model.plugin.launches.onnx")).functions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugin_host": "rust"}, "unknown plugin host 'rust'. Choose cpp or python"),
        ({"plugin_host": "python"}, "no plugin form. Add --plugins"),
        ({"plugin_host": "python", "plugins": True}, "Name the target"),
        (
            {"plugin_host": "python", "plugins": True, "target": "jetpack-7.0-thor"},
            r"jetpack-7.0-thor has TensorRT 10.13, and Python plugins need 10.15",
        ),
    ],
)
def test_hosts_that_cannot_run_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ExportRun(ExportRequest("ccnet-digits", **options), tmp_path)
