"""INT8 quantisation with and without plugin nodes, and FP16 around it."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from edgeattn.export.calibration import calibration_samples, input_shapes
from edgeattn.export.conformance import check_qdq
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import to_int8
from edgeattn.export.precision_types import check_types
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import spec_of

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
        model.functions.append(spec_of("CrissCrossAttention", 4).function(18))
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
    folder = Path(tempfile.gettempdir())
    mine = {path.name for path in folder.iterdir() if path.name.startswith(("edgeattn-", "ort.quant"))}
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        result = to_int8(model, calibration_samples(samples, inputs=input_shapes(model)), progress=calls.append)
    assert calls == list(range(1, 11))
    assert not caplog.records
    left = {path.name for path in folder.iterdir() if path.name.startswith(("edgeattn-", "ort.quant"))}
    assert left <= mine
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
