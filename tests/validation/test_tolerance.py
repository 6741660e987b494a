"""Tolerances are derived, and never wider than the project's bars."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import CRISS_CROSS_ATTENTION
from edgeattn.plugins_trt.onnx_form import local_function
from edgeattn.validation.tolerance import Arithmetic, arithmetic_of, tolerance

ARITHMETIC = st.builds(
    Arithmetic, depth=st.integers(1, 1000), reduction=st.integers(1, 10**5), quantised=st.integers(0, 300)
)


@given(ARITHMETIC, st.floats(1e-3, 1e5), st.floats(1e-3, 1e5))
def test_never_wider_than_the_bars(arithmetic, peak, rms):
    assert 0 < tolerance("fp32", arithmetic, peak=peak, rms=rms).relative_l2 <= 1e-5
    assert tolerance("fp16", arithmetic, peak=peak, rms=rms).label_agreement >= 0.995
    assert tolerance("int8", arithmetic, peak=peak, rms=rms).task_drop <= 0.01


def test_short_arithmetic_gets_a_tighter_limit():
    shallow = tolerance("fp32", Arithmetic(1, 27, 0), peak=1.0, rms=1.0)
    deep = tolerance("fp32", Arithmetic(100, 4608, 0), peak=1.0, rms=1.0)
    assert shallow.relative_l2 == pytest.approx(4 * np.sqrt(2 * 27) * 2**-24)
    assert shallow.relative_l2 < deep.relative_l2 == 1e-5
    assert "2^-24" in shallow.derivation


def test_fp32_sums_stay_inside_the_derived_limit():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((400, 512)), rng.standard_normal((512, 30))
    exact = left.astype(np.float32).astype(np.float64) @ right.astype(np.float32).astype(np.float64)
    total = np.zeros(exact.shape, np.float32)
    for column, row in zip(left.astype(np.float32).T, right.astype(np.float32), strict=True):
        total += np.outer(column, row)
    relative = np.linalg.norm(total - exact) / np.linalg.norm(exact)
    limit = tolerance("fp32", Arithmetic(1, 512, 0), peak=1.0, rms=1.0).relative_l2
    assert limit / 100 < relative < limit


def test_unknown_precision_is_refused():
    with pytest.raises(UserError, match=r"'int4'.*fp32, fp16, int8"):
        tolerance("int4", Arithmetic(1, 1, 0), peak=1.0, rms=1.0)


def _model(nodes, initializers, functions=(), channels=4):
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, channels, "h", "w"])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", [image], [output], [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))


def test_arithmetic_reads_depth_reduction_and_quantisations():
    model = _model(
        [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
            helper.make_node("Conv", ["dq", "weight"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Sigmoid", ["b"], ["c"]),
            helper.make_node("Add", ["c", "b"], ["output"]),
        ],
        {
            "weight": np.zeros((8, 4, 3, 3), np.float32),
            "scale": np.float32(0.1).reshape(()),
            "zero": np.int8(0).reshape(()),
        },
    )
    assert arithmetic_of(model) == Arithmetic(depth=3, reduction=36, quantised=1)


def test_arithmetic_looks_into_plugin_functions():
    plugin = helper.make_node("CrissCrossAttention", ["image"] * 4, ["output"], domain="edgeattn")
    model = _model([plugin], {}, [local_function(CRISS_CROSS_ATTENTION, 18)])
    before = model.SerializeToString()
    # Two products in sequence, the softmax between them, and two additions behind.
    assert arithmetic_of(model).depth == 5
    assert model.SerializeToString() == before
