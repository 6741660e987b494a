"""What TensorRT demands of Q/DQ nodes, and what INT8 exports promise beyond it, read back from a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgeattn.export.attention_islands import attention_maps, softmax_islands
from edgeattn.export.precision_types import constant_array, element_types, write_types
from edgeattn.export.support.context import is_weights
from edgeattn.export.support.quantisation_rules import (
    DEQUANTIZE,
    QUANTIZE,
    channel_problem,
    quantised_type,
    scale_problem,
    zero_point_problem,
)

_QDQ = (QUANTIZE, DEQUANTIZE)

UNSUPPORTED_OPS = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"},
)
"""Quantised operators that TensorRT's parser does not take."""


def check_qdq(model: onnx.ModelProto) -> list[str]:
    """Return every way in which the Q/DQ nodes of a model break what TensorRT's parser and builder accept.

    Checked, as TensorRT's operator documentation and parser sources state: INT8 only, zero points constant and all
    zero, scales constant, finite and positive, one scale for each activation, scales for each channel only on weights
    and along the output channels, no quantised bias, Q and DQ in pairs with equal scales, each DequantizeLinear of the
    type of the operators that read it, and no Q/DQ on the energies, masks, concatenations or Softmax of an attention.

    Args:
        model: any model; only its main graph is looked at.

    Returns:
        One sentence for each violation, naming the node, in graph order; empty when there is none.

    Raises:
        UserError: the model's types are inconsistent.
    """
    working = ir.from_proto(model)
    write_types(working, element_types(model))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(working)
    found: list[str] = []
    for node in working.graph:
        if node.op_type in UNSUPPORTED_OPS:
            found.append(f"{node.name}: TensorRT has no {node.op_type}; use Q/DQ around the float operator.")
        elif node.op_type in _QDQ and node.domain != "":
            found.append(f"{node.name}: {node.op_type} is of domain {node.domain}, not of the standard one.")
        elif node.op_type in _QDQ:
            for check in _CHECKS:
                found.extend(f"{node.name}: {problem}." for problem in check(node))
    return found + list(_attention(working.graph))


def _zero_point(node: ir.Node) -> Iterator[str]:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    kind = quantised_type(node)
    if kind == ir.DataType.INT32:
        yield "it is an INT32 bias; leave biases in floating point"
    elif kind != ir.DataType.INT8:
        yield f"the quantised type is {kind.name if kind else 'unknown'} instead of INT8"
    if zero is not None and not is_weights(zero):
        yield "its zero point is not constant"
    elif problem := zero_point_problem(node):
        yield problem


def _scale(node: ir.Node) -> Iterator[str]:
    if not is_weights(node.inputs[1]):
        yield "its scale is not constant"
    elif problem := scale_problem(node):
        yield problem


def _granularity(node: ir.Node) -> Iterator[str]:
    """Check where scales for each channel, or each block, are used."""
    block = node.attributes.get("block_size")
    if block is not None and block.value:
        yield f"it has blocks of {block.value}; only scales for each tensor or channel are supported"
    elif problem := channel_problem(node):
        yield problem


def _pairs(node: ir.Node) -> Iterator[str]:
    """Check that quantised tensors run from a Q to a DQ of the same scale only."""
    if node.op_type == QUANTIZE:
        others = sorted(str(reader.name) for reader, _ in node.outputs[0].uses() if reader.op_type != DEQUANTIZE)
        if others or not node.outputs[0].uses():
            yield f"its INT8 output goes to {', '.join(others) or 'no DequantizeLinear'}"
        return
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != QUANTIZE:
        if constant_array(value) is None:
            yield "its input is neither a constant nor the output of a QuantizeLinear"
        return
    quantise, dequantise = constant_array(producer.inputs[1]), constant_array(node.inputs[1])
    if quantise is not None and dequantise is not None and not np.array_equal(quantise, dequantise):
        yield f"its scale differs from that of {producer.name}"


def _type(node: ir.Node) -> Iterator[str]:
    """Check that the floating-point side has the type of the scale, and no cast between it and its operator."""
    scale = node.inputs[1]
    outer = node.inputs[0] if node.op_type == QUANTIZE else node.outputs[0]
    if scale is None or outer is None:
        return
    if scale.dtype != outer.dtype and outer.dtype is not None:
        yield f"its scale is {scale.dtype} but its floating-point tensor is {outer.dtype}"
    if node.op_type == QUANTIZE:
        return
    for reader in dict.fromkeys(reader for reader, _ in outer.uses()):
        results = {
            value.dtype for value in reader.outputs if value.dtype is not None and value.dtype.is_floating_point()
        }
        if reader.op_type not in _QDQ and results and results != {outer.dtype}:
            yield f"its output is {outer.dtype} but {reader.name} ({reader.op_type}) gives {min(map(str, results))}"


def _attention(graph: ir.Graph) -> Iterator[str]:
    """Find Q/DQ between the energies and the Softmax of an attention, or on the attention map."""
    island = softmax_islands(graph, through=_QDQ)
    maps = attention_maps(graph)
    for node in graph:
        from_map = any(value is not None and value.producer() in maps for value in node.inputs)
        if node.op_type in _QDQ and (node in island or from_map):
            place = "on the attention map" if from_map else "on the path from the energies to Softmax"
            yield f"{node.name}: it lies {place}, whose range Q/DQ cannot hold."


_CHECKS: tuple[Callable[[ir.Node], Iterator[str]], ...] = (_zero_point, _scale, _granularity, _pairs, _type)
