"""INT8 quantisation with and without plugin nodes, and FP16 around it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from edgeattn.export import int8_smoothing
from edgeattn.export.calibration import calibration_samples, input_shapes
from edgeattn.export.calibration_methods import METHODS
from edgeattn.export.calibration_statistics import ActivationStatistics, ChannelStatistics
from edgeattn.export.conformance import check_qdq
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import Int8Options, quantise, to_int8
from edgeattn.export.precision_types import check_types
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import spec_of
from edgeattn.plugins_trt.onnx_form import local_function

SCOPES = "pkg.torch.onnx.name_scopes"
STEM = """
    stem = Conv <pads = [1, 1, 1, 1]> (image, w_stem, b_stem)
    stem_relu = Relu (stem)
    mid = Conv <pads = [1, 1, 1, 1]> (stem_relu, w_mid)
    feature = Add (mid, stem_relu)
    query = Conv (feature, w_q)
    key = Conv (feature, w_k)
    value = Conv (feature, w_v)
"""
PLUGIN = """
    attended = edgeattn.CrissCrossAttention <plugin_namespace = "edgeattn", plugin_version = "1">
        (query, key, value, feature)
    again = Conv <pads = [1, 1, 1, 1]> (attended, w_mid)
    both = Concat <axis = 1> (again, feature)
    logits = Conv (both, w_head)
"""
PLAIN = """
    shape = Shape (feature)
    flat = Constant <value = int64[3] {0, 0, -1}> ()
    query_flat = Reshape (query, flat)
    key_flat = Reshape (key, flat)
    value_flat = Reshape (value, flat)
    query_rows = Transpose <perm = [0, 2, 1]> (query_flat)
    energy = MatMul (query_rows, key_flat)
    attention = Softmax <axis = -1> (energy)
    attention_t = Transpose <perm = [0, 2, 1]> (attention)
    context = MatMul (value_flat, attention_t)
    context_map = Reshape (context, shape)
    attended = Add (context_map, feature)
    again = Conv <pads = [1, 1, 1, 1]> (attended, w_mid)
    both = Concat <axis = 1> (again, feature)
    logits = Conv (both, w_head)
"""
WEIGHTS = {
    "w_stem": (8, 3, 3, 3), "b_stem": (8,), "w_mid": (8, 8, 3, 3), "w_q": (4, 8, 1, 1), "w_k": (4, 8, 1, 1),
    "w_v": (8, 8, 1, 1), "w_head": (5, 16, 1, 1), "w_blur": (4, 4, 1, 1),
}  # fmt: skip


def build(body: str, *, plugin: bool) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "edgeattn": 1], producer_name: "test">\n'
        f"net (float[batch,3,height,width] image) => (float[batch,5,height,width] logits) {{{STEM}{body}}}"
    )
    rng = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        weight = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        module = "head.cca" if node.output[0] in {"query", "key", "value", "attended"} else "trunk"
        node.metadata_props.add(key=SCOPES, value=f"['', '{module}', '{node.output[0]}']")
    model.metadata_props.add(key="origin", value="test")
    if plugin:
        model.functions.append(local_function(spec_of("CrissCrossAttention", 4), 18))
    check_types(model)
    feature = onnx.helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", 8, "height", "width"])
    model.graph.value_info.append(feature)
    return model


@pytest.fixture(scope="module", params=["plugin", "plain"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return build(PLUGIN if request.param == "plugin" else PLAIN, plugin=request.param == "plugin")


@pytest.fixture(scope="module")
def samples() -> list[dict[str, np.ndarray]]:
    """Smooth random fields: stand-ins for images, since these networks are random too."""
    rng = np.random.default_rng(1)
    coarse = rng.standard_normal((10, 3, 5, 4)).astype(np.float32)
    return [{"image": image[None].repeat(2, 2).repeat(2, 3)} for image in coarse]


def run(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


def relative(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def test_quantised_model(model: onnx.ModelProto, samples: list, caplog: pytest.LogCaptureFixture) -> None:
    before = model.SerializeToString()
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        result = to_int8(model, calibration_samples(samples, inputs=input_shapes(model)), progress=calls.append)
    assert calls == list(range(1, 11))
    assert not caplog.records
    assert model.SerializeToString() == before
    assert check_qdq(result) == []
    assert result.SerializeToString() == to_int8(model, samples).SerializeToString()
    counts = Counter(node.op_type for node in result.graph.node)
    assert counts["Conv"] == 7
    assert counts["QuantizeLinear"] == 5  # image, stem_relu, feature, attended, both: shared where tensors are
    assert counts["DequantizeLinear"] == 5 + 6  # and one for each weight, w_mid's shared by two convolutions
    assert 1e-4 < relative(run(result, samples[9]["image"]), run(model, samples[9]["image"])) < 0.05


def test_everything_else_survives(model: onnx.ModelProto, samples: list) -> None:
    result = to_int8(model, samples)
    assert (result.ir_version, result.producer_name) == (10, "test")
    for field in ("opset_import", "functions", "metadata_props"):
        assert list(getattr(result, field)) == list(getattr(model, field))
    assert list(result.graph.input) == list(model.graph.input)
    assert list(result.graph.output) == list(model.graph.output)
    assert list(result.graph.value_info) == list(model.graph.value_info)  # no invented sizes
    nodes = {node.name: node for node in result.graph.node}
    assert len(nodes) == len(result.graph.node)
    for node in model.graph.node:
        assert metadata(nodes[node.name]) == metadata(node)
    assert all(SCOPES in metadata(node) for node in nodes.values())
    assert metadata(nodes["w_q_DequantizeLinear"])[SCOPES] == "['', 'head.cca', 'query']"


def test_who_reads_quantised_tensors(model: onnx.ModelProto, samples: list) -> None:
    nodes = {node.name: node for node in to_int8(model, samples).graph.node}
    quantised = "feature_DequantizeLinear_Output"
    assert nodes["node_query"].input[0] == quantised
    assert quantised not in nodes["node_both"].input
    for name in ("node_attended", "node_shape"):
        original = next((node for node in model.graph.node if node.name == name), None)
        if original is not None and original.op_type != "Add":
            assert list(nodes[name].input) == list(original.input)


def test_weights_and_scales(samples: list) -> None:
    model = build(PLUGIN, plugin=True)
    result = to_int8(model, samples)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w_stem")
    largest = np.abs(weight).max(axis=(1, 2, 3))
    np.testing.assert_allclose(tensors["w_stem_scale"], largest / 127, rtol=1e-2)
    scale = tensors["w_stem_scale"][:, None, None, None]
    assert np.all(np.abs(tensors["w_stem_quantized"] * scale - weight) <= 0.501 * scale)
    peak = max(np.abs(sample["image"]).max() for sample in samples)
    np.testing.assert_allclose(tensors["image_scale"], peak / 127, rtol=1e-2)
    assert tensors["b_stem"].dtype == np.float32


@pytest.mark.parametrize("entry", ["head.cca", "head", "node_query"])
def test_exclude(samples: list, entry: str) -> None:
    result = to_int8(build(PLUGIN, plugin=True), samples, exclude=[entry])
    nodes = {node.name: node for node in result.graph.node}
    assert list(nodes["node_query"].input) == ["feature", "w_q"]
    expected = "feature_DequantizeLinear_Output" if entry == "node_query" else "feature"
    assert nodes["node_key"].input[0] == expected
    assert nodes["node_mid"].input[0] == "stem_relu_DequantizeLinear_Output"


def test_fp16_around_int8(model: onnx.ModelProto, samples: list) -> None:
    int8 = to_int8(model, samples)
    result = to_fp16(int8)
    assert check_qdq(result.model) == []
    assert result.model.SerializeToString() == to_fp16(int8).model.SerializeToString()
    opsets = {entry.domain: entry.version for entry in result.model.opset_import}
    assert opsets[""] == 19
    assert all(entry.version == 19 for f in result.model.functions for entry in f.opset_import if not entry.domain)
    types = {tensor.name: tensor.data_type for tensor in result.model.graph.initializer}
    half = [name for name in types if name.endswith("_scale") and name != "image_scale"]
    assert {types[name] for name in half} == {TensorProto.FLOAT16}
    assert len(half) == 10
    assert types["image_scale"] == TensorProto.FLOAT  # the image itself is quantised, in its own FP32
    image = samples[9]["image"]
    reference, rounded = run(int8, image), run(emulate_fp16(result.model), image)
    error = relative(reference, run(model, image))
    assert relative(rounded, run(model, image)) < 1.25 * error


def test_attention_maps_are_not_quantised(samples: list) -> None:
    """A convolution over an attention map stays in floating point instead of breaking the rules."""
    body = """
        flat = Constant <value = int64[3] {0, 0, -1}> ()
        query_flat = Reshape (query, flat)
        attention = Softmax <axis = -1> (query_flat)
        shape = Shape (query)
        map = Reshape (attention, shape)
        blurred = Conv (map, w_blur)
        both = Concat <axis = 1> (blurred, key, feature)
        logits = Conv (both, w_head)
    """
    model = build(body, plugin=False)
    result = to_int8(model, samples)
    nodes = {node.name: node for node in result.graph.node}
    assert list(nodes["node_blurred"].input) == ["map", "w_blur"]
    assert check_qdq(result) == []


def test_refusals(samples: list) -> None:
    model = build(PLUGIN, plugin=True)
    with pytest.raises(UserError, match="too few"):
        to_int8(model, samples[:3])
    with pytest.raises(UserError, match=r"exclude names 'hed'.*head"):
        to_int8(model, samples, exclude=["hed"])
    with pytest.raises(UserError, match="no convolution"):
        to_int8(model, samples, exclude=["trunk", "head"])
    with pytest.raises(UserError, match="quantised already"):
        to_int8(to_int8(model, samples), samples)
    with pytest.raises(UserError, match="FP16"):
        to_int8(to_fp16(model).model, samples)
    with pytest.raises(UserError, match="but not 'image'"):
        to_int8(model, [{"picture": sample["image"]} for sample in samples])
    old = build(PLAIN, plugin=False)
    old.opset_import[0].version = 12
    with pytest.raises(UserError, match=r"opset 12|inconsistent"):
        to_int8(old, samples)


def transformer(*, outliers: float = 1.0) -> onnx.ModelProto:
    """A norm read by two linear layers and a residual addition; a Gemm; a norm that only one layer reads."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>\n'
        "net (float[batch,6,16] x) => (float[rows,5] y) {"
        """
            normed = LayerNormalization (x, scale_1, shift_1)
            queries = MatMul (normed, w_q)
            keys = MatMul (normed, w_k)
            queries_b = Add (queries, b_q)
            mixed = Mul (queries_b, keys)
            summed = Add (mixed, normed)
            again = LayerNormalization (summed, scale_2, shift_2)
            hidden = MatMul (again, w_h)
            hidden_relu = Relu (hidden)
            flat = Constant <value = int64[2] {-1, 16}> ()
            rows = Reshape (hidden_relu, flat)
            y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (rows, w_g, b_g)
        }"""
    )
    rng = np.random.default_rng(5)
    shapes = {"w_q": (16, 16), "w_k": (16, 16), "w_h": (16, 16), "w_g": (5, 16), "b_q": (16,), "b_g": (5,)}
    arrays = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    spread = np.where(np.arange(16) % 5 == 2, outliers, 1.0)  # a few large channels, as LayerNorm gives
    for index in (1, 2):
        arrays |= {f"scale_{index}": spread, f"shift_{index}": 0.1 * spread}
    for name in ("w_q", "w_k", "w_h"):
        arrays[name] = arrays[name] / spread[:, None]
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
        node.metadata_props.add(key=SCOPES, value=f"['', 'layer', '{node.output[0]}']")
    check_types(model)
    return model


def tokens(count: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal((1, 6, 16)).astype(np.float32)} for _ in range(count)]


def run_tokens(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, batch)[0] for batch in tokens(4)])


def test_linear_layers() -> None:
    model = transformer()
    result = quantise(model, tokens())
    assert set(result.layers) == {"node_queries", "node_keys", "node_hidden", "node_y"}
    assert not result.float_layers
    assert not result.rescaled
    assert check_qdq(result.model) == []
    nodes = {node.name: node for node in result.model.graph.node}
    producers = {name: node for node in result.model.graph.node for name in node.output}
    for name in result.layers:
        assert nodes[name].op_type == "MatMul"
        weight = producers[nodes[name].input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert weight.attribute[0].i == 1
        assert SCOPES in metadata(weight)
    assert nodes["node_queries"].input[0] == nodes["node_keys"].input[0]  # one Q/DQ for both
    assert list(nodes["node_summed"].input) == ["mixed", "normed"]  # what leads to a norm stays in floating point
    assert {tensor.data_type for tensor in result.model.graph.initializer if tensor.name.startswith("b_")} == {1}
    assert 1e-4 < relative(run_tokens(result.model), run_tokens(model)) < 0.02
    half = emulate_fp16(to_fp16(result.model).model)
    assert relative(run_tokens(half), run_tokens(model)) < 0.02


def test_large_channels_are_moved_into_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(outliers=60.0)
    result = quantise(model, tokens())
    assert {"normed", "again"} <= set(result.rescaled)
    nodes = {node.name: node for node in result.model.graph.node}
    producers = {name: node for node in result.model.graph.node for name in node.output}
    # The residual addition also reads the first norm, so its layers get a product; the second norm takes the factors.
    assert list(nodes["node_normed"].input) == list(model.graph.node[0].input)
    assert producers[producers[producers[nodes["node_queries"].input[0]].input[0]].input[0]].op_type == "Mul"
    assert nodes["node_again"].input[1] == "scale_2_rescaled"
    assert not {"w_q", "w_k", "w_h", "scale_2"} & {tensor.name for tensor in result.model.graph.initializer}
    assert check_qdq(result.model) == []
    monkeypatch.setattr(int8_smoothing, "STRENGTHS", (0.0,))
    monkeypatch.setattr(int8_smoothing, "GAIN", np.inf)
    plain = quantise(model, tokens(), Int8Options(minimum_snr=-np.inf))
    assert not plain.rescaled
    assert min(result.layers.values()) > min(plain.layers.values()) + 6
    assert relative(run_tokens(result.model), run_tokens(model)) < 0.02


def test_rescaling_is_exact() -> None:
    model = transformer(outliers=60.0)
    working = onnx_ir.from_proto(model)
    rng = np.random.default_rng(0)
    factors = {name: rng.uniform(0.1, 10, 16).astype(np.float32) for name in ("normed", "again")}
    int8_smoothing.rescale(working.graph, factors, {"node_queries", "node_keys", "node_hidden"}, set())
    assert relative(run_tokens(onnx_ir.to_proto(working)), run_tokens(model)) < 1e-6


def test_strength_is_judged_by_data_that_did_not_choose_it() -> None:
    """Where each half of the data has peaks of its own, rescaling to the peaks seen would clip those unseen."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((256, 32)).astype(np.float32)
    weight = rng.standard_normal((32, 16)).astype(np.float32)
    large = np.where(np.arange(32) == 3, 40.0, 1.0).astype(np.float32)

    def halves(first: np.ndarray, second: np.ndarray) -> ActivationStatistics:
        described = (ChannelStatistics(np.abs(part).max(axis=0, initial=0), part) for part in (first, second))
        return ActivationStatistics(halves=tuple(described))  # type: ignore[arg-type]

    stable = int8_smoothing.choose_factors(halves(rows * large, rows[::-1] * large), [weight])
    assert stable is not None
    assert stable[3] == stable.max()
    assert int8_smoothing.choose_factors(halves(rows * large, rows * large[::-1]), [weight]) is None
    assert int8_smoothing.choose_factors(halves(rows * large, rows[:0]), [weight]) is None


def test_noisy_layers_stay_in_floating_point() -> None:
    """A few positions with huge numbers do not hide what INT8 does to all others."""
    model = transformer()
    batches = tokens()
    quiet = quantise(model, batches).layers
    model.graph.node[0].op_type = "Identity"
    del model.graph.node[0].input[1:]
    for batch in batches:
        batch["x"][0, 0] *= 300
    result = quantise(model, batches)
    assert set(result.float_layers) == {"node_queries", "node_keys"}
    for name, reason in result.float_layers.items():
        assert re.search(r"signal-to-noise ratio in INT8 is -?\d+\.\d dB, below 24 dB", reason)
        assert any(name in note for note in result.notes)
        assert quiet[name] > 30
    readers = {node.name: node for node in result.model.graph.node}
    assert list(readers["node_queries"].input) == ["normed", "w_q"]
    with pytest.raises(UserError, match="no layer of the ONNX model reaches"):
        quantise(model, batches, Int8Options(minimum_snr=90))


def test_shared_weights(samples: list) -> None:
    """A weight serves INT8 layers along one axis; layers that stay out keep their own form of it."""
    result = to_int8(build(PLUGIN, plugin=True), samples, exclude=["node_again"])
    nodes = {node.name: node for node in result.graph.node}
    assert nodes["node_again"].input[1] == "w_mid"
    assert nodes["node_mid"].input[1] == "w_mid_DequantizeLinear_Output"
    model = transformer()
    model.graph.node[7].input[1] = "w_k"
    result = to_int8(model, tokens())
    weights = [node for node in result.graph.node if node.op_type == "DequantizeLinear" and node.attribute]
    assert len(weights) == 3  # w_q, w_k for two layers, w_g


def test_attention_products(samples: list) -> None:
    model = build(PLAIN, plugin=False)
    products = {"node_energy", "node_context"}
    default = quantise(model, samples)
    assert products <= set(default.float_layers)
    asked = quantise(model, samples, Int8Options(attention=True, minimum_snr=0))
    assert products <= set(asked.layers)
    nodes = {node.name: node for node in asked.model.graph.node}
    producers = {name: node for node in asked.model.graph.node for name in node.output}
    for name in products:
        assert {producers[source].op_type for source in nodes[name].input} == {"DequantizeLinear"}
    assert nodes["node_attention"].input[0] == "energy"  # nothing between the energies and Softmax
    assert all("attention" in problem for problem in check_qdq(asked.model))  # the map, as asked for, and nothing else
    image = samples[9]["image"]
    assert relative(run(asked.model, image), run(model, image)) < 0.1
    assert any("no product" in note for note in quantise(transformer(), tokens(), Int8Options(attention=True)).notes)


def test_cache(tmp_path: Path) -> None:
    model = transformer(outliers=60.0)
    options = Int8Options(cache=tmp_path / "cache")
    first = quantise(model, tokens(), options)
    (entry,) = (tmp_path / "cache").iterdir()
    calls: list[int] = []
    second = quantise(model, tokens(), options, progress=calls.append)
    assert not calls  # no batch was run
    assert second.model.SerializeToString() == first.model.SerializeToString()
    assert (second.layers, second.notes) == (first.layers, first.notes)
    for damage in (b"{", entry.read_bytes().replace(b"thresholds", b"threshold "), b"[]"):
        entry.write_bytes(damage)
        again = quantise(model, tokens(), options)
        assert any(f"{entry.name} is damaged" in note for note in again.notes)
        assert again.model.SerializeToString() == first.model.SerializeToString()
        assert not quantise(model, tokens(), options).notes
    louder = [{"x": 2 * batch["x"]} for batch in tokens()]
    for other, data, method in (
        (model, louder, "minmax"),
        (transformer(), tokens(), "minmax"),
        (model, tokens(), "mse"),
    ):
        quantise(other, data, Int8Options(cache=tmp_path / "cache", method=method))
    assert len(list((tmp_path / "cache").iterdir())) == 4
    once = quantise(model, iter(tokens()), options)
    assert any("once only" in note for note in once.notes)
    assert once.model.SerializeToString() == first.model.SerializeToString()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="Give a folder"):
        quantise(model, tokens(), Int8Options(cache=file))


def test_methods(samples: list) -> None:
    model = build(PLAIN, plugin=False)
    peaks = quantise(model, samples)
    for method in METHODS:
        result = quantise(model, samples, Int8Options(method=method.name))
        assert check_qdq(result.model) == []
        if method.threshold is not None:
            assert scale_of(result.model, "feature_scale") <= scale_of(peaks.model, "feature_scale")
    with pytest.raises(UserError, match=r"'minmaks'.*minmax.*percentile.*entropy.*mse"):
        quantise(model, samples, Int8Options(method="minmaks"))


def scale_of(model: onnx.ModelProto, name: str) -> float:
    return float(next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name))
