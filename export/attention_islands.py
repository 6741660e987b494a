"""The closed path from the energies of an attention to its Softmax, found by structure."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

SOFTMAX_OPS = frozenset({"Softmax", "LogSoftmax", "ReduceLogSumExp", "Exp"})
"""Operators that exponentiate energies: here a path ends."""

ENERGY_OPS = frozenset({"MatMul", "Gemm", "Einsum"})
"""Operators that produce energies: here it begins."""

LAYOUT_OPS = frozenset(
    [
        "Concat",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
    ]
)
"""Operators that only move numbers."""

ELEMENTWISE_OPS = frozenset(
    [
        "Abs",
        "Add",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Floor",
        "LeakyRelu",
        "Max",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "PRelu",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "Where",
    ]
)
"""Operators that treat every position alone."""

# Sums are passed too: a dot product may be written as an elementwise product and a sum.
_ON_THE_WAY = LAYOUT_OPS | ELEMENTWISE_OPS | {"ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean"}


def softmax_islands(graph: ir.Graph, *, through: Collection[str] = ()) -> set[ir.Node]:
    """Return the nodes that must share one precision from energy to Softmax.

    FP32 for the Softmax alone protects nothing, because the energies overflow where they are made: the whole path
    energy product, scale, mask, layout, Softmax has to be closed, without a cast inside.

    Args:
        graph: main graph of a model.
        through: further operator types that the way back may pass, such as Q/DQ.

    Returns:
        Every Softmax (or other exponential), every node between it and the energies, and the producers of energies.
        The way back stops, without including it, at any other operator, such as a convolution.
    """
    passable = _ON_THE_WAY | set(through)
    island = {node for node in graph if node.op_type in SOFTMAX_OPS and node.domain == ""}
    waiting = list(island)
    while waiting:
        for value in waiting.pop().inputs:
            node = value.producer() if value is not None else None
            if node is None or node in island or node.domain != "" or node.graph is not graph:
                continue
            if node.op_type in passable and (node.op_type in through or _carries_float(node)):
                waiting.append(node)
            elif node.op_type not in ENERGY_OPS:
                continue
            island.add(node)
    return island


def _carries_float(node: ir.Node) -> bool:
    """Say whether a node computes floating-point numbers; conditions and index arithmetic have no precision."""
    kinds = {output.dtype for output in node.outputs}
    return bool(kinds & {None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def attention_maps(graph: ir.Graph) -> set[ir.Node]:
    """Return every Softmax (or other exponential) and the layout operators behind it, whose results are its weights."""
    maps = {node for node in graph if node.op_type in SOFTMAX_OPS and node.domain == ""}
    for node in graph:
        sources = [value.producer() for value in node.inputs if value is not None]
        if node.op_type in LAYOUT_OPS and node.domain == "" and not maps.isdisjoint(sources):
            maps.add(node)
    return maps
