"""An FP32 graph that rounds after every FP16 or BF16 operation, to judge them on a machine that computes in neither.

ONNX Runtime's CPU provider wraps whole runs of FP16 operators in one pair of casts and computes them in FP32: the
product 300 * 300 * 0.001 gives 90 there, where FP16 gives infinity. It has hardly any BF16 operator. It keeps explicit
casts in an FP32 graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner

from edgeattn.export.accumulation import split_sums
from edgeattn.export.attention_islands import LAYOUT_OPS
from edgeattn.export.names import claim_name
from edgeattn.export.opsets import IR_VERSION
from edgeattn.export.precision_types import REDUCED_TYPES, check_types, element_types, graph_values, write_types
from edgeattn.foundation import UserError

_FLOAT = ir.DataType.FLOAT

EXACT_OPS = (LAYOUT_OPS - {"Dropout"}) | {"Abs", "Constant", "Max", "MaxPool", "Min", "Neg", "Relu", "Sign", "Where"}
"""Operators whose results are among their inputs (or simple signs): rounding them again changes nothing."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def emulate_fp16(model: onnx.ModelProto, *, accumulation: int | None = None) -> onnx.ModelProto:
    """Return an FP32 graph that computes what a machine computes that rounds after every FP16 or BF16 operation.

    Local functions are inlined. Every FP16 tensor becomes FP32 and holds a number that FP16 can hold: FP16 constants
    are stored as their rounded values, and each operator with an FP16 result is followed by a Cast to FP16 and a Cast
    back, which make infinities and NaNs where FP16 would; BF16 likewise. FP32 parts stay as they are. Within one
    operator sums are FP32, unless the accumulation in FP16 is asked for, see `edgeattn.export.accumulation`; BF16
    always accumulates in FP32.

    Args:
        model: strongly typed FP16 or BF16 model, such as `to_fp16` returns; it is not changed.
        accumulation: round the running total of sums of FP16 numbers to FP16 after so many terms; None for FP32 sums.

    Returns:
        A model of the same inputs and outputs (FP16 and BF16 ones become FP32) whose tensors keep their names.

    Raises:
        UserError: the model's types are inconsistent, FP16 or BF16 occurs inside If, Loop or Scan, or the length of a
            sum whose accumulation is asked for varies.
    """
    inlined = inliner.inline_local_functions(model)
    types = element_types(inlined)
    working = ir.from_proto(inlined)
    write_types(working, types)
    graph = working.graph
    taken = {str(value.name) for value in graph_values(graph)} | {str(node.name) for node in graph}
    inner = {value.dtype for subgraph in graph.subgraphs() for value in graph_values(subgraph)}
    if unknown := [kind.label for dtype, kind in REDUCED_TYPES.items() if dtype in inner]:
        raise UserError(
            f"the ONNX model computes in {unknown[0]} inside If, Loop or Scan, which is not emulated. Keep it FP32."
        )
    reduced = {value: value.dtype for value in graph_values(graph) if value.dtype in REDUCED_TYPES}
    rounded = {str(value.name): dtype for value, dtype in reduced.items()}
    for value in reduced:
        _widen(value)
    for node in graph:
        _widen_attributes(node)
    if accumulation is not None:
        summing = [node for node in graph if rounded.get(str(node.outputs[0].name)) == ir.DataType.FLOAT16]
        split_sums(graph, summing, _shapes(inlined), accumulation, taken)
    for node in list(graph):
        for value in node.outputs:
            if str(value.name) in rounded and (node.op_type not in EXACT_OPS or node.domain != ""):
                _round(graph, node, value, rounded[str(value.name)], taken)
    working.ir_version = IR_VERSION
    result = ir.to_proto(working)
    check_types(result)
    return result


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the main graph's tensors, 0 where one is not known."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in (*graph.value_info, *graph.input, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
    return shapes


def _widen(value: ir.Value) -> None:
    """Make a reduced tensor FP32; the numbers of a constant stay the rounded ones."""
    value.type = ir.TensorType(_FLOAT)
    if value.const_value is not None and value.is_initializer():
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)


def _widen_attributes(node: ir.Node) -> None:
    """Replace reduced types by FP32 in the attributes that name a type or hold a tensor."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES and attribute.value in REDUCED_TYPES:
            node.attributes[name] = ir.AttrInt64(name, _FLOAT)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in REDUCED_TYPES:
            wide = ir.tensor(attribute.value.numpy().astype(np.float32), name=attribute.value.name)
            node.attributes[name] = ir.AttrTensor(name, wide)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType, taken: set[str]) -> None:
    """Put a Cast to a reduced type and a Cast back between a node and its result; the rounded result takes the name."""
    name = claim_name(f"{value.name}_{REDUCED_TYPES[dtype].suffix}", taken)
    half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
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
        for verb, source, target, kind in (("narrow", value, half, dtype), ("widen", half, rounded, _FLOAT))
    ]
    graph.insert_after(node, casts)
    value.name = claim_name(f"{value.name}_exact", taken)
