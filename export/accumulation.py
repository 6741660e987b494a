"""Sums that a machine keeps in FP16: after each block of terms the running total is rounded.

Tensor cores that accumulate in FP16 add the exact products of one instruction to an FP16 total; m16n8k16, the
instruction of Ampere and later, has 16 of them. TensorRT may choose such kernels for an FP16 layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod

import numpy as np
import onnx_ir as ir

from edgeattn.export.names import claim_name
from edgeattn.export.precision_types import constant_array
from edgeattn.foundation import UserError

ACCUMULATION_BLOCK = 16
"""Terms between two roundings of a running total: the k of the instruction m16n8k16."""

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

Shapes = Mapping[str, tuple[int, ...]]
"""Sizes by tensor name; 0 where a size is not known."""


def split_sums(graph: ir.Graph, nodes: Sequence[ir.Node], shapes: Shapes, block: int, taken: set[str]) -> None:
    """Replace operators that sum by a Scan over blocks of terms whose running total is rounded to FP16.

    Convolutions, matrix products, sums and means over axes, global pools and the denominator of a Softmax are split
    where they sum more than one block. A block of a convolution is a number of whole input channels, at least one, so
    that a 7x7 kernel sums 49 products between two roundings. Windows of pools, norms and Einsum stay one block.
    Products of dequantised tensors stay as they are: INT8 accumulates in INT32.

    Args:
        graph: an FP32 graph whose tensors hold FP16 numbers; it is changed.
        nodes: the operators with FP16 results.
        shapes: of all tensors.
        block: terms between two roundings.
        taken: names in use; new ones are added.

    Raises:
        UserError: a size that a sum depends on is not fixed.
    """
    for node in nodes:
        split = _SPLITS.get(node.op_type)
        if split is not None and node.domain == "" and not _dequantised(node):
            split(_Splitter(graph, node, shapes, block, taken))


def _dequantised(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs[:2] if value is not None]
    return bool(producers) and all(part is not None and part.op_type == "DequantizeLinear" for part in producers)


class _Splitter:
    """Builds what replaces one node, in front of it."""

    def __init__(self, graph: ir.Graph, node: ir.Node, shapes: Shapes, block: int, taken: set[str]) -> None:
        self.graph, self.node, self.shapes, self.block, self.taken = graph, node, shapes, block, taken

    def size(self, value: ir.Value | None) -> tuple[int, ...]:
        """Return the fixed sizes of a tensor.

        Raises:
            UserError: one of them varies.
        """
        known = self.shapes.get(value.name or "", (0,)) if value is not None else ()
        if not all(known):
            raise UserError(
                f"FP16 accumulation of {self.node.name} cannot be modelled: the size of {value.name if value else ''} "
                "is not fixed. Give a model that was exported with fixed sizes (without --dynamic)."
            )
        return known

    def name(self, what: str) -> str:
        return claim_name(f"{self.node.name}_{what}", self.taken)

    def constant(self, array: np.ndarray, what: str) -> ir.Value:
        value = ir.Value(name=self.name(what), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=value.name)
        value.type = ir.TensorType(value.const_value.dtype)
        self.graph.register_initializer(value)
        return value

    def add(self, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        """Put a node in front of the one that is replaced, and return its result."""
        result = ir.Value(name=self.name(op_type.lower()), type=ir.TensorType(_FLOAT))
        metadata = dict(self.node.metadata_props)
        made = ir.Node(
            "", op_type, inputs, attributes, outputs=[result], name=self.name(op_type), metadata_props=metadata
        )
        self.graph.insert_before(self.node, made)
        return result

    def rounded(self, value: ir.Value) -> ir.Value:
        half = self.add("Cast", [value], [ir.AttrInt64("to", _HALF)])
        half.type = ir.TensorType(_HALF)
        return self.add("Cast", [half], [ir.AttrInt64("to", _FLOAT)])

    def blocks(self, value: ir.Value, axis: int, size: Sequence[int], step: int) -> ir.Value:
        """Return a tensor cut into blocks along an axis, filled up with zeros; the blocks are a new first axis."""
        axis %= len(size)
        count = ceil(size[axis] / step)
        array = constant_array(value)
        pads = np.zeros((2, len(size)), np.int64)
        pads[1, axis] = count * step - size[axis]
        shape = np.array([*size[:axis], count, step, *size[axis + 1 :]], np.int64)
        order = [axis, *(place for place in range(len(size) + 1) if place != axis)]
        if array is not None:
            padded = np.pad(array, pads.T)
            return self.constant(np.ascontiguousarray(padded.reshape(shape).transpose(order)), "blocks")
        if pads.any():
            value = self.add("Pad", [value, self.constant(pads.reshape(-1), "pads")])
        value = self.add("Reshape", [value, self.constant(shape, "shape")])
        return self.add("Transpose", [value], [ir.AttrInt64s("perm", order)])

    def accumulate(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr], size: Sequence[int]
    ) -> ir.Value:
        """Return the sum of an operator's results over blocks of its inputs, rounded after every block.

        Args:
            op_type: what a block's terms are summed by.
            inputs: its inputs, with the blocks as first axis.
            attributes: of the operator.
            size: of the result.
        """
        before, after = (ir.Value(name=self.name(what), type=ir.TensorType(_FLOAT)) for what in ("before", "after"))
        parts = [ir.Value(name=self.name("part"), type=ir.TensorType(_FLOAT)) for _ in inputs]
        partial, total = (ir.Value(name=self.name(what), type=ir.TensorType(_FLOAT)) for what in ("partial", "total"))
        half = ir.Value(name=self.name("half"), type=ir.TensorType(_HALF))
        nodes = [
            ir.Node("", op_type, parts, attributes, outputs=[partial]),
            ir.Node("", "Add", [before, partial], outputs=[total]),
            ir.Node("", "Cast", [total], [ir.AttrInt64("to", _HALF)], outputs=[half]),
            ir.Node("", "Cast", [half], [ir.AttrInt64("to", _FLOAT)], outputs=[after]),
        ]
        body = ir.Graph([before, *parts], [after], nodes=nodes, name=self.name("body"))
        start = self.constant(np.zeros(tuple(size), np.float32), "start")
        scan = [ir.AttrInt64("num_scan_inputs", len(inputs)), ir.AttrGraph("body", body)]
        return self.add("Scan", [start, *inputs], scan)

    def finish(self, op_type: str, inputs: Sequence[ir.Value]) -> None:
        """Turn the node into the last operator of what replaces it; its result keeps its name."""
        made = ir.Node("", op_type, inputs, name=self.node.name)
        made.metadata_props.update(self.node.metadata_props)
        old, new = self.node.outputs[0], made.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        self.graph.insert_before(self.node, made)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)


def _split_matmul(split: _Splitter) -> None:
    left, right = split.node.inputs[:2]
    assert left is not None
    assert right is not None
    sizes = [split.size(left), split.size(right)]
    if min(map(len, sizes)) < 2 or sizes[1][-2] <= split.block:
        return
    result = split.size(split.node.outputs[0])
    parts = [
        split.blocks(value, axis, size, split.block)
        for value, axis, size in zip((left, right), (-1, -2), sizes, strict=True)
    ]
    split.finish("Identity", [split.accumulate("MatMul", parts, (), result)])


def _split_gemm(split: _Splitter) -> None:
    node = split.node
    left, right, *rest = node.inputs
    assert left is not None
    assert right is not None
    flags = [bool(node.attributes[name].value) if name in node.attributes else False for name in ("transA", "transB")]
    sizes = [split.size(left), split.size(right)]
    axes = [0 if flags[0] else 1, 1 if flags[1] else 0]
    if sizes[0][axes[0]] <= split.block:
        return
    parts = [
        split.blocks(value, axis, size, split.block)
        for value, axis, size in zip((left, right), axes, sizes, strict=True)
    ]
    kept = [attribute for attribute in node.attributes.values() if attribute.name != "beta"]
    total = split.accumulate("Gemm", parts, kept, split.size(node.outputs[0]))
    if not rest or rest[0] is None:
        split.finish("Identity", [total])
        return
    beta = node.attributes["beta"].value if "beta" in node.attributes else 1.0
    bias = rest[0]
    if beta != 1.0:
        bias = split.add("Mul", [bias, split.constant(np.array(beta, np.float32), "beta")])
    split.finish("Add", [total, bias])


def _split_conv(split: _Splitter) -> None:
    node = split.node
    image, weight, *rest = node.inputs
    assert image is not None
    assert weight is not None
    size, kernel = split.size(image), split.size(weight)
    step = max(1, split.block // prod(kernel[2:]))
    if kernel[1] <= step:
        return
    groups, inner = size[1] // kernel[1], list(size[2:])
    if groups > 1:  # a block takes the same channels of every group
        shape = np.array([size[0], groups, kernel[1], *inner], np.int64)
        image = split.add("Reshape", [image, split.constant(shape, "shape")])
        parts = split.blocks(image, 2, shape.tolist(), step)
        count = ceil(kernel[1] / step)
        joined = np.array([count, size[0], groups * step, *inner], np.int64)
        parts = split.add("Reshape", [parts, split.constant(joined, "shape")])
    else:
        parts = split.blocks(image, 1, size, step)
    result = split.size(node.outputs[0])
    total = split.accumulate(
        "Conv", [parts, split.blocks(weight, 1, kernel, step)], list(node.attributes.values()), result
    )
    if not rest or rest[0] is None:
        split.finish("Identity", [total])
        return
    shape = np.array([1, -1, *(1 for _ in inner)], np.int64)
    split.finish("Add", [total, split.add("Reshape", [rest[0], split.constant(shape, "shape")])])


def _sum(
    split: _Splitter, value: ir.Value, size: tuple[int, ...], axes: Sequence[int], result: Sequence[int]
) -> ir.Value:
    """Return the sum of a tensor over axes, rounded after every block, in the shape `result`."""
    summed = sorted(axis % len(size) for axis in axes)
    kept = [axis for axis in range(len(size)) if axis not in summed]
    flat = [*(size[axis] for axis in kept), prod(size[axis] for axis in summed)]
    value = split.add("Transpose", [value], [ir.AttrInt64s("perm", [*kept, *summed])])
    value = split.add("Reshape", [value, split.constant(np.array(flat, np.int64), "shape")])
    parts = split.blocks(value, -1, flat, split.block)
    # A product with ones: unlike a Reduce it is the same operator at every opset.
    ones = split.constant(np.ones((ceil(flat[-1] / split.block), split.block, 1), np.float32), "ones")
    totals = split.accumulate("MatMul", [parts, ones], (), [*flat[:-1], 1])
    return split.add("Reshape", [totals, split.constant(np.array(result, np.int64), "shape")])


def _split_reduction(split: _Splitter) -> None:
    node = split.node
    value = node.inputs[0]
    assert value is not None
    size = split.size(value)
    listed = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if listed is None and "axes" in node.attributes:
        listed = np.array(node.attributes["axes"].value)
    axes = list(range(2, len(size))) if node.op_type == "GlobalAveragePool" else list(range(len(size)))
    if listed is not None:
        axes = [int(axis) for axis in listed]
    elif "noop_with_empty_axes" in node.attributes and node.attributes["noop_with_empty_axes"].value:
        return
    count = prod(size[axis] for axis in axes)
    if count <= split.block:
        return
    result = split.size(node.outputs[0]) if node.outputs[0].name in split.shapes else ()
    total = _sum(split, value, size, axes, result)
    if node.op_type == "ReduceSum":
        split.finish("Identity", [total])
    else:
        split.finish("Div", [total, split.constant(np.array(count, np.float32), "count")])


def _split_softmax(split: _Splitter) -> None:
    node = split.node
    value = node.inputs[0]
    assert value is not None
    size = split.size(value)
    axis = (node.attributes["axis"].value if "axis" in node.attributes else -1) % len(size)
    if size[axis] <= split.block:
        return
    one = [*size[:axis], 1, *size[axis + 1 :]]
    order = [*(place for place in range(len(size)) if place != axis), axis]
    rows = split.add("Transpose", [value], [ir.AttrInt64s("perm", order)])
    rows = split.add("Reshape", [rows, split.constant(np.array([prod(one), 1, size[axis]], np.int64), "shape")])
    largest = split.add("GlobalMaxPool", [rows])
    largest = split.add("Reshape", [largest, split.constant(np.array(one, np.int64), "shape")])
    weights = split.rounded(split.add("Exp", [split.rounded(split.add("Sub", [value, largest]))]))
    total = _sum(split, weights, size, [axis], one)
    split.finish("Div", [weights, total])


_SPLITS: Mapping[str, Callable[[_Splitter], None]] = {
    "Conv": _split_conv,
    "Gemm": _split_gemm,
    "GlobalAveragePool": _split_reduction,
    "MatMul": _split_matmul,
    "ReduceMean": _split_reduction,
    "ReduceSum": _split_reduction,
    "Softmax": _split_softmax,
}
