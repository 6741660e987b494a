"""Rules about QuantizeLinear and DequantizeLinear in strongly typed networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from edgeattn.export.support.context import NodeContext, constant_of, type_of
from edgeattn.export.support.rule import HEADERS, OBSERVATIONS, PARSER, Mark, NodeRule, Rule, Severity

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QDQ = frozenset({QUANTIZE, DEQUANTIZE})

CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}
"""Weight axis of the output channels, for the operators whose weights may have one scale for each channel."""

_QUANTISED = frozenset(
    {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, getattr(ir.DataType, "FLOAT4E2M1", ir.DataType.INT8)}
)


def quantised_type(node: ir.Node) -> ir.DataType | None:
    """Return the type of the quantised side, as ONNX defines it."""
    return type_of(node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0])


def zero_point_problem(node: ir.Node) -> str | None:
    """Say which zero point is not zero."""
    array = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if array is None:
        return None
    numbers = array.astype(np.float64)
    return f"its zero point is {numbers[numbers != 0].flat[0]:g} instead of 0" if np.any(numbers != 0) else None


def scale_problem(node: ir.Node) -> str | None:
    """Say which scale is not finite and positive."""
    scale = constant_of(node.inputs[1])
    if scale is None:
        return None
    numbers = scale.astype(np.float64)
    wrong = numbers[~(np.isfinite(numbers) & (numbers > 0))]
    return f"its scale holds {wrong.flat[0]:g}; scales must be finite and positive" if wrong.size else None


def weight_source(node: ir.Node) -> np.ndarray | None:
    """Return the constant that a Q or DQ, possibly behind the Q of the same weight, takes its numbers from."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == QUANTIZE:
        value = producer.inputs[0]
    return constant_of(value)


def weight_uses(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Yield the operators that read a weight, looking through the DQ behind a Q."""
    for reader, index in node.outputs[0].uses():
        if reader.op_type == DEQUANTIZE:
            yield from weight_uses(reader)
        else:
            yield reader, index


def channel_problem(node: ir.Node) -> str | None:
    """Say where scales for each channel are used on something else than the output channels of a weight."""
    scale = constant_of(node.inputs[1])
    if scale is None or scale.ndim != 1 or scale.size == 1 or quantised_type(node) == ir.DataType.INT32:
        return None
    if weight_source(node) is None:
        return f"an activation has {scale.size} scales; activations take one"
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    for reader, index in weight_uses(node):
        wanted = CHANNEL_AXES.get(reader.op_type)
        if index != 1 or wanted is None:
            return f"input {index} of {reader.name} ({reader.op_type}) has a scale for each channel"
        if axis != wanted:
            return f"the weight of {reader.name} ({reader.op_type}) has axis {axis} instead of {wanted}"
    return None


def _asymmetric(node: NodeContext) -> str | None:
    return zero_point_problem(node.node)


def _bias(node: NodeContext) -> str | None:
    return "it is an INT32 bias" if quantised_type(node.node) == ir.DataType.INT32 else None


def _quantised_type(node: NodeContext) -> str | None:
    """Find types that are refused; UINT8 is another matter."""
    kind = quantised_type(node.node)
    if node.operator == DEQUANTIZE:
        source = node.input(0)
        producer = source.producer() if source is not None else None
        if kind == ir.DataType.UINT8 and (producer is None or producer.op_type == "Constant"):
            return "it reads UINT8 bytes"
    elif node.attribute("output_dtype") == ir.DataType.UINT8 and node.input(2) is None:
        return "output_dtype is UINT8"
    if kind is None or kind in _QUANTISED | {ir.DataType.UINT8, ir.DataType.INT32}:
        return None
    return f"the quantised type is {kind}"


def _uint8(node: NodeContext) -> str | None:
    kind = quantised_type(node.node)
    if kind != ir.DataType.UINT8 or _quantised_type(node) is not None:
        return None
    if node.input(2) is None and node.operator == QUANTIZE:
        return "it has no zero point, which means UINT8 in ONNX and INT8 here: numbers above 127 are lost"
    return "its zero point is UINT8 and is read as INT8: numbers above 127 are lost"


def _scale(node: NodeContext) -> str | None:
    return scale_problem(node.node)


def _computed_scale(node: NodeContext) -> str | None:
    computed = [name for index, name in ((1, "scale"), (2, "zero point")) if node.is_computed(index)]
    return f"its {computed[0]} is not constant" if computed else None


def _scale_count(node: NodeContext) -> str | None:
    scale, shape = node.constant(1), node.shape(0)
    if scale is None or scale.size == 1 or shape is None:
        return None
    if scale.ndim != 1:
        return f"its scale has {scale.ndim} axes and its tensor {len(shape)}" if scale.ndim != len(shape) else None
    axis = node.attribute("axis", 1 if node.opset >= 13 else 0)
    if not -len(shape) <= axis < len(shape):
        return f"axis is {axis} for a tensor of {len(shape)} axes"
    size = shape[axis]
    return f"it has {scale.size} scales and axis {axis} has {size}" if size is not None and size != scale.size else None


def _channel(node: NodeContext) -> str | None:
    return channel_problem(node.node)


def _default_axis(node: NodeContext) -> str | None:
    scale = node.constant(1)
    if scale is None or scale.ndim != 1 or scale.size == 1 or node.has("axis"):
        return None
    return "axis is not written: ONNX means 1 and the importer takes 0"


def _scale_type(node: NodeContext) -> str | None:
    if node.opset < 19 or node.operator != QUANTIZE:
        return None
    kind, scale = node.type(0), node.type(1)
    return f"its scale is {scale} and its input {kind}" if kind and scale and kind != scale else None


def _blocks(node: NodeContext) -> str | None:
    size = node.attribute("block_size", 0)
    return f"block_size is {size} for INT8" if size and quantised_type(node.node) == ir.DataType.INT8 else None


def _rule(
    name: str,
    title: str,
    severity: Severity,
    remedy: str,
    find: Callable[[NodeContext], str | None],
    mark: Mark,
    source: str = PARSER,
    **more: object,
) -> Rule:
    return NodeRule(
        id=name, title=title, severity=severity, remedy=remedy, source=source, mark=mark, operators=QDQ, find=find,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


_SYMMETRIC = "Quantise symmetrically to INT8: ActivationSymmetric, WeightSymmetric and QInt8 in ONNX Runtime."

RULES: tuple[Rule, ...] = (
    _rule(
        "quantised-zero-point",
        "zero points have to be zero",
        Severity.REJECTED,
        _SYMMETRIC,
        _asymmetric,
        Mark.OBSERVED,
        OBSERVATIONS,
    ),
    _rule(
        "quantised-bias",
        "bias in INT32",
        Severity.REJECTED,
        "Leave biases in floating point: QuantizeBias=False in ONNX Runtime.",
        _bias,
        Mark.HEADER,
        OBSERVATIONS,
    ),
    _rule(
        "quantised-type",
        "quantised type that is not taken",
        Severity.REJECTED,
        _SYMMETRIC,
        _quantised_type,
        Mark.OBSERVED,
        f"{OBSERVATIONS}; {PARSER}",
    ),
    _rule(
        "quantised-uint8",
        "UINT8 is read as INT8",
        Severity.ATTENTION,
        _SYMMETRIC,
        _uint8,
        Mark.OBSERVED,
        OBSERVATIONS,
    ),
    _rule(
        "quantised-scale",
        "scales have to be positive",
        Severity.REJECTED,
        "Calibrate again; a scale of zero belongs to a tensor that was always zero.",
        _scale,
        Mark.CODE,
    ),
    _rule(
        "quantised-scale-computed",
        "scale or zero point is not a constant",
        Severity.ATTENTION,
        "Calibrate, and store scales as initializers.",
        _computed_scale,
        Mark.DOCUMENTED,
        f"{HEADERS}; {PARSER}",
    ),
    _rule(
        "quantised-scale-count",
        "scales do not fit the tensor",
        Severity.REJECTED,
        "Give one scale, or one for each size of the axis.",
        _scale_count,
        Mark.CODE,
    ),
    _rule(
        "quantised-channels",
        "scales for each channel are for weights, along their output channels",
        Severity.ATTENTION,
        "Use one scale for each activation, and axis 0 for the weights of Conv.",
        _channel,
        Mark.HEADER,
        f"{OBSERVATIONS}; {HEADERS}",
    ),
    _rule(
        "quantised-axis",
        "the default axis is another one",
        Severity.ATTENTION,
        "Write the attribute axis.",
        _default_axis,
        Mark.CODE,
        before=(10, 10),
        unverified="10.2 to 10.9",
    ),
    _rule(
        "quantised-scale-type",
        "scale of another type than the tensor",
        Severity.REJECTED,
        "Give the scale the type of the input; for FP16 models that is FP16.",
        _scale_type,
        Mark.HEADER,
        f"{HEADERS}; {PARSER}",
    ),
    _rule(
        "quantised-blocks",
        "scales for blocks of INT8",
        Severity.ATTENTION,
        "Use one scale for each tensor or channel.",
        _blocks,
        Mark.HEADER,
        HEADERS,
    ),
)
