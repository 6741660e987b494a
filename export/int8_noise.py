"""How much noise INT8 adds to the result of each layer alone, measured on data.

Powers are compared for each position of a linear layer's result, and for each sample of a convolution's. A norm follows
the one, position by position: a few positions with large numbers must not hide what the others suffer. A
BatchNormalization, folded or not, follows the other with the same factor everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from edgeattn.export.calibration import Batch
from edgeattn.export.calibration_statistics import lean_session
from edgeattn.export.int8_layers import Layer
from edgeattn.export.int8_smoothing import noise_shares

_PARTS = ("signal", "noise")


def signal_to_noise(
    quantised: onnx.ModelProto, exact: onnx.ModelProto, layers: Collection[Layer], batches: Iterable[Batch]
) -> dict[str, float]:
    """Measure the signal-to-noise ratio of every quantised layer's result, as the inverse of the mean share of noise.

    Every layer reads what it reads in the floating-point model, so that its noise is its own: beside the quantised
    layer runs its floating-point form, and everything behind reads the latter.

    Args:
        quantised: the quantised model.
        exact: the model that it was made from, with the same node names.
        layers: the quantised layers.
        batches: what to measure on.

    Returns:
        Ratio of the powers by layer, in dB; infinite where there is no noise.
    """
    session = _twin(quantised, exact, layers)
    outputs = [_output(layer.node, part) for layer in layers for part in _PARTS]
    totals = {layer.node: np.zeros(2) for layer in layers}
    for batch in batches:
        powers = iter(session.run(outputs, batch))
        for layer in layers:
            shares = noise_shares(next(powers).astype(np.float64), next(powers).astype(np.float64))
            totals[layer.node] += (shares.sum(), shares.size)
    return {name: _decibels(share / max(count, 1)) for name, (share, count) in totals.items()}


def _decibels(share: float) -> float:
    if np.isnan(share):
        return -np.inf
    return float(-10 * np.log10(share)) if share > 0 else np.inf


def _output(name: str, part: str) -> str:
    return f"__edgeattn_{part}_{name}"


def _twin(
    quantised: onnx.ModelProto, exact: onnx.ModelProto, layers: Collection[Layer]
) -> onnxruntime.InferenceSession:
    """Return a session of the model with both forms of each layer that gives the powers of signal and noise."""
    chosen = {layer.node: layer for layer in layers}
    floats = {node.name: node for node in exact.graph.node if node.name in chosen}
    copy = onnx.ModelProto()
    copy.CopyFrom(quantised)
    stored = {tensor.name for tensor in copy.graph.initializer}
    copy.graph.initializer.extend(tensor for tensor in exact.graph.initializer if tensor.name not in stored)
    graph = copy.graph
    nodes = list(graph.node)
    del graph.node[:]
    last = "__edgeattn_last_axis"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), last))
    sources = _sources(nodes)
    for node in nodes:
        if node.op_type == "Add":  # residual additions read what they read in the floating-point model
            node.input[:] = [sources.get(name, name) for name in node.input]
        graph.node.append(node)
        if node.name not in chosen:
            continue
        result, rounded = node.output[0], f"__edgeattn_int8_{node.output[0]}"
        twin = onnx.NodeProto()
        twin.CopyFrom(floats[node.name])
        twin.name = f"__edgeattn_float_{node.name}"
        graph.node[-1].output[0] = rounded
        graph.node.append(twin)
        difference = f"__edgeattn_difference_{node.name}"
        graph.node.append(onnx.helper.make_node("Sub", [rounded, result], [difference], name=difference))
        for part, source in zip(_PARTS, (result, difference), strict=True):
            output = _output(node.name, part)
            square, rows = f"{output}_square", f"{output}_rows"
            graph.node.append(onnx.helper.make_node("Mul", [source, source], [square], name=square))
            if chosen[node.name].axis == 0:  # a convolution: one row for each sample
                graph.node.append(onnx.helper.make_node("Flatten", [square], [rows], name=rows, axis=1))
                square = rows
            graph.node.append(onnx.helper.make_node("ReduceSum", [square, last], [output], name=output, keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return lean_session(copy)


def _sources(nodes: Collection[onnx.NodeProto]) -> dict[str, str]:
    """Return the floating-point tensor of every quantised activation."""
    sources = {node.output[0]: node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    return {
        node.output[0]: sources[node.input[0]]
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in sources
    }
