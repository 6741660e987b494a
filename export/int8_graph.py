"""Q/DQ nodes: where they stand in a graph, and their constants."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from edgeattn.export.calibration_methods import LEVELS
from edgeattn.export.int8_layers import Layer, constant_of, new_constant
from edgeattn.export.names import claim_name

QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")


def insert_qdq(
    graph: ir.Graph,
    layers: Collection[Layer],
    thresholds: Mapping[str, float],
    *,
    residuals: Collection[ir.Node],
    taken: set[str],
) -> None:
    """Quantise the inputs and weights of layers symmetrically, in place.

    Each activation gets one Q/DQ pair, which all its layers share; each weight is stored in INT8 behind one
    DequantizeLinear with a scale for each output channel, shared by the layers that read it along the same axis. Other
    readers keep the floating-point tensor. Biases stay as they are, and no layer's result is quantised for itself,
    which would part it from the activation behind it.

    Args:
        graph: main graph; Gemm layers have become MatMul.
        layers: what to quantise.
        thresholds: the largest magnitude that each activation's INT8 form represents.
        residuals: additions that read the quantised form of an activation where it has one.
        taken: names in use.
    """
    chosen = {layer.node: layer for layer in layers}
    activations: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    weights: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for node in graph:
        layer = chosen.get(str(node.name))
        if layer is None:
            continue
        for index in layer.activations:
            activations.setdefault(_given(node, index), []).append((node, index))
        if layer.axis is not None:
            weights.setdefault((_given(node, 1), layer.axis), []).append(node)
    for value, readers in activations.items():
        adding = [(node, index) for node in residuals for index, read in enumerate(node.inputs) if read is value]
        _quantise_activation(graph, value, [*readers, *adding], thresholds[str(value.name)], taken)
    for (value, axis), nodes in weights.items():
        _quantise_weight(graph, value, axis, nodes, taken)


def residual_additions(graph: ir.Graph, layers: Collection[Layer]) -> list[ir.Node]:
    """Return the additions to a quantised convolution's result, which TensorRT fuses into the convolution.

    The other operand is read in INT8 then, if it is INT8 at all. Additions to the results of linear layers stay in
    floating point: what follows them in a Transformer is a norm, and the sum runs on to the last layer.
    """
    convolutions = {layer.node for layer in layers if layer.axis == 0}
    return [
        node
        for node in graph
        if node.op_type == "Add"
        and node.domain == ""
        and any(
            value is not None and (producer := value.producer()) is not None and producer.name in convolutions
            for value in node.inputs
        )
    ]


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _quantise_activation(
    graph: ir.Graph, value: ir.Value, readers: list[tuple[ir.Node, int]], threshold: float, taken: set[str]
) -> None:
    name = str(value.name)
    step = np.float32(threshold / LEVELS)
    if not step >= np.finfo(np.float32).tiny:  # always zero: any scale is right
        step = np.float32(1)
    scale = new_constant(graph, f"{name}_scale", np.asarray(step), taken)
    zero = new_constant(graph, f"{name}_zero_point", np.asarray(0, np.int8), taken)
    metadata = dict(readers[0][0].metadata_props)
    quantise = _node("QuantizeLinear", [value, scale, zero], name, metadata, taken)
    dequantise = _node("DequantizeLinear", [quantise.outputs[0], scale, zero], name, metadata, taken)
    reading = {node for node, _ in readers}
    graph.insert_before(next(node for node in graph if node in reading), [quantise, dequantise])
    for node, index in readers:
        node.replace_input_with(index, dequantise.outputs[0])


def _quantise_weight(graph: ir.Graph, value: ir.Value, axis: int, nodes: list[ir.Node], taken: set[str]) -> None:
    weight, name = constant_of(value), str(value.name)
    assert weight is not None
    others = tuple(other for other in range(weight.ndim) if other != axis)
    steps = (np.abs(weight).max(axis=others) / LEVELS).astype(np.float32)
    steps[~(steps >= np.finfo(np.float32).tiny)] = 1  # channels of zeros
    shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
    rounded = np.clip(np.round(weight / steps.reshape(shape)), -LEVELS, LEVELS).astype(np.int8)
    inputs = [
        new_constant(graph, f"{name}_{part}", array, taken)
        for part, array in (("quantized", rounded), ("scale", steps), ("zero_point", np.zeros(len(steps), np.int8)))
    ]
    attributes = [ir.AttrInt64("axis", axis)]
    dequantise = _node("DequantizeLinear", inputs, name, dict(nodes[0].metadata_props), taken, attributes)
    graph.insert_before(next(node for node in graph if node in set(nodes)), dequantise)
    for node in nodes:
        node.replace_input_with(1, dequantise.outputs[0])


def _node(
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    metadata: dict[str, str],
    taken: set[str],
    attributes: list[ir.Attr] | None = None,
) -> ir.Node:
    """Return a Q or DQ node that carries the metadata of the operator that it serves."""
    node = ir.Node(
        "", op_type, inputs, attributes or (), name=claim_name(f"{name}_{op_type}", taken), metadata_props=metadata
    )
    node.outputs[0].name = claim_name(f"{name}_{op_type}_Output", taken)
    return node
