"""Makes the ONNX form of any assignment from one FP32 graph and one calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from edgeattn.deploy.tuning.modules import Module
from edgeattn.deploy.tuning.search import Assignment
from edgeattn.export.calibration import CalibrationSamples
from edgeattn.export.calibration_cache import Calibration
from edgeattn.export.fp16 import Fp16Result, to_fp16
from edgeattn.export.int8 import Int8Options, calibrate, quantise_calibrated
from edgeattn.export.ranges import MeasuredRanges

EVERY_LAYER = float("-inf")
"""Least signal-to-noise ratio with which no layer stays in floating point by itself: the assignment decides."""


@dataclass(frozen=True)
class KnownCalibration:
    """Calibration results of all layers, and what they were computed from.

    Attributes:
        results: thresholds, factors and noise of every layer that has an INT8 form.
        fingerprint: of the calibration samples.
        method: name of the calibration method.
        attention: attention products are among the layers.
    """

    results: Calibration
    fingerprint: str
    method: str
    attention: bool


@dataclass(frozen=True)
class Surroundings:
    """What decides about FP16 beside the assignment.

    Attributes:
        ranges: what the tensors of the graph hold on data; None where that was not measured.
        keep_fp32: nodes or module paths that the user keeps in FP32.
    """

    ranges: MeasuredRanges | None = None
    keep_fp32: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal surroundings."""
        return repr((self.keep_fp32, self.ranges and sorted(self.ranges.tensors.items())))


def known_calibration(
    model: onnx.ModelProto,
    samples: CalibrationSamples,
    options: Int8Options,
    *,
    progress: Callable[[int], None] | None = None,
) -> KnownCalibration:
    """Calibrate all layers of a graph once, or read the result from the cache.

    Args:
        model: FP32 graph with unique node names.
        samples: calibration data.
        options: method, attention and the folder of the cache.
        progress: called with the number of batches read so far.

    Raises:
        UserError: the graph has no layer with an INT8 form, or the samples cannot be used.
    """
    results = calibrate(model, samples, options, progress=progress)
    return KnownCalibration(results, samples.fingerprint, options.method, options.attention)


@dataclass(frozen=True)
class FormMaker:
    """Makes forms of one graph.

    Attributes:
        model: FP32 graph with unique node names.
        modules: its modules.
        calibration: of all layers; None where no assignment uses INT8.
        surroundings: what else decides about FP16.
    """

    model: onnx.ModelProto
    modules: tuple[Module, ...]
    calibration: KnownCalibration | None
    surroundings: Surroundings = Surroundings()

    def form(self, assignment: Assignment) -> Fp16Result:
        """Return the model of an assignment, with what stayed FP32 in it and notes.

        An INT8 module has its convolutions and linear layers in INT8; everything else in it is as the rest is.
        """
        model = self._quantised(assignment)
        levels = self._levels(assignment)
        if "fp16" not in levels.values():
            return Fp16Result(model, {}, ())
        exact = [name for name, level in levels.items() if level == "fp32"]
        around = self.surroundings
        return to_fp16(model, keep_fp32=(*exact, *around.keep_fp32), ranges=around.ranges)

    def _levels(self, assignment: Assignment) -> dict[str, str]:
        """Return the precision of every node apart from its INT8 layers."""
        levels = {node.name: assignment.rest for node in self.model.graph.node}
        for module in self.modules:
            if (level := assignment.precisions[module.name]) != "int8":
                levels.update(dict.fromkeys(module.nodes, level))
        return levels

    def _quantised(self, assignment: Assignment) -> onnx.ModelProto:
        chosen = {
            layer for module in self.modules if assignment.precisions[module.name] == "int8" for layer in module.layers
        }
        if not chosen:
            return self.model
        known = self.calibration
        assert known is not None
        exclude = [node.name for node in self.model.graph.node if node.name not in chosen]
        options = Int8Options(exclude, known.method, known.attention, EVERY_LAYER)
        return quantise_calibrated(self.model, known.results, options).model
