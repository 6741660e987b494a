"""Contradictions among Q/DQ nodes: found on few numbers, and silent where nothing is wrong."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeattn.validation.qdq_consistency import contradictions


def _layer(weight: np.ndarray, scale: np.ndarray, axis: int, *, back: float = 0.1, zero: int = 0) -> onnx.ModelProto:
    """Return a quantised convolution of a quantised image; `back` and `zero` are those of the image's dequantiser."""
    stored = {
        "weight": weight,
        "steps": scale.astype(np.float32),
        "step": np.float32(0.1),
        "zero": np.int8(0),
        "back": np.float32(back),
        "other": np.int8(zero),
    }
    channels = weight.shape[0]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["codes"], "quantise"),
            helper.make_node("DequantizeLinear", ["codes", "back", "other"], ["given"], "dequantise"),
            helper.make_node("DequantizeLinear", ["weight", "steps"], ["kernel"], "kernel", axis=axis),
            helper.make_node("Conv", ["given", "kernel"], ["result"], "conv"),
        ],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _quantised(seed: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a square weight of very different channels in INT8 and its scales, one channel empty."""
    weight = np.random.default_rng(seed).standard_normal((8, 8, 3, 3)) * np.logspace(0, -2, 8).reshape(-1, 1, 1, 1)
    weight[3] = 0
    peaks = np.abs(weight).max(axis=tuple(other for other in range(4) if other != axis), keepdims=True)
    steps = np.where(peaks > 0, peaks / 127, 1)
    return np.rint(weight / steps).astype(np.int8), steps.ravel()


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_along_another_axis_than_the_numbers(axis: int) -> None:
    for seed in range(10):
        weight, scale = _quantised(seed, axis)
        assert list(contradictions(_layer(weight, scale, axis))) == []
        (problem,) = contradictions(_layer(weight, scale, 1 - axis))
        assert problem.startswith(f"kernel has a scale for each channel of axis {1 - axis}, where ")
        assert problem.endswith(f"its weight was quantised along axis {axis}")


def test_numbers_that_fill_no_range_say_nothing() -> None:
    # Such as the weights of training with learnt scales.
    weight, scale = _quantised(0, 0)
    assert list(contradictions(_layer((weight * 0.7).astype(np.int8), scale, 1))) == []


def test_a_pair_has_one_scale_and_one_zero_point() -> None:
    weight, scale = _quantised(0, 0)
    (problem,) = contradictions(_layer(weight, scale, 0, back=0.2))
    assert problem == "dequantise has the scale 0.2, but quantise in front of it has 0.1"
    (problem,) = contradictions(_layer(weight, scale, 0, zero=24))
    assert problem == "dequantise has the zero point 24, but quantise in front of it has 0"
    mixed = _layer(weight, scale, 0)
    mixed.graph.initializer[4].CopyFrom(numpy_helper.from_array(np.float16(0.1), "back"))
    assert list(contradictions(mixed)) == []
