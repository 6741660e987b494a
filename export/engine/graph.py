"""The graph that an engine is built from: the user's model in the wanted precision and the form the parser needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgeattn.export.calibration import calibration_samples, input_shapes, input_types
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import quantise
from edgeattn.export.surgery import inline_plugins, strip_bodies
from edgeattn.foundation import UserError, atomic_path
from edgeattn.plugins_trt import DOMAIN

BODIES_GIVE_WAY = (10, 7)
"""First TensorRT version that prefers a registered plugin over a function body of the same name."""


@dataclass(frozen=True)
class PrecisionOptions:
    """How the graph's types are changed before the build.

    Attributes:
        fp16: FP16 where it is safe, see `to_fp16`.
        int8: INT8 convolutions and linear layers; the rest is FP32, or FP16 together with `fp16`.
        calibration: .npz file that INT8 is calibrated on, already preprocessed.
    """

    fp16: bool = False
    int8: bool = False
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.int8 and self.calibration is None:
            raise UserError(
                "INT8 needs typical data. Give a .npz file with one preprocessed float32 array for each input with "
                "--calibration, or quantise the model with `edgeattn export --int8` first."
            )
        if self.calibration is not None:
            if not self.int8:
                raise UserError(f"calibration data is given ({self.calibration}), but no INT8. Add --int8 or drop it.")
            if not self.calibration.is_file():
                raise UserError(f"the calibration data {self.calibration} is no file. Give a .npz file.")


@dataclass(frozen=True)
class PreparedGraph:
    """What the parser is given.

    Attributes:
        model: the graph.
        plugin_nodes: how many of its nodes have to become plugin layers.
        notes: what a user should read about the changes.
    """

    model: onnx.ModelProto
    plugin_nodes: int
    notes: tuple[str, ...] = ()


def changes(model: onnx.ModelProto, precision: PrecisionOptions, *, plugins: bool, release: tuple[int, int]) -> bool:
    """Return whether `prepare` would change the model, so that the parser needs another file."""
    if precision.fp16 or precision.int8:
        return True
    return _plugin_nodes(model) > 0 and (not plugins or (release < BODIES_GIVE_WAY and bool(model.functions)))


def prepare(
    model: onnx.ModelProto,
    precision: PrecisionOptions,
    *,
    plugins: bool,
    release: tuple[int, int],
    progress: Callable[[int], None] | None = None,
) -> PreparedGraph:
    """Give a model the wanted precision, and its plugin nodes the form that a TensorRT version needs.

    Args:
        model: as the user gave it; not modified.
        precision: types to write into the graph.
        plugins: plugin libraries are given; without them the bodies of plugin nodes take their place.
        release: TensorRT version (major, minor).
        progress: called with the number of calibration batches read.

    Raises:
        UserError: the precision stage refuses the model, or plugin nodes have neither library nor body.
    """
    notes: list[str] = []
    if precision.int8 and precision.calibration is not None:
        samples = calibration_samples(precision.calibration, inputs=input_shapes(model), types=input_types(model))
        quantised = quantise(model, samples, progress=progress)
        model = quantised.model
        notes += quantised.notes
    if precision.fp16:
        result = to_fp16(model)
        model = result.model
        notes += result.notes
    count = _plugin_nodes(model)
    if count and not plugins:
        notes.append(f"no plugin library is given, so {count} plugin nodes became standard operators.")
        return PreparedGraph(inline_plugins(model), 0, tuple(notes))
    if count and release < BODIES_GIVE_WAY:
        model = strip_bodies(model)
    return PreparedGraph(model, count, tuple(notes))


def _plugin_nodes(model: onnx.ModelProto) -> int:
    return sum(node.domain == DOMAIN for node in model.graph.node)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph atomically."""
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
