"""FP32 to INT8: Q/DQ nodes with calibrated scales in the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgeattn.export.attention_islands import attention_maps, softmax_islands
from edgeattn.export.calibration import CalibrationSamples, calibration_samples, input_shapes, input_types
from edgeattn.export.calibration_cache import Calibration, CalibrationCache
from edgeattn.export.calibration_methods import DEFAULT_METHOD, CalibrationMethod, method_named
from edgeattn.export.calibration_statistics import Observation, observe
from edgeattn.export.conformance import UNSUPPORTED_OPS, check_qdq
from edgeattn.export.int8_graph import QDQ_OPS, insert_qdq, residual_additions
from edgeattn.export.int8_layers import Layer, LayerPlan, constant_of, names_in, plan_layers, split_general_products
from edgeattn.export.int8_noise import signal_to_noise
from edgeattn.export.int8_smoothing import choose_factors, rescale
from edgeattn.export.metadata import metadata_of
from edgeattn.export.node_selection import selected_names, with_node_names
from edgeattn.export.opsets import IR_VERSION, standard_opset
from edgeattn.export.precision_types import check_types, element_types, has_half
from edgeattn.foundation import UserError

MINIMUM_SNR = 24.0
"""Least signal-to-noise ratio, in dB, of a layer's result in INT8: noise of a sixteenth of the signal's size."""


class NothingToQuantiseError(UserError):
    """No layer of a model has an INT8 form, or a good enough one."""


@dataclass(frozen=True)
class Int8Options:
    """How to quantise.

    Attributes:
        exclude: layers that stay in floating point: node names, or torch module paths for everything inside.
        method: name of the calibration method, see `edgeattn.export.calibration_methods`.
        attention: also quantise the products of two activations that belong to an attention.
        minimum_snr: layers whose result in INT8 has a lower signal-to-noise ratio (dB) stay in floating point.
        cache: folder in which calibration results are kept, by data and graph; None for none.
    """

    exclude: Collection[str] = ()
    method: str = DEFAULT_METHOD
    attention: bool = False
    minimum_snr: float = MINIMUM_SNR
    cache: Path | None = None


@dataclass(frozen=True)
class Int8Result:
    """An INT8 model and what is not INT8 in it.

    Attributes:
        model: the model with Q/DQ.
        layers: signal-to-noise ratio (dB) of the result of each INT8 layer, by node name.
        float_layers: convolutions and matrix products that stay in floating point, each with the reason.
        rescaled: activations whose channels are rescaled before quantisation.
        notes: sentences that a user should read.
    """

    model: onnx.ModelProto
    layers: Mapping[str, float]
    float_layers: Mapping[str, str]
    rescaled: tuple[str, ...]
    notes: tuple[str, ...]


def to_int8(
    model: onnx.ModelProto,
    samples: CalibrationSamples | Iterable[Mapping[str, np.ndarray]],
    *,
    exclude: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> onnx.ModelProto:
    """Return the model of `quantise` with its default options; see there."""
    return quantise(model, samples, Int8Options(exclude=exclude), progress=progress).model


def quantise(
    model: onnx.ModelProto,
    samples: CalibrationSamples | Iterable[Mapping[str, np.ndarray]],
    options: Int8Options | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Int8Result:
    """Quantise the convolutions and linear layers of a model to INT8.

    The input and the weight of each get symmetric INT8 Q/DQ: one scale for each activation, and one for each output
    channel of a weight. The channels of a linear layer's input are rescaled first where that halves the noise (see
    `edgeattn.export.int8_smoothing`). A layer whose result would still have too much noise stays in floating point, as
    do attention products (unless asked for), energies, masks and Softmax: quantising masked energies destroys them.
    For FP16 around the INT8 layers apply `to_fp16` to the result.

    Args:
        model: FP32 model at opset 13 or later, with or without plugin nodes and their functions; it is not changed.
        samples: calibration data, see `calibration_samples`; other iterables of batches are checked the same way.
        options: how to quantise.
        progress: called with the number of batches read so far.

    Returns:
        The model, of FP32 inputs and outputs with the same names, functions and metadata, and the record of its layers.
        Q/DQ nodes carry the metadata of the operator that they serve; a Gemm layer becomes MatMul and Add.

    Raises:
        NothingToQuantiseError: the model has no layer to quantise, or none that is good enough.
        UserError: the model is quantised or FP16 already, `exclude` names something unknown, the method is unknown, or
            the samples are too few or do not fit.
    """
    options = options or Int8Options()
    quantiser = _quantiser(model, options)
    calibration, notes = _calibrated(quantiser, samples, options, progress)
    return _result(quantiser, calibration, options, notes)


def calibrate(
    model: onnx.ModelProto,
    samples: CalibrationSamples | Iterable[Mapping[str, np.ndarray]],
    options: Int8Options | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Return what the data say about the layers of a model, for any number of `quantise_calibrated`.

    Args:
        model: as for `quantise`, and so are the others; the least signal-to-noise ratio has no effect.

    Raises:
        UserError: as `quantise`.
    """
    options = options or Int8Options()
    return _calibrated(_quantiser(model, options), samples, options, progress)[0]


def quantise_calibrated(
    model: onnx.ModelProto, calibration: Calibration, options: Int8Options | None = None
) -> Int8Result:
    """Quantise a model as `quantise` does, by what data have said already.

    Args:
        model: the model that was calibrated.
        calibration: of all its layers but, at most, those excluded here.
        options: how to quantise; method and cache have no effect.

    Raises:
        UserError: as `quantise`.
    """
    options = options or Int8Options()
    return _result(_quantiser(model, options), calibration, options, [])


@dataclass
class _Quantiser:
    """Makes quantised forms of one model.

    Attributes:
        source: the FP32 model, with unique node names.
        plan: its layers.
        split: the FP32 model whose Gemm layers are MatMul and Add.
    """

    source: onnx.ModelProto
    plan: LayerPlan
    split: onnx.ModelProto = field(init=False)

    def __post_init__(self) -> None:
        names = {layer.node for layer in self.plan.layers}
        if not any(node.op_type == "Gemm" and node.name in names for node in self.source.graph.node):
            self.split = self.source
            return
        working = ir.from_proto(self.source)
        split_general_products(working.graph, names, names_in(working.graph))
        self.split = _written(working, self.source)

    def inputs_of(self, layers: Iterable[Layer]) -> dict[str, list[Layer]]:
        """Return the layers that read each activation."""
        nodes = {node.name: node for node in self.split.graph.node}
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            for index in layer.activations:
                found.setdefault(nodes[layer.node].input[index], []).append(layer)
        return found

    def rescaled(self, calibration: Calibration, layers: Collection[Layer]) -> tuple[ir.Model, dict[str, float]]:
        """Return the floating-point model with rescaled activations, and the thresholds of its activations."""
        working = ir.from_proto(self.split)
        read = self.inputs_of(layers)
        factors = {name: divisors for name, divisors in calibration.factors.items() if name in read}
        names = {layer.node for layer in layers if layer.linear}
        divided = rescale(working.graph, factors, names, names_in(working.graph))
        thresholds = {divided.get(name, name): value for name, value in calibration.thresholds.items()}
        return working, thresholds

    def quantised(self, calibration: Calibration, layers: Collection[Layer]) -> onnx.ModelProto:
        """Return the model with Q/DQ at the given layers."""
        working, thresholds = self.rescaled(calibration, layers)
        graph = working.graph
        island = softmax_islands(graph)
        residuals = [node for node in residual_additions(graph, layers) if node not in island]
        insert_qdq(graph, layers, thresholds, residuals=residuals, taken=names_in(graph))
        working.ir_version = IR_VERSION
        return _written(working, self.source)


def _quantiser(model: onnx.ModelProto, options: Int8Options) -> _Quantiser:
    """Return what quantises the layers of a model that are not excluded, after checking that there are some."""
    named = with_node_names(model)
    _require_plain_fp32(named)
    excluded = selected_names(((node.name, metadata_of(node)) for node in named.graph.node), options.exclude, "exclude")
    plan = plan_layers(ir.from_proto(named).graph, excluded=excluded, attention=options.attention)
    if not plan.layers:
        raise NothingToQuantiseError(
            "the ONNX model has no convolution or linear layer with constant weights left to quantise. Drop INT8."
        )
    return _Quantiser(named, plan)


def _drop_unread(graph: ir.Graph, source: onnx.ModelProto) -> None:
    """Remove the weights that have another form now; what nothing read before stays."""
    read = {name for node in source.graph.node for name in node.input}
    for name, value in list(graph.initializers.items()):
        unread = not value.uses() and not value.is_graph_output() and not value.is_graph_input()
        if unread and (name in read or all(name != tensor.name for tensor in source.graph.initializer)):
            del graph.initializers[name]


def _written(working: ir.Model, source: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model as a proto, with the functions and recorded shapes of its source to the letter."""
    _drop_unread(working.graph, source)
    result = ir.to_proto(working)
    del result.functions[:]
    result.functions.extend(source.functions)
    graph = result.graph
    tensors = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    del graph.value_info[:]
    graph.value_info.extend(info for info in source.graph.value_info if info.name in tensors)
    return result


def _calibrated(
    quantiser: _Quantiser,
    samples: CalibrationSamples | Iterable[Mapping[str, np.ndarray]],
    options: Int8Options,
    progress: Callable[[int], None] | None,
) -> tuple[Calibration, list[str]]:
    """Return the calibration of a model's layers: from the cache, or from the data, with a look at the noise."""
    method = method_named(options.method)
    if not isinstance(samples, CalibrationSamples):
        source = quantiser.source
        samples = calibration_samples(samples, inputs=input_shapes(source), types=input_types(source))
    layers = quantiser.plan.layers
    cache, notes = None, list[str]()
    if options.cache is not None and samples.repeatable:
        parts = (quantiser.source.SerializeToString(deterministic=True), samples.fingerprint, method.name, layers)
        cache = CalibrationCache(options.cache, parts)
        known, notes = cache.read()
        if known is not None:
            return known, notes
    elif options.cache is not None:
        notes = [f"calibration data from {samples.origin} can be read once only, so its results are not kept."]
    read = quantiser.inputs_of(layers)
    linear = [name for name, readers in read.items() if all(layer.linear for layer in readers)]
    seen = observe(quantiser.split, samples, list(read), by_channel=linear, method=method, progress=progress)
    calibration = _decided(quantiser, seen, linear, method)
    noise = signal_to_noise(
        quantiser.quantised(calibration, layers),
        _written(quantiser.rescaled(calibration, layers)[0], quantiser.source),
        layers,
        seen.batches,
    )
    calibration = Calibration(calibration.thresholds, calibration.factors, noise)
    if cache is not None:
        cache.write(calibration)
    return calibration, notes


def _decided(
    quantiser: _Quantiser, seen: Observation, linear: Collection[str], method: CalibrationMethod
) -> Calibration:
    """Return thresholds and factors; the noise is not known yet."""
    graph = ir.from_proto(quantiser.split).graph
    nodes = {str(node.name): node for node in graph}
    thresholds, factors = {}, {}
    for name, readers in quantiser.inputs_of(quantiser.plan.layers).items():
        statistics = seen.activations[name]
        if name in linear:
            weights = [constant_of(nodes[layer.node].inputs[1]) for layer in readers]
            divisors = choose_factors(statistics, [weight for weight in weights if weight is not None])
            if divisors is not None:
                factors[name] = divisors
                assert statistics.halves is not None
                peaks = np.maximum(*(half.peaks for half in statistics.halves))
                thresholds[name] = float((peaks / divisors).max())
                continue
        histogram = statistics.histogram
        clip = method.threshold is not None and histogram is not None and histogram.peak > 0
        thresholds[name] = method.threshold(histogram) if clip else statistics.peak  # type: ignore[misc, arg-type]
    return Calibration(thresholds, factors, {})


def _result(quantiser: _Quantiser, calibration: Calibration, options: Int8Options, notes: list[str]) -> Int8Result:
    """Quantise the layers that are good enough, and check what comes out."""
    plan, noise = quantiser.plan, calibration.noise
    layers = [layer for layer in plan.layers if noise[layer.node] >= options.minimum_snr]
    noisy = {
        layer.node: f"its signal-to-noise ratio in INT8 is {noise[layer.node]:.1f} dB, below {options.minimum_snr:g} dB"
        for layer in plan.layers
        if layer not in layers
    }
    if not layers:
        best = max(noise.values())
        raise NothingToQuantiseError(
            f"no layer of the ONNX model reaches a signal-to-noise ratio of {options.minimum_snr:g} dB in INT8 (the "
            f"best has {best:.1f} dB). Use FP16, or give calibration data that is typical for the model."
        )
    model = quantiser.quantised(calibration, layers)
    check_types(model)
    if violations := check_qdq(_without_maps(model) if options.attention else model):
        raise RuntimeError("quantisation broke the Q/DQ rules: " + " ".join(violations))
    read = quantiser.inputs_of(layers)
    if options.attention and all(layer.axis is not None for layer in layers):
        notes = [*notes, "no product of an attention is INT8: there is none that is a MatMul and good enough."]
    notes = [*notes, *(f"{name} stays in floating point: {reason}." for name, reason in noisy.items())]
    return Int8Result(
        model,
        {layer.node: noise[layer.node] for layer in layers},
        {**plan.reasons, **noisy},
        tuple(name for name in calibration.factors if name in read),
        tuple(notes),
    )


def _without_maps(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without the Q/DQ that were asked for on attention maps, which the rules for the rest forbid."""
    working = ir.from_proto(model)
    maps = attention_maps(working.graph)
    for node in list(working.graph):
        source = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if source is None or source.producer() not in maps:
            continue
        for reader, _ in tuple(node.outputs[0].uses()):
            reader.outputs[0].replace_all_uses_with(source)
            working.graph.remove(reader, safe=True)
        working.graph.remove(node, safe=True)
    return ir.to_proto(working)


def _require_plain_fp32(model: onnx.ModelProto) -> None:
    if has_half(element_types(model)):
        raise UserError("the ONNX model is FP16 or BF16 already. Quantise its FP32 form, then convert that to FP16.")
    if any(node.op_type in {*QDQ_OPS, *UNSUPPORTED_OPS} for node in model.graph.node):
        raise UserError("the ONNX model is quantised already. Give its FP32 form.")
    if (opset := standard_opset(model)) < 13:
        raise UserError(f"the ONNX model has opset {opset}, but scales for each channel need 13. Export it again.")
