"""An FP32 graph that rounds to FP16 after every FP16 operation, to judge FP16 on a machine that does not compute in it.

ONNX Runtime's CPU provider wraps whole runs of FP16 operators in one pair of casts and computes them in FP32: the
product 300 * 300 * 0.001 gives 90 there, where FP16 gives infinity. It keeps explicit casts in an FP32 graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner

from edgeattn.export.attention_islands import LAYOUT_OPS
from edgeattn.export.names import claim_name
from edgeattn.export.opsets import IR_VERSION
from edgeattn.export.precision_types import check_types, element_types, graph_values, write_types
from edgeattn.foundation import UserError

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

EXACT_OPS = (LAYOUT_OPS - {"Dropout"}) | {"Abs", "Constant", "Max", "MaxPool", "Min", "Neg", "Relu", "Sign", "Where"}
"""Operators whose results are among their inputs (or simple signs): rounding them again changes nothing."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def emulate_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an FP32 graph that computes what a machine computes that rounds after every FP16 operation.

    Local functions are inlined. Every FP16 tensor becomes FP32 and holds a number that FP16 can hold: FP16 constants
    are stored as their rounded values, and each operator with an FP16 result is followed by a Cast to FP16 and a Cast
    back, which make infinities and NaNs where FP16 would. FP32 parts stay as they are. Within one operator sums are
    FP32, as on tensor cores; FP16 accumulation is not modelled.

    Args:
        model: strongly typed FP16 model, such as `to_fp16` returns; it is not changed.

    Returns:
        A model of the same inputs and outputs (FP16 ones become FP32) whose tensors keep their names.

    Raises:
        UserError: the model's types are inconsistent, or FP16 occurs inside If, Loop or Scan.
    """
    inlined = inliner.inline_local_functions(model)
    types = element_types(inlined)
    working = ir.from_proto(inlined)
    write_types(working, types)
    graph = working.graph
    taken = {str(value.name) for value in graph_values(graph)} | {str(node.name) for node in graph}
    if any(value.dtype == _HALF for inner in graph.subgraphs() for value in graph_values(inner)):
        raise UserError("the ONNX model computes in FP16 inside If, Loop or Scan, which is not emulated. Keep it FP32.")
    half = [value for value in dict.fromkeys(graph_values(graph)) if value.dtype == _HALF]
    for value in half:
        _widen(value)
    for node in graph:
        _widen_attributes(node)
    for value in half:
        producer = value.producer()
        if producer is not None and (producer.op_type not in EXACT_OPS or producer.domain != ""):
            _round(graph, producer, value, taken)
    working.ir_version = IR_VERSION
    result = ir.to_proto(working)
    check_types(result)
    return result


def _widen(value: ir.Value) -> None:
    """Make an FP16 tensor FP32; the numbers of a constant stay the rounded ones."""
    value.type = ir.TensorType(_FLOAT)
    if value.const_value is not None and value.is_initializer():
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)


def _widen_attributes(node: ir.Node) -> None:
    """Replace FP16 by FP32 in the attributes that name a type or hold a tensor."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attribute.value == _HALF:
            node.attributes[name] = ir.AttrInt64(name, _FLOAT)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _HALF:
            wide = ir.tensor(attribute.value.numpy().astype(np.float32), name=attribute.value.name)
            node.attributes[name] = ir.AttrTensor(name, wide)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, taken: set[str]) -> None:
    """Put a Cast to FP16 and a Cast back between a node and its result; the rounded result takes the name."""
    half = ir.Value(name=claim_name(f"{value.name}_fp16", taken), shape=value.shape, type=ir.TensorType(_HALF))
    rounded = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(_FLOAT))
    value.replace_all_uses_with(rounded, replace_graph_outputs=True)
    casts = [
        ir.Node(
            "",
            "Cast",
            [source],
            [ir.AttrInt64("to", kind)],
            outputs=[target],
            name=claim_name(f"{verb}_{rounded.name}", taken),
            metadata_props=dict(node.metadata_props),
        )
        for verb, source, target, kind in (("narrow", value, half, _HALF), ("widen", half, rounded, _FLOAT))
    ]
    graph.insert_after(node, casts)
    value.name = claim_name(f"{value.name}_exact", taken)
