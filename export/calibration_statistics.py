"""One pass of calibration data through a model: what its activations held, one batch in memory at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from edgeattn.export.calibration import Batch
from edgeattn.export.calibration_methods import CalibrationMethod, MagnitudeHistogram

KEPT_ROWS = 256
"""Rows of an activation that are kept of each half of the batches."""

KEPT_BATCHES = 4
"""Batches of inputs that are kept to measure the noise of INT8 on."""

_PEAK = "__edgeattn_peak"


@dataclass
class ChannelStatistics:
    """What one half of the batches held in an activation whose last axis is that of the channels.

    Attributes:
        peaks: largest magnitude of each channel.
        rows: rows (tokens) drawn at random, all with the same chance.
    """

    peaks: np.ndarray
    rows: np.ndarray
    _keys: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def add(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """Take in the rows of one batch."""
        self.peaks = np.maximum(self.peaks, np.abs(rows).max(axis=0, initial=0.0))
        keys = np.concatenate([self._keys, rng.random(len(rows))])
        chosen = np.sort(np.argsort(keys, kind="stable")[:KEPT_ROWS])
        old = chosen[chosen < len(self._keys)]
        self.rows = np.concatenate([self.rows[old], rows[chosen[len(old) :] - len(self._keys)]])
        self._keys = keys[chosen]


@dataclass
class ActivationStatistics:
    """What an activation held.

    Attributes:
        peak: largest magnitude.
        histogram: all magnitudes, where the method asks for them.
        halves: the batches of even and of odd number by channel, for inputs of linear layers.
    """

    peak: float = 0.0
    histogram: MagnitudeHistogram | None = None
    halves: tuple[ChannelStatistics, ChannelStatistics] | None = None


@dataclass(frozen=True)
class Observation:
    """The result of a pass.

    Attributes:
        activations: statistics by tensor name.
        batches: inputs of some batches, drawn at random.
    """

    activations: dict[str, ActivationStatistics]
    batches: list[Batch]


def observe(
    model: onnx.ModelProto,
    samples: Iterable[Batch],
    tensors: Collection[str],
    *,
    by_channel: Collection[str],
    method: CalibrationMethod,
    progress: Callable[[int], None] | None = None,
) -> Observation:
    """Run all samples once and describe activations.

    Args:
        model: FP32 model.
        samples: batches of inputs.
        tensors: names of activations (or inputs) to describe.
        by_channel: those of them that also get statistics of their channels.
        method: says whether histograms are needed. Without them only peaks leave the model.
        progress: called with the number of batches run so far.
    """
    whole = [name for name in tensors if name in by_channel or method.threshold is not None]
    peaks = [name for name in tensors if name not in whole]
    inputs = {info.name for info in model.graph.input}
    session = _session(model, [name for name in whole if name not in inputs], peaks)
    names = [output.name for output in session.get_outputs()]
    wanted = [name for name in names if name.startswith(_PEAK) or name in whole]
    found = {name: ActivationStatistics() for name in tensors}
    if method.threshold is not None:
        for statistics in found.values():
            statistics.histogram = MagnitudeHistogram()
    kept: list[Batch] = []
    draw = np.random.default_rng(0)
    for number, batch in enumerate(samples):
        arrays = dict(zip(wanted, session.run(wanted, batch), strict=True)) if wanted else {}
        for name, statistics in found.items():
            if name in peaks:
                statistics.peak = max(statistics.peak, float(arrays[_PEAK + name]))
            else:
                array = batch[name] if name in inputs else arrays[name]
                _describe(statistics, array, number, name if name in by_channel else None)
        if len(kept) < KEPT_BATCHES:
            kept.append(batch)
        elif (place := int(draw.integers(number + 1))) < KEPT_BATCHES:
            kept[place] = batch
        if progress is not None:
            progress(number + 1)
    return Observation(found, kept)


def _describe(statistics: ActivationStatistics, array: np.ndarray, number: int, by_channel: str | None) -> None:
    """Add one batch to the statistics of an activation."""
    statistics.peak = max(statistics.peak, float(np.abs(array).max(initial=0.0)))
    if statistics.histogram is not None:
        statistics.histogram.add(array)
    if by_channel is not None:
        rows = array.reshape(-1, array.shape[-1])
        if statistics.halves is None:
            channels = rows.shape[1]
            statistics.halves = (_empty(channels), _empty(channels))
        statistics.halves[number % 2].add(rows, np.random.default_rng((zlib.crc32(by_channel.encode()), number)))


def _empty(channels: int) -> ChannelStatistics:
    return ChannelStatistics(np.zeros(channels, np.float32), np.zeros((0, channels), np.float32))


def _session(model: onnx.ModelProto, whole: list[str], peaks: list[str]) -> onnxruntime.InferenceSession:
    """Return a session of a copy of the model that also gives tensors, or only their peaks."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    present = {output.name for output in graph.output}
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in whole if name not in present
    )
    for name in peaks:
        absolute, peak = f"__edgeattn_absolute{name}", _PEAK + name
        graph.node.append(onnx.helper.make_node("Abs", [name], [absolute], name=absolute))
        graph.node.append(onnx.helper.make_node("ReduceMax", [absolute], [peak], name=peak, keepdims=0))
        graph.output.append(onnx.helper.make_tensor_value_info(peak, TensorProto.FLOAT, []))
    return lean_session(copy)


def lean_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session that gives memory back as soon as a tensor has been read; it empties the given model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # weights that only one of two forms reads are no news
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    content = model.SerializeToString()
    model.Clear()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
