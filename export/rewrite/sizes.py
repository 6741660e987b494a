"""Concrete sizes of every tensor of a model, for one choice of its free dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeattn.plugins_trt import DOMAIN, spec_of

_SMALL = 64  # elements; shape arithmetic never needs more from an initializer
_LARGEST = 1 << 20  # elements; a larger mask is left to ONNX Runtime
_FREE_BY_AXIS = {0: 2}  # the batch of a trial; every other free axis alternates between height and width


class Sizes:
    """Element types, shapes, and the values of small tensors that do not depend on the input data.

    The model is walked once: shapes by ONNX's inference node by node, shape arithmetic (`Shape`, `Gather`, ...) by its
    reference implementation, so that a `Reshape` to a computed shape is known as well.

    Args:
        model: any model.
        height: size of the free axes of even index other than 0 (axis 2 of an image).
        width: size of the free axes of odd index (axis 3 of an image).
    """

    def __init__(self, model: onnx.ModelProto, *, height: int, width: int) -> None:
        self.static = True
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.element_types: dict[str, int] = {}
        self.values: dict[str, np.ndarray] = {}
        self._sequences: dict[str, list[tuple[int, ...]]] = {}
        self._inferred: dict[tuple[object, ...], list[tuple[int, tuple[int, ...] | None]]] = {}
        self._evaluators: dict[tuple[object, ...], ReferenceEvaluator] = {}
        self._set_inputs(model.graph, height, width)
        for tensor in model.graph.initializer:
            self._set_constant(tensor.name, tensor)
        described = dict(_concrete(model.graph.value_info))
        for node in model.graph.node:
            self._visit(node, described if self.static else {})

    def _set_inputs(self, graph: onnx.GraphProto, height: int, width: int) -> None:
        constant = {tensor.name for tensor in graph.initializer}
        named: dict[str, int] = {}
        for value in graph.input:
            if value.name in constant or not value.type.tensor_type.HasField("shape"):
                continue
            shape = []
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                size = dim.dim_value
                if not dim.HasField("dim_value"):
                    self.static = False
                    size = _FREE_BY_AXIS.get(axis, width if axis % 2 else height)
                    size = named.setdefault(dim.dim_param, size) if dim.dim_param else size
                shape.append(size)
            self._set(value.name, value.type.tensor_type.elem_type, tuple(shape))

    def _set(self, name: str, element_type: int, shape: tuple[int, ...] | None) -> None:
        if name and element_type:
            self.element_types[name] = element_type
            if shape is not None:
                self.shapes[name] = shape

    def _set_constant(self, name: str, tensor: onnx.TensorProto) -> None:
        self._set(name, tensor.data_type, tuple(tensor.dims))
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            self.values[name] = numpy_helper.to_array(tensor)

    def _visit(self, node: onnx.NodeProto, described: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._visit_constant(node)
            return
        attributes = tuple(attribute.SerializeToString() for attribute in node.attribute)
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            found: list[tuple[int, tuple[int, ...] | None]] = []
        elif node.domain == DOMAIN:
            found = self._plugin_outputs(node)
        elif node.op_type in ("SplitToSequence", "SequenceAt") and not node.domain:
            found = self._sequence_outputs(node)
        elif self._evaluate(node, attributes):
            return
        elif all(name in described for name in node.output if name):
            found = [described.get(name, (0, None)) for name in node.output]
        else:
            found = self._infer(node, attributes)
        for name, (element_type, shape) in zip(node.output, found, strict=False):
            self._set(name, element_type, shape)

    def _visit_constant(self, node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            if not isinstance(value, onnx.TensorProto):
                kind = np.int64 if attribute.name in ("value_int", "value_ints") else np.float32
                value = numpy_helper.from_array(np.array(value, dtype=kind))
            self._set_constant(node.output[0], value)

    def _plugin_outputs(self, node: onnx.NodeProto) -> list[tuple[int, tuple[int, ...] | None]]:
        spec = spec_of(node.op_type, len(node.input))
        symbols: dict[str, int] = {}
        for name, tensor in zip(node.input, spec.inputs, strict=True):
            symbols.update(zip(tensor.shape, self.shapes.get(name, ()), strict=False))
        element_type = self.element_types.get(node.input[0], 0)
        return [
            (element_type, tuple(symbols[axis] for axis in tensor.shape) if symbols.keys() >= {*tensor.shape} else None)
            for tensor in spec.outputs
        ]

    def _sequence_outputs(self, node: onnx.NodeProto) -> list[tuple[int, tuple[int, ...] | None]]:
        """Follow a split into computed sizes, which unoptimised exports write as a sequence."""
        parts = self.values.get(node.input[1]) if len(node.input) > 1 else None
        element_type = self.element_types.get(node.input[0], 0)
        if parts is None:
            return []
        if node.op_type == "SequenceAt":
            shapes = self._sequences.get(node.input[0])
            return [(element_type, shapes[int(parts)])] if shapes else []
        shape = self.shapes.get(node.input[0])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if shape is not None and parts.ndim == 1:
            self._sequences[node.output[0]] = [
                tuple(int(part) if place == axis % len(shape) else size for place, size in enumerate(shape))
                for part in parts
            ]
        return [(element_type, None)]

    def _evaluate(self, node: onnx.NodeProto, attributes: tuple[bytes, ...]) -> bool:
        """Compute a node's value where it is small and known; tell whether it was."""
        if node.op_type in ("Shape", "Size") and node.input[0] in self.shapes:
            shape = self.shapes[node.input[0]]
            if node.op_type == "Size":
                value = np.array(math.prod(shape), dtype=np.int64)
            else:
                limits = {attribute.name: attribute.i for attribute in node.attribute}
                value = np.array(shape[limits.get("start", 0) : limits.get("end", len(shape))], dtype=np.int64)
            self._set_value(node.output[0], value)
            return True
        if node.op_type == "CastLike" and node.input[0] in self.values and node.input[1] in self.element_types:
            target = helper.tensor_dtype_to_np_dtype(self.element_types[node.input[1]])
            self._set_value(node.output[0], self.values[node.input[0]].astype(target))
            return True
        if node.domain or not node.input or any(name and name not in self.values for name in node.input):
            return False
        key = (node.op_type, len(node.output), tuple(bool(name) for name in node.input), attributes)
        if key not in self._evaluators:
            lone = onnx.NodeProto()
            lone.CopyFrom(node)
            lone.input[:] = [f"input_{index}" if name else "" for index, name in enumerate(node.input)]
            lone.output[:] = [f"output_{index}" for index in range(len(node.output))]
            self._evaluators[key] = ReferenceEvaluator(lone, opsets=self.opsets)
        feeds = {f"input_{index}": self.values[name] for index, name in enumerate(node.input) if name}
        try:
            results = self._evaluators[key].run(None, feeds)
        except Exception:  # an operator outside the reference implementation: the size stays unknown
            return False
        for name, value in zip(node.output, results, strict=True):
            self._set_value(name, np.asarray(value))
        return True

    def _set_value(self, name: str, value: np.ndarray) -> None:
        self._set(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        if value.size <= _LARGEST:
            self.values[name] = value

    def _infer(self, node: onnx.NodeProto, attributes: tuple[bytes, ...]) -> list[tuple[int, tuple[int, ...] | None]]:
        inputs = [(self.element_types.get(name, 0), self.shapes.get(name)) for name in node.input]
        data = {
            name: self.values[name]
            for name in node.input
            if name in self.values and self.values[name].dtype.kind in "iu"
        }
        key = (node.op_type, node.domain, attributes, len(node.output), *inputs, *(v.tobytes() for v in data.values()))
        if key not in self._inferred:
            self._inferred[key] = self._infer_anew(node, data)
        return self._inferred[key]

    def _infer_anew(
        self, node: onnx.NodeProto, data: Mapping[str, np.ndarray]
    ) -> list[tuple[int, tuple[int, ...] | None]]:
        types = {
            name: helper.make_tensor_type_proto(self.element_types[name], self.shapes.get(name))
            for name in node.input
            if name in self.element_types
        }
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, {name: numpy_helper.from_array(value) for name, value in data.items()}
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError, KeyError):
            return []  # an unknown operator, or inputs of unknown type: so are its outputs
        return [_described(found[name]) if name in found else (0, None) for name in node.output]


def _described(type_proto: onnx.TypeProto) -> tuple[int, tuple[int, ...] | None]:
    """Return element type and shape, the latter only if every size is a number."""
    tensor = type_proto.tensor_type
    if not tensor.HasField("shape") or any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim)


def _concrete(values: object) -> Iterator[tuple[str, tuple[int, tuple[int, ...]]]]:
    """Yield the tensors whose recorded shape has no free dimension."""
    for value in values:  # type: ignore[attr-defined]
        element_type, shape = _described(value.type)
        if element_type and shape is not None:
            yield value.name, (element_type, shape)
