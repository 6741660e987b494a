"""Estimates: counts by hand, torch's count, ONNX Runtime's arena, and what cannot be estimated."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from edgeattn.blocks import BLOCKS
from edgeattn.export.estimate import estimate, image_sizes
from edgeattn.export.estimate.hardware import assumptions, roof_of
from edgeattn.export.estimate.measured import compare_measured
from edgeattn.export.estimate.operators import COSTS
from edgeattn.export.estimate.plot import roofline_plot
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import CRISS_CROSS_ATTENTION
from edgeattn.plugins_trt.variants import cost_of
from edgeattn.targets import TARGETS

ORIN = TARGETS.get("jetpack-6.2-orin-nx-16")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def parsed(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """Return a model from the signature and body of its graph, with initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18, "edgeattn": 1]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model)
    return model


def layers_of(model: onnx.ModelProto, **options) -> list[list[str]]:
    """Return the operators of every layer, read off the names that `parsed` models get."""
    names = {node.output[0]: node.op_type for node in model.graph.node}
    for node in model.graph.node:
        node.name = node.output[0]
    return [[names[name] for name in layer.nodes] for layer in estimate(model, ORIN, gains=False, **options).layers]


WEIGHT = np.ones((16, 16, 1, 1), np.float32)
CHAIN = """(float[1,16,10,12] x) => (float[1,16,10,12] y) {
    a = Conv (x, w)
    b = Add (a, x)
    y = Relu (b)
}"""


def test_a_fused_layer_is_counted_by_hand() -> None:
    found = estimate(parsed(CHAIN, w=WEIGHT), ORIN)
    (layer,) = found.layers
    elements = 16 * 10 * 12
    assert layer.kind == "convolution"
    assert layer.precision == "fp32"
    assert layer.macs == elements * 16
    assert layer.flops == 2 * layer.macs + 2 * elements
    assert layer.weight_bytes == found.weight_bytes == 4 * 256
    assert layer.bytes_moved == 2 * 4 * elements + 4 * 256  # x is read once, though two nodes read it
    assert found.peak_activation_bytes == 4 * elements  # the output alone
    assert found.input_bytes == 4 * elements
    efficiency = assumptions()["efficiency"]["convolution"]
    launch = assumptions()["launch"]["seconds"]
    roof = roof_of(ORIN)
    expected = launch[1] + max(
        2 * layer.macs / roof.tensor["fp32"] / efficiency["compute"][1],
        layer.bytes_moved / (102.4e9 * efficiency["bandwidth"][1]),
    )
    assert layer.seconds.typical == pytest.approx(expected)
    assert layer.seconds.low < layer.seconds.typical < layer.seconds.high
    assert found.seconds == layer.seconds


@pytest.mark.parametrize(
    ("body", "layers"),
    [
        pytest.param("a = Conv (x, w) s = Sigmoid (a) y = Mul (a, s)", [["Conv", "Sigmoid", "Mul"]], id="silu"),
        pytest.param(
            "a = Conv (x, w) b = Conv (x, w) c = Add (a, b) y = Relu (c)",
            [["Conv"], ["Conv", "Add", "Relu"]],
            id="the-later-convolution-takes-the-addition",
        ),
        pytest.param(
            "a = Conv (x, w) b = Relu (a) c = Conv (b, w) y = Add (b, c)",
            [["Conv", "Relu"], ["Conv", "Add"]],
            id="a-result-that-others-read-ends-a-layer",
        ),
        pytest.param("a = Sigmoid (x) b = Tanh (x) y = Mul (a, b)", [["Sigmoid", "Tanh", "Mul"]], id="pointwise"),
        pytest.param(
            "a = GlobalAveragePool (x) s = Sigmoid (a) y = Mul (x, s)",
            [["GlobalAveragePool"], ["Sigmoid"], ["Mul"]],
            id="broadcasting-starts-a-layer",
        ),
        pytest.param(
            "t = Transpose <perm = [0, 1, 3, 2]> (x) m = MatMul (x, t) y = Softmax (m)",
            [["MatMul"], ["Softmax"]],
            id="a-product-reads-transposed",
        ),
        pytest.param(
            "t = Transpose <perm = [0, 1, 3, 2]> (x) y = Softmax (t)",
            [["Transpose"], ["Softmax"]],
            id="others-do-not",
        ),
        pytest.param("f = Flatten (x) g = Relu (f) y = Reshape (g, shape)", [["Relu"]], id="views-are-free"),
        pytest.param(
            "h = Shape (x) s = Cast <to = 1> (h) p = ReduceProd <keepdims = 0> (s) y = Div (x, p)",
            [["Div"]],
            id="what-depends-on-sizes-is-folded",
        ),
    ],
)
def test_fusion(body: str, layers: list[list[str]]) -> None:
    shape = np.array([1, 16, 10, 12], np.int64)
    model = parsed(f"(float[1,16,10,12] x) => (float[N,C,H,W] y) {{ {body} }}", w=WEIGHT, shape=shape)
    assert layers_of(model) == layers


def test_quantisation_is_folded_into_the_layers() -> None:
    scale, zero = np.float32(0.1), np.int8(0)
    model = parsed(
        """(float[1,16,8,8] x) => (float[1,16,8,8] y) {
            q = QuantizeLinear (x, s, z)   d = DequantizeLinear (q, s, z)
            v = DequantizeLinear (w8, s, z)
            a = Conv (d, v)   r = Relu (a)
            q2 = QuantizeLinear (r, s, z)  d2 = DequantizeLinear (q2, s, z)
            y = Conv (d2, v)
        }""",
        s=scale,
        z=zero,
        w8=np.ones((16, 16, 1, 1), np.int8),
    )
    quantise, first, second = estimate(model, ORIN).layers
    assert (quantise.kind, quantise.precision) == ("pointwise", "fp32")
    assert (first.precision, second.precision) == ("int8", "int8")
    assert len(first.nodes) == 3  # Conv, Relu, QuantizeLinear
    assert first.weight_bytes == 256 + 4 + 1  # INT8, and scale and zero point of the QuantizeLinear behind it
    assert first.bytes_moved == 1024 + 1024 + first.weight_bytes
    assert estimate(model, ORIN).weight_bytes == 256 + 4 + 1  # shared


def test_memory_of_a_chain_by_hand() -> None:
    model = parsed(
        """(float[1,16,8,8] x) => (float[1,16,1,1] y) {
            a = Conv (x, w)  b = Softmax <axis = 1> (a)  c = Conv (b, w)  d = Concat <axis = 1> (b, c)
            e = GlobalAveragePool (d)  y = Conv (e, v)
        }""",
        w=WEIGHT,
        v=np.ones((16, 32, 1, 1), np.float32),
    )
    found = estimate(model, ORIN, gains=False)
    tensor = 4 * 16 * 8 * 8
    assert found.live_activation_bytes == 4 * tensor + 64  # b, c and d (twice as large); y
    assert found.peak_activation_bytes == found.live_activation_bytes
    assert found.layers[found.peak_layer].kind == "data movement"


def test_a_gap_that_is_too_small_is_not_used() -> None:
    model = parsed(
        """(float[1,16,8,8] x) => (float[1,1,1,1] y) {
            a = Softmax <axis = 1> (x)
            b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
            c = Concat <axis = 1> (a, a)
            d = Concat <axis = 1> (c, c)
            e = GlobalAveragePool (d)
            f = GlobalAveragePool (b)
            g = Concat <axis = 1> (e, f)
            y = ReduceMax <keepdims = 1> (g)
        }"""
    )
    found = estimate(model, ORIN, gains=False)
    assert found.peak_activation_bytes > found.live_activation_bytes


@functools.cache
def exported(name: str, size: int) -> tuple[onnx.ModelProto, torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return the plugin form of a block, the block, and its inputs; a Transformer has a length of its own."""
    spec = BLOCKS.get(name)
    variant = spec.variants[0]
    sizes = {**spec.sizes_of(variant)[0], "batch": 1, "height": size, "width": size + 4}
    module = spec.build(**variant.arguments).eval().requires_grad_(False)
    inputs = spec.example_inputs(variant, sizes)
    names = [entry.name for entry in spec.inputs_of(variant)]
    model = to_onnx(module, inputs, input_names=names, output_names=["output"], method=variant.method)
    return model, module, inputs


@pytest.mark.parametrize(("name", "size"), [("rcca", 12), ("resnest-bottleneck", 64), ("transformer-encoder-layer", 4)])
def test_flops_are_those_that_torch_counts(name: str, size: int) -> None:
    model, module, inputs = exported(name, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    found = estimate(model, ORIN, gains=False)
    assert 2 * found.macs == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found.macs > 0


@pytest.mark.parametrize("name", ["cbam", "resnest-bottleneck"])
def test_activations_are_the_arena_of_onnx_runtime(name: str, tmp_path: Path) -> None:
    model, _, _ = exported(name, 64)
    path = tmp_path / "model.onnx"
    onnx.save(inline_plugins(model), path)
    request = tmp_path / "request.json"
    found = estimate(path, ORIN, gains=False)
    request.write_text(json.dumps({"model": str(path), "defaults": False}))
    command = [sys.executable, str(BENCHMARKS / "onnx_arena.py"), str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scratch = 65536  # a convolution's own, which a large model does not notice and this one does
    arena = sum(size for size in json.loads(done.stdout)["extensions"] if size != scratch)
    assert found.peak_activation_bytes == pytest.approx(arena, rel=0.15)


def test_a_plugin_costs_what_its_declaration_says() -> None:
    model, _, _ = exported("rcca", 12)
    found = estimate(model, ORIN)
    plugins = [layer for layer in found.layers if layer.kind == "plugin"]
    assert len(plugins) == 2
    (node, _) = [node for node in model.graph.node if node.domain == "edgeattn"]
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    query, value = shapes[node.input[0]], shapes[node.input[2]]
    sizes = dict(zip(("batch", "head_channels", "height", "width"), query, strict=True)) | {"channels": value[1]}
    cost = cost_of(CRISS_CROSS_ATTENTION, "float32", ORIN.sm, sizes)
    assert plugins[0].flops == cost.flops
    assert plugins[0].bytes_moved == cost.bytes + 2 * cost.workspace_bytes
    gain = next(gain for gain in found.gains if gain.change == "plugins")
    plain = estimate(inline_plugins(model), ORIN)
    assert gain.present
    assert gain.bytes_saved == plain.bytes_moved - found.bytes_moved > 0
    assert plain.macs == found.macs
    other = next(gain for gain in plain.gains if gain.change == "plugins")
    assert other.applies
    assert not other.present


def test_gains_of_other_precisions() -> None:
    found = estimate(parsed(CHAIN, w=WEIGHT), ORIN)
    plugins, half, int8 = found.gains
    assert not plugins.applies
    assert half.bytes_saved == found.bytes_moved // 2
    assert half.weight_bytes_saved == found.weight_bytes // 2
    assert int8.weight_bytes_saved == 3 * found.weight_bytes // 4
    assert int8.seconds_saved.typical > 0


def test_tf32_and_the_rates_of_the_fp32_units() -> None:
    a100 = TARGETS.get("trt-10.13-a100-80")
    assert roof_of(a100).tensor["fp32"] == pytest.approx(19.5e12)
    assert roof_of(a100, tf32=True).tensor["fp32"] == pytest.approx(156e12)
    assert {target.sm for target in TARGETS} <= {int(sm) for sm in assumptions()["fp32"]["of_int8"]}


def test_every_kind_has_its_efficiency() -> None:
    kinds = {cost.kind for cost in COSTS.values()} - {"view"} | {"plugin", "other"}
    assert kinds == set(assumptions()["efficiency"])
    for entry in assumptions()["efficiency"].values():
        assert entry["reason"]
        for figures in (entry["compute"], entry["bandwidth"]):
            assert 1 > figures[0] > figures[1] > figures[2] > 0


def test_what_does_not_fit() -> None:
    small = dataclasses.replace(ORIN, memory_gib=0.25)
    found = estimate(parsed(CHAIN, w=WEIGHT), small)
    assert not found.fits
    assert found.required_bytes > found.available_bytes
    assert "0.25 GiB" in found.fit_reason


def test_an_operator_without_a_declaration_is_named() -> None:
    model = parsed("(float[1,16,8,8] x) => (float[1,16,8,8] y) { y = Hardmax (x) }")
    found = estimate(model, ORIN)
    assert "Hardmax" in found.notes[0]
    assert found.layers[0].kind == "other"
    assert found.layers[0].bytes_moved == 8 * 1024


FREE = "(float[batch,16,height,width] x) => (float[batch,16,height,width] y) { y = Conv (x, w) }"


def test_free_axes_need_sizes() -> None:
    model = parsed(FREE, w=WEIGHT)
    with pytest.raises(UserError, match=r"axis 0 \(batch\) of the input 'x'.*--size"):
        estimate(model, ORIN)
    sizes = image_sizes(model, size=(20, 30), batch=2)
    assert sizes == {"x": (2, 16, 20, 30)}
    assert estimate(model, ORIN, input_sizes=sizes).macs == 2 * 20 * 30 * 256
    with pytest.raises(UserError, match="no input 'z'"):
        estimate(model, ORIN, input_sizes={"z": (1,)})
    with pytest.raises(UserError, match=r"axis 1 .* cannot be 3"):
        estimate(model, ORIN, input_sizes={"x": (1, 3, 8, 8)})
    with pytest.raises(UserError, match="nothing to set"):
        image_sizes(parsed(CHAIN, w=WEIGHT), batch=2)
    with pytest.raises(UserError, match="fixed shape"):
        image_sizes(parsed(CHAIN, w=WEIGHT), size=(64, 64))


def test_a_target_without_figures_says_which_and_how_to_add_them() -> None:
    with pytest.raises(UserError, match=r"jetpack-6.2-orin does not state memory_gib.*targets\.toml"):
        estimate(parsed(CHAIN, w=WEIGHT), TARGETS.get("jetpack-6.2-orin"))
    with pytest.raises(UserError, match="does not state bandwidth_gb_s:"):
        estimate(parsed(CHAIN, w=WEIGHT), dataclasses.replace(ORIN, bandwidth_gb_s=None))


def test_control_flow_is_refused() -> None:
    model = parsed(
        "(bool c, float[4] x) => (float[4] y) "
        "{ y = If (c) <then_branch = a () => (float[4] p) { p = Relu (x) }, "
        "else_branch = b () => (float[4] q) { q = Neg (x) }> }"
    )
    with pytest.raises(UserError, match="is If"):
        estimate(model, ORIN)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no")
    for path in (tmp_path / "absent.onnx", tmp_path / "text.onnx"):
        with pytest.raises(UserError):
            estimate(path, ORIN)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    found = estimate(parsed(CHAIN, w=WEIGHT), ORIN)
    text = roofline_plot(found, tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "</svg>" in text
    with pytest.raises(UserError, match="known format"):
        roofline_plot(found, tmp_path / "plot.xyz")


def result_file(path: Path, **changes) -> Path:
    """Write a file as `benchmarks/gpu/run.py` does, with one timed kernel."""
    record = {
        "case": "c",
        "status": "ok",
        "workload": "criss-cross 97x97",
        "element": "float16",
        "contestant": "plugin",
        "layout": "linear",
        "cost": {"flops": 2_000_000_000, "bytes": 20_000_000, "workspace_bytes": 10_000_000},
        "calls": {"median": 50.0},
        "graph": {"median": 20.0},
    }
    others = [{**record, "contestant": "torch eager"}, {"case": "x", "status": "skipped"}]
    document = {
        "format": 1,
        "dry_run": False,
        "environment": {"gpu": {"name": "NVIDIA H200", "compute_capability": "9.0"}},
        "sections": {"speed": {"records": [record, *others]}},
    }
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_the_keys_of_measurements_are_those_that_the_benchmark_writes() -> None:
    source = (BENCHMARKS / "gpu" / "speed.py").read_text(encoding="utf-8")
    for key in ("workload", "element", "contestant", "layout", "cost", "calls", "graph"):
        assert f'"{key}"' in source
    results = (BENCHMARKS / "gpu" / "results.py").read_text(encoding="utf-8")
    assert "FORMAT = 1\n" in results


def test_measurements_are_compared(tmp_path: Path) -> None:
    target = TARGETS.get("trt-10.13-h200")
    (entry,) = compare_measured(result_file(tmp_path / "r.json"), target)
    assert entry.measured_seconds == pytest.approx(20e-6)
    assert entry.error == pytest.approx(entry.estimated.typical / 20e-6 - 1)
    assert entry.within_band == (entry.estimated.low <= 20e-6 <= entry.estimated.high)
    with pytest.raises(UserError, match="measured on NVIDIA H200"):
        compare_measured(result_file(tmp_path / "r.json"), ORIN)
    with pytest.raises(UserError, match="measured on NVIDIA H200"):
        compare_measured(result_file(tmp_path / "r.json"), TARGETS.get("trt-10.13-h100"))
    with pytest.raises(UserError, match="dry run"):
        compare_measured(result_file(tmp_path / "r.json", dry_run=True), target)
    with pytest.raises(UserError, match="format 1"):
        compare_measured(result_file(tmp_path / "r.json", format=2), target)
    with pytest.raises(UserError, match="no timed plugin kernel"):
        compare_measured(result_file(tmp_path / "r.json", sections={}), target)
