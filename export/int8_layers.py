"""Which operators of a graph may be INT8: convolutions, linear layers and, where asked, products of an attention."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeattn.export.attention_islands import attention_maps, softmax_islands
from edgeattn.export.names import claim_name

ASKED = "asked for"
"""Reason of a layer that the user excluded."""


@dataclass(frozen=True)
class Layer:
    """An operator that is quantised, or could be.

    Attributes:
        node: its name.
        activations: indices of the inputs that are activations.
        axis: axis of the output channels in its weight (input 1), or None for a product of two activations.
        linear: a matrix product with constant weights.
    """

    node: str
    activations: tuple[int, ...]
    axis: int | None
    linear: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """Every operator that has an INT8 form.

    Attributes:
        layers: those that can be quantised, in graph order.
        reasons: for each of the others, why it stays in floating point.
    """

    layers: tuple[Layer, ...]
    reasons: dict[str, str]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of an initializer or Constant node, or None for anything else."""
    if value is None or (value.is_initializer() and value.const_value is None):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def plan_layers(graph: ir.Graph, *, excluded: Collection[str], attention: bool) -> LayerPlan:
    """Find the operators to quantise.

    Args:
        graph: main graph of a model.
        excluded: names of the nodes that stay in floating point.
        attention: also take the products of two activations that belong to an attention.
    """
    maps, island = attention_maps(graph), softmax_islands(graph)
    layers, reasons = [], {}
    for node in graph:
        kind = _KINDS.get(node.op_type) if node.domain == "" else None
        if kind is None:
            continue
        found = kind(node)
        name = str(node.name)
        from_map = any(value is not None and value.producer() in maps for value in node.inputs)
        if isinstance(found, str):
            reasons[name] = found
        elif name in excluded:
            reasons[name] = ASKED
        elif found.axis is None and not attention:
            reasons[name] = "a product of two activations"
        elif found.axis is None and node not in island and not from_map:
            reasons[name] = "a product of two activations outside an attention"
        elif found.axis is not None and from_map:
            reasons[name] = "reads an attention map"
        elif found.linear and node in island:
            reasons[name] = "gives the energies of a Softmax"
        else:
            layers.append(found)
    return LayerPlan(tuple(layers), reasons)


def _convolution(node: ir.Node) -> Layer | str:
    if constant_of(node.inputs[1]) is None:
        return "its weights are not constant"
    if constant_of(node.inputs[0]) is not None:
        return "its input is constant"
    return Layer(str(node.name), (0,), 0)


def _matrix_product(node: ir.Node) -> Layer | str:
    left, right = (constant_of(value) for value in node.inputs[:2])
    if left is not None:
        return "its weights are the left factor"
    if right is None:
        return Layer(str(node.name), (0, 1), None)
    if right.ndim != 2:
        return f"its weights have {right.ndim} axes instead of 2"
    return Layer(str(node.name), (0,), 1, linear=True)


def _general_product(node: ir.Node) -> Layer | str:
    """Treat a Gemm as the matrix product that `split_general_products` makes of it."""
    if constant_of(node.inputs[1]) is None or constant_of(node.inputs[0]) is not None:
        return "not the product of an activation with constant weights"
    if node.attributes.get_int("transA", 0):
        return "its input is transposed"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_of(bias) is None and node.attributes.get_float("beta", 1.0) != 1.0:
        return "its bias is an activation with a factor"
    return Layer(str(node.name), (0,), 1, linear=True)


_KINDS: dict[str, Callable[[ir.Node], Layer | str]] = {
    "Conv": _convolution,
    "MatMul": _matrix_product,
    "Gemm": _general_product,
}


def split_general_products(graph: ir.Graph, names: Collection[str], taken: set[str]) -> None:
    """Replace each named Gemm by a MatMul of the same name and an Add, with its transposition and factors folded.

    TensorRT's rules for scales of weights know MatMul, with output channels on axis 1.
    """
    for node in [node for node in graph if node.op_type == "Gemm" and node.domain == "" and node.name in names]:
        weight = constant_of(node.inputs[1])
        assert weight is not None
        if node.attributes.get_int("transB", 0):
            weight = weight.T
        factor = np.float32(node.attributes.get_float("alpha", 1.0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        output, metadata = node.outputs[0], dict(node.metadata_props)
        name = str(node.name)
        factors = [node.inputs[0], new_constant(graph, f"{name}_weight", np.ascontiguousarray(weight * factor), taken)]
        node.name = None
        product = ir.Node("", "MatMul", factors, name=name, metadata_props=metadata)
        made = [product]
        if bias is not None:
            array, beta = constant_of(bias), np.float32(node.attributes.get_float("beta", 1.0))
            if array is not None and beta != 1:
                bias = new_constant(graph, f"{name}_bias", array * beta, taken)
            made.append(
                ir.Node(
                    "",
                    "Add",
                    [product.outputs[0], bias],
                    name=claim_name(f"{name}_add", taken),
                    metadata_props=metadata,
                )
            )
            product.outputs[0].name = claim_name(f"{name}_product", taken)
        replace_output(graph, node, made, output)


def replace_output(graph: ir.Graph, node: ir.Node, made: list[ir.Node], output: ir.Value) -> None:
    """Put nodes in the place of one whose result the last of them gives now, under the same name."""
    result = made[-1].outputs[0]
    result.name, result.shape, result.type = output.name, output.shape, output.type
    graph.insert_before(node, made)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def names_in(graph: ir.Graph) -> set[str]:
    """Return the names of all nodes and tensors."""
    values = {str(value.name) for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value}
    values |= {*graph.initializers, *(str(value.name) for value in (*graph.inputs, *graph.outputs))}
    return values | {str(node.name) for node in graph.all_nodes()}


def new_constant(graph: ir.Graph, name: str, array: np.ndarray, taken: set[str]) -> ir.Value:
    """Add an initializer under a name that is still free."""
    name = claim_name(name, taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
