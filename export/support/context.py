"""What a rule may ask of a node, a call and a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.export.support.versions import Version

Shape = tuple[int | None, ...]
"""Sizes of a tensor's axes; None for one that is not known before run time."""

STANDARD_DOMAINS = ("", "ai.onnx")

_AS_PARSED = {ir.DataType.DOUBLE: ir.DataType.FLOAT}

HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def shape_of(value: ir.Value | None) -> Shape | None:
    """Return the shape of a value, or None where the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def type_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type that TensorRT gives a value (FP64 becomes FP32), or None where it is unknown."""
    if value is None or value.dtype is None or value.dtype == ir.DataType.UNDEFINED:
        return None
    return _AS_PARSED.get(value.dtype, value.dtype)


def is_weights(value: ir.Value | None) -> bool:
    """Say whether the parser holds a value as weights: an initializer or the result of a Constant node."""
    if value is None:
        return False
    producer = value.producer()
    return value.is_initializer() if producer is None else producer.op_type == "Constant"


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of weights, or None for anything else."""
    if value is None or not is_weights(value):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


@dataclass(frozen=True)
class NodeContext:
    """A node among its neighbours, as the parser meets it.

    Attributes:
        node: the node.
        version: TensorRT version.
        opset: version of the standard operators that the parser reads it with: the model's.
        dla: whether the target has DLA cores.
    """

    node: ir.Node
    version: Version
    opset: int
    dla: bool = False

    @property
    def operator(self) -> str:
        """Operator name; the parser does not look at the domain."""
        return self.node.op_type

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute; graphs and tensors as `onnx_ir` holds them."""
        found = self.node.attributes.get(name)
        if found is None or found.value is None:
            return default
        return list(found.value) if isinstance(found.value, (list, tuple)) else found.value

    def has(self, name: str) -> bool:
        """Say whether an attribute is written on the node."""
        return name in self.node.attributes

    def input(self, index: int) -> ir.Value | None:
        """Return an input, or None for one that is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def output(self, index: int) -> ir.Value | None:
        """Return an output, or None for one that is left out."""
        if index >= len(self.node.outputs) or not self.node.outputs[index].name:
            return None
        return self.node.outputs[index]

    def type(self, index: int) -> ir.DataType | None:
        """Return the element type of an input as TensorRT has it, or None where it is unknown."""
        return type_of(self.input(index))

    def shape(self, index: int) -> Shape | None:
        """Return the shape of an input, or None where its rank is unknown."""
        return shape_of(self.input(index))

    def rank(self, index: int) -> int | None:
        """Return the rank of an input, or None where it is unknown."""
        shape = self.shape(index)
        return None if shape is None else len(shape)

    def size(self, index: int, axis: int) -> int | None:
        """Return the size of one axis of an input, or None where it is unknown."""
        shape = self.shape(index)
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        return shape[axis]

    def constant(self, index: int) -> np.ndarray | None:
        """Return the numbers of an input that the parser holds as weights, or None."""
        return constant_of(self.input(index))

    def is_computed(self, index: int) -> bool:
        """Say whether an input is there, but not as weights."""
        value = self.input(index)
        return value is not None and not is_weights(value)

    def bodies(self) -> Iterator[tuple[str, ir.Graph]]:
        """Yield the control-flow bodies of the node by attribute name."""
        for name, attribute in self.node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH:
                yield name, attribute.as_graph()


@dataclass(frozen=True)
class CallContext:
    """A node that the parser takes as a plugin or as a call of a local function.

    Attributes:
        node: the node.
        version: TensorRT version.
        opset: version of the standard operators that the model imports.
        function: function that the parser finds by the operator's name, whatever its domain; None for none.
        same_name: identifiers of all functions of that name.
        plugin: whether a plugin of that name, namespace and number of inputs is known.
        plugin_runs: whether the plugin runs rather than the function's body.
        tensors: names that the parser knows when it meets the node.
    """

    node: ir.Node
    version: Version
    opset: int
    function: ir.Function | None
    same_name: Sequence[str]
    plugin: bool
    plugin_runs: bool
    tensors: frozenset[str]

    @property
    def namespace(self) -> str | None:
        """Value of the attribute `plugin_namespace`, or None where it is not written."""
        attribute = self.node.attributes.get("plugin_namespace")
        return None if attribute is None or attribute.value is None else str(attribute.value)

    @property
    def label(self) -> str:
        """Domain and operator, for messages."""
        return f"{self.node.domain}::{self.node.op_type}" if self.node.domain else self.node.op_type

    @property
    def body_runs(self) -> bool:
        """Whether the parser runs the function's body."""
        return self.function is not None and not self.plugin_runs


@dataclass(frozen=True)
class ModelContext:
    """The model as a whole.

    Attributes:
        model: the model before any function was put in place of its calls, with inferred types and shapes.
        version: TensorRT version.
        opset: version of the standard operators.
        declared: types and shapes that the model declares for its outputs, which inference was not told.
        depths: nesting depth of the deepest node inside each node of the main graph, by node name.
        inference_error: why ONNX could not infer types and shapes; empty when it could.
    """

    model: ir.Model
    version: Version
    opset: int
    declared: dict[str, tuple[ir.DataType | None, Shape | None]]
    depths: dict[str, int]
    inference_error: str
