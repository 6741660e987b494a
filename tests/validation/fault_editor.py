"""Editing an ONNX graph the way a defective exporter, pass or hand would."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeattn.validation.divergence.scopes import ScopedGraph

Where = Callable[[onnx.NodeProto], bool]


class NotApplicableError(Exception):
    """The graph holds nothing that the fault could befall."""


class Editor:
    """A copy of a model that is being damaged.

    Args:
        model: clean form; not modified.
        weights: the torch network's parameters and buffers by name.
        epsilons: of its normalisations, by module.
    """

    def __init__(
        self, model: onnx.ModelProto, weights: Mapping[str, np.ndarray], epsilons: Mapping[str, float]
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.weights, self.epsilons = weights, epsilons
        self.graph = self.model.graph
        scoped = ScopedGraph(model)
        self._owners = {node.output[0]: scoped.owner(index) for index, node in enumerate(model.graph.node)}
        self.touched: set[str] = set()
        self._serial = 0
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values
        }
        # The shapes that the exporter noted may no longer hold.
        del self.graph.value_info[:]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape that the clean graph gives a tensor; empty when it does not say."""
        return self._shapes.get(tensor, ())

    def owner(self, node: onnx.NodeProto) -> str:
        """Return the innermost module of a node."""
        return self._owners[node.output[0]]

    def touch(self, *nodes: onnx.NodeProto) -> None:
        """Record that these nodes compute something wrong now."""
        self.touched |= {self.owner(node) for node in nodes}

    def all(self, *operators: str, where: Where | None = None) -> list[onnx.NodeProto]:
        """Return the nodes of some operators.

        Raises:
            NotApplicableError: there is none.
        """
        found = [node for node in self.graph.node if node.op_type in operators and (where is None or where(node))]
        if not found:
            raise NotApplicableError(f"no {' or '.join(operators)} node of the kind")
        return found

    def one(self, *operators: str, where: Where | None = None, place: int = 0) -> onnx.NodeProto:
        """Return one node of some operators and record it as damaged."""
        found = self.all(*operators, where=where)
        node = found[min(place, len(found) - 1)]
        self.touch(node)
        return node

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that computes a tensor."""
        return next((node for node in self.graph.node if tensor in node.output), None)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor."""
        return [node for node in self.graph.node if tensor in node.input]

    def constant(self, tensor: str) -> np.ndarray | None:
        """Return a stored tensor."""
        found = next((item for item in self.graph.initializer if item.name == tensor), None)
        return None if found is None else numpy_helper.to_array(found)

    def weight(self, node: onnx.NodeProto, slot: int = 1) -> np.ndarray:
        """Return a stored operand of a node in FP32.

        Raises:
            NotApplicableError: it is not stored, or has another type.
        """
        array = self.constant(node.input[slot]) if len(node.input) > slot else None
        if array is None or array.dtype.kind != "f":
            raise NotApplicableError("no stored floating-point operand")
        return array.astype(np.float32)

    def stores(self, slot: int = 1, condition: Callable[[np.ndarray], bool] = lambda array: True) -> Where:
        """Return a test for nodes with a stored floating-point operand that meets a condition."""

        def test(node: onnx.NodeProto) -> bool:
            array = self.constant(node.input[slot]) if len(node.input) > slot and node.input[slot] else None
            return array is not None and array.dtype.kind == "f" and condition(array)

        return test

    def store(self, node: onnx.NodeProto, slot: int, array: np.ndarray) -> None:
        """Give a node another stored operand; other readers keep theirs."""
        old = self.constant(node.input[slot])
        assert old is not None
        self._serial += 1
        name = f"{node.input[slot]}.fault{self._serial}"
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, old.dtype), name))
        node.input[slot] = name

    def get(self, node: onnx.NodeProto, name: str) -> object:
        """Return an attribute, or None."""
        return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), None)

    def set(self, node: onnx.NodeProto, **attributes: object) -> None:
        """Set attributes; None removes one."""
        kept = [item for item in node.attribute if item.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(
            helper.make_attribute(key, value) for key, value in attributes.items() if value is not None
        )

    def become(
        self, node: onnx.NodeProto, operator: str, inputs: list[str] | None = None, **attributes: object
    ) -> None:
        """Turn a node into another operator."""
        node.op_type, node.domain = operator, ""
        if inputs is not None:
            node.input[:] = inputs
        del node.attribute[:]
        self.set(node, **attributes)

    def bypass(self, node: onnx.NodeProto, slot: int = 0) -> None:
        """Remove a node: what read its result reads its input instead."""
        result, source = node.output[0], node.input[slot]
        if any(value.name == result for value in self.graph.output):
            self.become(node, "Identity", [source])
            return
        for reader in self.readers(result):
            reader.input[:] = [source if name == result else name for name in reader.input]
        self.graph.node.remove(node)

    def behind(self, node: onnx.NodeProto, operator: str, *operands: object, **attributes: object) -> onnx.NodeProto:
        """Put an operator between a node and its readers, as part of the same module.

        Args:
            node: the node.
            operator: the new operator, which reads the node's result first.
            operands: further inputs: names of tensors, or arrays, which are stored; numbers in the result's type.
            attributes: of the operator.
        """
        self._serial += 1
        result, inner = node.output[0], f"{node.output[0]}.fault{self._serial}"
        node.output[0] = inner
        self._owners[inner] = self._owners[result]
        names = [operand if isinstance(operand, str) else self._stored(operand, result) for operand in operands]
        added = helper.make_node(
            operator, [inner, *names], [result], name=f"{node.name}.fault{self._serial}", **attributes
        )
        added.metadata_props.extend(node.metadata_props)
        place = list(self.graph.node).index(node) + 1
        self.graph.node.insert(place, added)
        return self.graph.node[place]  # protobuf inserts a copy

    def _stored(self, operand: object, beside: str) -> str:
        self._serial += 1
        name, array = f"fault{self._serial}", np.asarray(operand)
        kind = np.float16 if self._types.get(beside) == onnx.TensorProto.FLOAT16 else np.float32
        self.graph.initializer.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def require_half(self, node: onnx.NodeProto) -> None:
        """Refuse a node whose result is not FP16.

        Raises:
            NotApplicableError: it is not.
        """
        if self._types.get(node.output[0]) != onnx.TensorProto.FLOAT16:
            raise NotApplicableError("not FP16")

    def swap_reads(self, nodes: list[onnx.NodeProto], first: str, second: str) -> None:
        """Make nodes read one tensor where they read another, and the other way round."""
        swapped = {first: second, second: first}
        for node in nodes:
            before = list(node.input)
            node.input[:] = [swapped.get(name, name) for name in before]
            if list(node.input) != before:
                self.touch(node)
