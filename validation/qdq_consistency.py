"""What Q/DQ nodes say about each other, whatever the data: scales that contradict the numbers or their counterpart.

On few samples an error of a single layer may stay below any limit of the outputs. These contradictions are none of
rounding or calibration, so that they count even then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_PARTS = {1: "scale", 2: "zero point"}
_FULL = 127
"""What the largest number of a channel becomes when its scale follows from its range."""


def contradictions(model: onnx.ModelProto) -> Iterator[str]:
    """Yield a sentence for each Q/DQ node that contradicts itself or its counterpart.

    - A DequantizeLinear whose scale or zero point is not that of the QuantizeLinear in front of it: it gives other
      numbers than went in.
    - A stored weight with a scale for each channel of one axis whose numbers fill the range of INT8 in every channel
      of another axis of the same size, and not along its own: it was quantised along that other axis.

    Args:
        model: any model; only its main graph is looked at.
    """
    constants = _constants(model.graph)
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type != _DEQUANTIZE:
            continue
        source = producers.get(node.input[0])
        if source is not None and source.op_type == _QUANTIZE:
            yield from _differences(source, node, constants)
        elif problem := _wrong_axis(node, constants):
            yield problem


def _constants(graph: onnx.GraphProto) -> Mapping[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _differences(
    quantise: onnx.NodeProto, dequantise: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> Iterator[str]:
    for index, part in _PARTS.items():
        first, second = (_stored(node, index, constants) for node in (quantise, dequantise))
        if first is None or second is None:
            continue
        # One side may be in FP16 and the other in FP32: what both can hold has to be equal.
        kind = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        if not np.array_equal(first.astype(kind), second.astype(kind)):
            shown = f"{_shown(second)}, but {quantise.name} in front of it has {_shown(first)}"
            yield f"{dequantise.name} has the {part} {shown}"


def _stored(node: onnx.NodeProto, index: int, constants: Mapping[str, onnx.TensorProto]) -> np.ndarray | None:
    """Return an input, None where it is computed; a zero point that is left out is 0."""
    name = node.input[index] if len(node.input) > index else ""
    if not name:
        return np.zeros((), np.float64)
    return numpy_helper.to_array(constants[name]) if name in constants else None


def _shown(array: np.ndarray) -> str:
    first = f"{float(array.flat[0]):.4g}"
    return first if array.size == 1 else f"{first}, ... ({array.size} numbers)"


def _wrong_axis(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    weight, scale = (constants.get(name) for name in node.input[:2])
    if weight is None or scale is None or weight.data_type != onnx.TensorProto.INT8 or len(scale.dims) != 1:
        return None
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    shape, given = tuple(weight.dims), attributes.get("axis", 1)
    if attributes.get("block_size") or not -len(shape) <= given < len(shape):
        return None
    axis = given % len(shape)
    others = [other for other in range(len(shape)) if other != axis and shape[other] == shape[axis]]
    if shape[axis] == 1 or not others:
        return None
    numbers = np.abs(numpy_helper.to_array(weight).astype(np.int16))
    filled = _filled(numbers, axis)
    right = next((other for other in others if _filled(numbers, other) == 1), None)
    if filled == 1 or right is None:
        return None
    return (
        f"{node.name} has a scale for each channel of axis {axis}, where {filled:.0%} of the channels fill the range "
        f"of INT8, but along axis {right} all do: its weight was quantised along axis {right}"
    )


def _filled(numbers: np.ndarray, axis: int) -> float:
    """Return the fraction of channels whose largest number fills the range; channels of zeros do not count."""
    peaks = numbers.max(axis=tuple(other for other in range(numbers.ndim) if other != axis))
    used = peaks[peaks > 0]
    return float((used >= _FULL).mean()) if used.size else 1.0
