"""What a kernel library is to hold: sizes from presets, from the user, or from a trained model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import CRISS_CROSS_ATTENTION, DOMAIN, PLUGINS
from edgeattn.plugins_trt.model_operations import operations_of
from edgeattn.plugins_trt.selection import (
    Destination,
    Operation,
    destinations,
    pair_sms,
    parse_sizes,
    preset_operations,
    sized_operations,
    variants,
)
from edgeattn.plugins_trt.spec import ELEMENT_BYTES
from edgeattn.targets import SMS, TARGETS

SIZES = {"head_channels": 8, "channels": 24}
RUNNABLE = [spec for spec in PLUGINS if spec.launches]


def test_targets_of_one_architecture_share_what_suits_all() -> None:
    orin, newer = TARGETS.get("jetpack-6.2-orin"), TARGETS.get("jetpack-7.2-orin")
    assert orin.sm == newer.sm
    assert orin.ptx_isa < newer.ptx_isa
    found = destinations([newer.name, orin.name], {90: 88})
    assert found == {
        orin.sm: Destination(orin.ptx_isa, 1024 * orin.shared_memory_kib),
        90: Destination(88, SMS[90].shared_memory_bytes),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: destinations(), "nothing to build for"),
        (lambda: destinations(["jetpack-99"]), "jetpack-99"),
        (lambda: destinations([], {75: 80}), "sm_75"),
        (lambda: pair_sms([87], []), "87 and the PTX ISAs none are not pairs"),
        (lambda: pair_sms([87, 87], [85, 85]), "not pairs"),
        (lambda: preset_operations(["Nothing"]), "'Nothing' has kernels"),
        (lambda: sized_operations([{"channels": 4}], ["CrissCrossAttention"]), "compiles in head_channels, channels"),
        (lambda: parse_sizes("channels=64,"), "'channels=64,' are not"),
        (lambda: parse_sizes("channels=0"), "'channels=0' are not"),
        (lambda: parse_sizes("channels=70000"), "are not"),
    ],
)
def test_what_cannot_be_selected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_names_are_of_operations_or_operators() -> None:
    assert {operation.spec.name for operation in preset_operations()} == {spec.name for spec in RUNNABLE}
    assert {operation.spec.name for operation in preset_operations(["CoAttention"])} == {
        "CoAttention",
        "CoAttentionGated",
    }
    assert parse_sizes("head_channels=8, channels=24") == SIZES
    assert pair_sms([87, 90], [85, 88]) == {87: 85, 90: 88}


def test_variants_are_listed_once_in_both_layouts_where_there_are_maps() -> None:
    operation = Operation(CRISS_CROSS_ATTENTION, SIZES, ("float16",))
    listed = variants([operation, operation], [80, 87])
    assert [(item.sm, item.layout, item.launch.name) for item in listed] == [
        (sm, layout, launch.name)
        for sm in (80, 87)
        for layout in ("linear", "channels-last")
        for launch in CRISS_CROSS_ATTENTION.launches
    ]
    assert {item.element for item in variants([operation], [80], ["float32"])} == {"float32"}
    for spec in RUNNABLE:
        if not any(tensor.follows_layout for tensor in (*spec.inputs, *spec.outputs)):
            static = dict.fromkeys(spec.static, 64)
            assert {item.layout for item in variants([Operation(spec, static)], [80])} == {"linear"}


def recurrent(path: Path, *, element: int = TensorProto.FLOAT16) -> Path:
    """Write a model that calls criss-cross attention twice, the second time on the first result, without bodies."""
    channels = SIZES["channels"]
    numpy_type = np.float16 if element == TensorProto.FLOAT16 else np.float32
    nodes, weights = [], []
    for index in range(2):
        features = f"features{index}"
        for name, width in (("query", SIZES["head_channels"]), ("key", SIZES["head_channels"]), ("value", channels)):
            weight = np.zeros((width, channels, 1, 1), numpy_type)
            weights.append(numpy_helper.from_array(weight, f"{name}_weight{index}"))
            nodes.append(helper.make_node("Conv", [features, weights[-1].name], [f"{name}{index}"]))
        inputs = [*(f"{name}{index}" for name in ("query", "key", "value")), features]
        nodes.append(
            helper.make_node("CrissCrossAttention", inputs, [f"features{index + 1}"], name=f"cca{index}", domain=DOMAIN)
        )
    nodes.append(helper.make_node("Relu", ["features2"], ["output"]))
    shape = ["batch", channels, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [helper.make_tensor_value_info("features0", element, shape)],
        [helper.make_tensor_value_info("output", element, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_sizes_of_a_model_are_inferred_through_its_plugin_nodes(tmp_path: Path, element: int) -> None:
    name = {TensorProto.FLOAT16: "float16", TensorProto.FLOAT: "float32"}[element]
    found = operations_of(recurrent(tmp_path / "model.onnx", element=element))
    assert found == [Operation(CRISS_CROSS_ATTENTION, SIZES, (name,))]


@pytest.mark.parametrize("name", [spec.name for spec in RUNNABLE])
def test_sizes_of_every_operation_with_its_body(
    name: str, tmp_path: Path, one_node_model: Callable[..., onnx.ModelProto]
) -> None:
    spec = PLUGINS.get(name)
    sizes = {symbol: 4 for tensor in spec.inputs for symbol in tensor.shape} | {"1": 1}
    static = {size: 16 + index for index, size in enumerate(spec.static)}
    model = one_node_model(spec, TensorProto.BFLOAT16, 18, sizes | static, fp32_island=True)
    onnx.save(model, tmp_path / "model.onnx")
    assert operations_of(tmp_path / "model.onnx", [spec.op_type]) == [Operation(spec, static, ("bfloat16",))]


def _broken(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def break_(path: Path) -> None:
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)

    return break_


def _unknown_channels(model: onnx.ModelProto) -> None:
    del model.graph.initializer[:]
    names = [f"{name}_weight{index}" for index in range(2) for name in ("query", "key", "value")]
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names)


def _mixed_types(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 24, 4, 4]))
    model.graph.node[3].input[3] = "x"


def _other_rank(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 24]))
    model.graph.node[3].input[3] = "x"


def _other_size(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 23, 4, 4]))
    model.graph.node[3].input[3] = "x"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_broken(_unknown_channels), "'cca0' (CrissCrossAttention): head_channels cannot be inferred"),
        (_broken(_mixed_types), "types TensorProto.FLOAT, TensorProto.FLOAT16; kernels take one of"),
        (_broken(_other_rank), "input residual ('x') has the shape (1, 24), but needs 4 axes"),
        (_broken(_other_size), "channels is 23 in its input residual, but 24 in an earlier one"),
        (_broken(lambda model: model.graph.node[3].input.pop()), "CrissCrossAttention with 3 inputs"),
        (_broken(lambda model: setattr(model.graph.node[3], "op_type", "Other")), "no operation Other"),
        (
            _broken(lambda model: [setattr(node, "domain", "other") for node in model.graph.node]),
            "has no plugin nodes",
        ),
        (lambda path: path.unlink(), "cannot read the model"),
        (lambda path: path.write_bytes(b"no model"), "is not an ONNX model"),
    ],
)
def test_models_whose_kernels_cannot_be_chosen(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = recurrent(tmp_path / "model.onnx")
    damage(path)
    with pytest.raises(UserError, match=re.escape(message)):
        operations_of(path)


def test_operations_of_a_model_can_be_left_out(tmp_path: Path) -> None:
    path = recurrent(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="holds none of the chosen operations: CoAttention, CoAttentionGated"):
        operations_of(path, ["CoAttention"])


def test_operations_without_kernels_are_left_out_by_name_only(
    tmp_path: Path, one_node_model: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recurrent(tmp_path / "model.onnx")
    others = [spec for spec in RUNNABLE if spec.op_type != "CrissCrossAttention"]
    monkeypatch.setattr("edgeattn.plugins_trt.model_operations.chosen_specs", lambda names: others)
    with pytest.raises(UserError, match="'cca0' is CrissCrossAttention, which has no kernels"):
        operations_of(path)


def test_default_elements_are_all() -> None:
    assert preset_operations()[0].elements == tuple(ELEMENT_BYTES)
