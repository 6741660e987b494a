"""FP32 to INT8: Q/DQ nodes with calibrated scales in the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from edgeattn.export.attention_islands import attention_maps, softmax_islands
from edgeattn.export.calibration import CalibrationSamples, calibration_samples, input_shapes
from edgeattn.export.conformance import UNSUPPORTED_OPS, check_qdq
from edgeattn.export.metadata import metadata_of
from edgeattn.export.node_selection import selected_names, with_node_names
from edgeattn.export.opsets import IR_VERSION, standard_opset
from edgeattn.export.precision_types import check_types, element_types, has_half
from edgeattn.foundation import UserError

QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")

OPTIONS: Mapping[str, object] = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Add", "Softmax"],
}
"""The only setting whose result TensorRT's parser takes: zero points of 0 and floating-point biases. Operators'
outputs get no Q/DQ of their own, which would part a convolution from the activation behind it."""

_PRE_PROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")


def to_int8(
    model: onnx.ModelProto,
    samples: CalibrationSamples | Iterable[Mapping[str, np.ndarray]],
    *,
    exclude: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> onnx.ModelProto:
    """Quantise the convolutions of a model to INT8.

    Every convolution's input and weight get symmetric INT8 Q/DQ: one scale for each activation, from its smallest and
    largest number over all samples, and one for each output channel of a weight. Attention cores, matrix products,
    masks and Softmax stay in floating point: quantising masked energies destroys them. For FP16 around the INT8
    convolutions apply `to_fp16` to the result.

    Args:
        model: FP32 model at opset 13 or later, with or without plugin nodes and their functions; it is not changed.
        samples: calibration data, see `calibration_samples`; other iterables of batches are checked the same way.
        exclude: convolutions that stay in floating point: node names, or torch module paths for everything inside.
        progress: called with the number of batches read so far.

    Returns:
        A model of FP32 inputs and outputs with the same names, functions and metadata; Q/DQ nodes carry the metadata of
        the operator that they serve.

    Raises:
        UserError: the model is quantised or FP16 already, has no convolution to quantise, `exclude` names something
            unknown, or the samples are too few or do not fit.
    """
    named = with_node_names(model)
    _require_plain_fp32(named)
    if not isinstance(samples, CalibrationSamples):
        samples = calibration_samples(samples, inputs=input_shapes(named))
    metadata = {node.name: metadata_of(node) for node in named.graph.node}
    excluded = selected_names(metadata.items(), exclude, "exclude")
    graph = ir.from_proto(named).graph
    maps = attention_maps(graph)
    convolutions = [str(node.name) for node in graph if node.name not in excluded and _quantisable(node, maps)]
    if not convolutions:
        raise UserError("the ONNX model has no convolution with constant weights left to quantise. Drop INT8 for it.")
    quantised = _quantise(named, samples, convolutions, progress)
    _restore(quantised, named)
    island = {str(node.name) for node in softmax_islands(graph)}
    additions = {str(node.name) for node in graph if node.op_type == "Add"} - island
    _spare_readers(quantised, additions | set(convolutions))
    _annotate(quantised)
    check_types(quantised)
    if violations := check_qdq(quantised):
        raise RuntimeError("quantisation broke the Q/DQ rules: " + " ".join(violations))
    return quantised


def _quantisable(node: ir.Node, maps: Collection[ir.Node]) -> bool:
    """Say whether a node is a convolution with constant weights, and not one over an attention map."""
    if node.op_type != "Conv" or node.domain != "":
        return False
    source, weight = node.inputs[:2]
    return source is not None and source.producer() not in maps and weight is not None and weight.is_initializer()


def _require_plain_fp32(model: onnx.ModelProto) -> None:
    if has_half(element_types(model)):
        raise UserError("the ONNX model is FP16 or BF16 already. Quantise its FP32 form, then convert that to FP16.")
    if any(node.op_type in {*QDQ_OPS, *UNSUPPORTED_OPS} for node in model.graph.node):
        raise UserError("the ONNX model is quantised already. Give its FP32 form.")
    if (opset := standard_opset(model)) < 13:
        raise UserError(f"the ONNX model has opset {opset}, but scales for each channel need 13. Export it again.")


class _Reader(CalibrationDataReader):
    """Hands batches to ONNX Runtime one at a time and reports progress."""

    def __init__(self, samples: Iterable[dict[str, np.ndarray]], progress: Callable[[int], None] | None) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(samples)
        self._progress = progress
        self._count = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None at the end."""
        batch = next(self._batches, None)
        if batch is not None and self._progress is not None:
            self._count += 1
            self._progress(self._count)
        return batch


def _quantise(
    model: onnx.ModelProto, samples: CalibrationSamples, nodes: list[str], progress: Callable[[int], None] | None
) -> onnx.ModelProto:
    """Run ONNX Runtime's static quantisation on a copy of the model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # Says that the graph is folded and has shapes; without it ONNX Runtime warns through the root logger.
    copy.metadata_props.add(key=_PRE_PROCESSED[0], value=_PRE_PROCESSED[1])
    with tempfile.TemporaryDirectory(prefix="edgeattn-") as folder:
        target = Path(folder) / "int8.onnx"
        quantize_static(
            copy,
            target,
            _Reader(samples, progress),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options=dict(OPTIONS),
        )
        return onnx.load(target)


def _restore(quantised: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Undo what the quantiser changes beside the Q/DQ nodes.

    It writes its own name and inferred shapes with invented symbols into the model, and imports domains.
    """
    quantised.ir_version = IR_VERSION
    quantised.producer_name, quantised.producer_version = model.producer_name, model.producer_version
    quantised.graph.name = model.graph.name
    for ours, theirs in (
        (model.opset_import, quantised.opset_import),
        (model.functions, quantised.functions),
        (model.metadata_props, quantised.metadata_props),
    ):
        del theirs[:]
        theirs.extend(ours)
    graph = quantised.graph
    tensors = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    del graph.value_info[:]
    graph.value_info.extend(info for info in model.graph.value_info if info.name in tensors)


def _spare_readers(model: onnx.ModelProto, allowed: Collection[str]) -> None:
    """Let only the named nodes, quantised convolutions and residual additions, read a quantised tensor.

    ONNX Runtime puts the Q/DQ of a convolution's input before all readers of that tensor. An addition then adds INT8,
    which TensorRT fuses into the convolution before it. For the others, such as plugin nodes, the path to a Softmax
    or Shape, it would only add error.
    """
    graph = model.graph
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    floats = {
        node.output[0]: sources[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in sources
    }
    for node in graph.node:
        if node.name not in allowed:
            node.input[:] = [floats.get(name, name) for name in node.input]


def _annotate(model: onnx.ModelProto) -> None:
    """Give every Q/DQ node the metadata of the first operator that it serves."""
    nodes = model.graph.node
    readers = {name: node for node in reversed(nodes) for name in node.input}
    for node in reversed(nodes):  # so that a Q finds its metadata on the DQ behind it
        if node.op_type in QDQ_OPS and node.output[0] in readers and not node.metadata_props:
            node.metadata_props.extend(readers[node.output[0]].metadata_props)
