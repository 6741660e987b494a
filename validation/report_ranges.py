"""Section of a page: what the tensors of a model hold on data, with the limits of FP16 and of INT8."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeattn.export.calibration_statistics import lean_session
from edgeattn.export.metadata import metadata_of, module_scopes
from edgeattn.export.model_file import load_model
from edgeattn.export.precision_types import FP16
from edgeattn.export.ranges import MeasuredRanges, measure_ranges
from edgeattn.validation.report_charts import Row, RowChart, Scale, bar, dot
from edgeattn.validation.report_page import Section, section
from edgeattn.validation.runners import MEASURED_ON

SHOWN = 24
"""Rows of each chart."""

SAMPLES = 8
"""Samples that are measured on, at most; peaks settle soon."""

_HALF = np.finfo(np.float16)
LARGEST, NORMAL, SUBNORMAL = float(_HALF.max), float(_HALF.smallest_normal), float(_HALF.smallest_subnormal)
"""Of FP16: the largest number, the smallest with all digits, and the smallest of all."""

_LIMITS = (("limit", LARGEST), ("limit dashed", NORMAL), ("limit dotted", SUBNORMAL))
_LEGEND = (
    ("a bar", "smallest to largest magnitude"),
    ("point", "root mean square"),
    ("limit", f"largest FP16 number {LARGEST:.0f}"),
    ("limit dashed", f"smallest normal FP16 number {NORMAL:.1e}"),
    ("limit dotted", f"smallest FP16 number {SUBNORMAL:.1e}"),
)
_INT8 = ("b band", "INT8: from one step to the end of its range")


@dataclass(frozen=True)
class QuantisedRange:
    """What INT8 can say of a tensor.

    Attributes:
        step: its scale.
        largest: the largest magnitude that it holds; what lies beyond is clipped.
    """

    step: float
    largest: float


@dataclass(frozen=True)
class TensorSpan:
    """What one tensor held.

    Attributes:
        name: of the tensor.
        module: path of the torch module that makes it; empty where the model does not say.
        smallest: smallest magnitude but zero; infinite where all is zero.
        mean: root mean square.
        peak: largest magnitude.
        loss: relative L2 that rounding to FP16 changes.
        defect: why FP16 cannot hold it; None when it can.
        int8: its range in the INT8 form; None where it is not quantised.
    """

    name: str
    module: str
    smallest: float
    mean: float
    peak: float
    loss: float
    defect: str | None
    int8: QuantisedRange | None

    @property
    def clipped(self) -> float:
        """The share of the peak that lies beyond the range of INT8."""
        return max(0.0, 1 - self.int8.largest / self.peak) if self.int8 and self.peak else 0.0


@dataclass(frozen=True)
class Spans:
    """What the tensors of a model held.

    Attributes:
        data: what was measured on, in words.
        samples: how many.
        tensors: how many tensors there are.
        half: those nearest to the limits of FP16, nearest first; values that are only passed on, once.
        rest: smallest and largest peak of the tensors that are not among them; None without any.
        quantised: tensors of the INT8 form, the most clipped first, then the most coarsely rounded.
        further: how many quantised tensors are not among them.
    """

    data: str
    samples: int
    tensors: int
    half: tuple[TensorSpan, ...]
    rest: tuple[float, float] | None
    quantised: tuple[TensorSpan, ...]
    further: int


def measure_spans(
    path: Path,
    feeds: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    data: str,
    int8: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Spans:
    """Run the FP32 form of a model on data and measure the tensors that come nearest to the limits.

    Args:
        path: the FP32 form.
        feeds: gives network inputs, anew by every call.
        data: what they are, in words.
        int8: the INT8 form of the same graph; None where there is none.
        progress: called with the steps done and in all.

    Raises:
        UserError: a file cannot be read.
    """
    model = load_model(path)
    scales = _quantised(load_model(int8)) if int8 else {}

    def told(offset: int) -> Callable[[int], None]:
        return lambda done: progress(offset + done, 2 * SAMPLES) if progress else None

    ranges = measure_ranges(model, islice(feeds(), SAMPLES), FP16, progress=told(0))
    known = ranges.tensors
    near = sorted(known, key=lambda name: (ranges.defect(name) is None, -ranges.severity(name)))
    near = _distinct(near, ranges)
    coarse = sorted(
        (name for name in scales if name in known),
        key=lambda name: (-max(1.0, known[name].peak / scales[name].largest), -scales[name].step),
    )
    chosen = list(dict.fromkeys([*near[:SHOWN], *coarse[:SHOWN]]))
    details = _details(model, chosen, islice(feeds(), SAMPLES), told(SAMPLES))
    modules = _modules(model)
    spans = {
        name: TensorSpan(
            name,
            modules.get(name, ""),
            *details[name],
            known[name].peak,
            known[name].loss,
            ranges.defect(name),
            scales.get(name),
        )
        for name in chosen
    }
    others = [known[name].peak for name in known if name not in near[:SHOWN]]
    return Spans(
        data=data,
        samples=ranges.batches,
        tensors=len(known),
        half=tuple(spans[name] for name in near[:SHOWN]),
        rest=(min(others), max(others)) if others else None,
        quantised=tuple(spans[name] for name in coarse[:SHOWN]),
        further=len(coarse[SHOWN:]),
    )


def ranges_section(spans: Spans) -> Section:
    """Return the section of measured tensors."""
    return section(
        "ranges.html.j2",
        "ranges",
        "Ranges of tensors",
        spans=spans,
        measured=MEASURED_ON,
        half=_chart(spans.half),
        quantised=_chart(spans.quantised) if spans.quantised else None,
    )


def _distinct(names: Iterable[str], ranges: MeasuredRanges) -> list[str]:
    """Leave out tensors that fit and have the peak of one before: the same values, moved or passed on."""
    peaks: set[float] = set()
    kept = []
    for name in names:
        peak = ranges.tensors[name].peak
        if ranges.defect(name) is not None or peak not in peaks:
            kept.append(name)
        peaks.add(peak)
    return kept


def _quantised(model: onnx.ModelProto) -> dict[str, QuantisedRange]:
    """Return the ranges of the activations that a graph quantises as a whole, by their names before any cast."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    found = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants or node.input[1] not in constants:
            continue
        step = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros((), np.int8)
        if step.size != 1:
            continue
        name = node.input[0]
        while name in casts:
            name = casts[name]
        info, offset = np.iinfo(zero.dtype), int(zero.item())
        found[name] = QuantisedRange(float(step.item()), float(step.item() * max(info.max - offset, offset - info.min)))
    return found


def _modules(model: onnx.ModelProto) -> dict[str, str]:
    """Return the innermost torch module that makes each tensor."""
    scopes = {name: module_scopes(metadata_of(node)) for node in model.graph.node for name in node.output}
    return {name: paths[-1] for name, paths in scopes.items() if paths}


def _details(
    model: onnx.ModelProto,
    names: Sequence[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[int], None],
) -> dict[str, tuple[float, float]]:
    """Return the smallest magnitude but zero, and the root mean square, of some tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    own = "__edgeattn_"
    infinite = numpy_helper.from_array(np.array(np.inf, np.float32), f"{own}infinite")
    zero = numpy_helper.from_array(np.array(0, np.float32), f"{own}zero")
    copy.graph.initializer.extend([infinite, zero])
    for index, name in enumerate(names):
        made = {what: f"{own}{what}{index}" for what in ("abs", "filled", "held", "smallest", "square", "mean")}
        copy.graph.node.extend(
            [
                helper.make_node("Abs", [name], [made["abs"]]),
                helper.make_node("Greater", [made["abs"], zero.name], [made["filled"]]),
                helper.make_node("Where", [made["filled"], made["abs"], infinite.name], [made["held"]]),
                helper.make_node("ReduceMin", [made["held"]], [made["smallest"]], keepdims=0),
                helper.make_node("Mul", [name, name], [made["square"]]),
                helper.make_node("ReduceMean", [made["square"]], [made["mean"]], keepdims=0),
            ]
        )
        copy.graph.output.extend(
            helper.make_tensor_value_info(made[what], TensorProto.FLOAT, []) for what in ("smallest", "mean")
        )
    session = lean_session(copy)
    smallest, squares, count = np.full(len(names), np.inf), np.zeros(len(names)), 0
    for count, feed in enumerate(feeds, start=1):
        found = np.array(session.run(None, dict(feed)), np.float64).reshape(-1, 2)
        smallest, squares = np.fmin(smallest, found[:, 0]), squares + found[:, 1]
        progress(count)
    means = np.sqrt(squares / max(count, 1))
    return {name: (float(smallest[index]), float(means[index])) for index, name in enumerate(names)}


def _chart(spans: Sequence[TensorSpan]) -> RowChart:
    held = [value for span in spans for value in (span.smallest, span.peak)]
    steps = [span.int8.step for span in spans if span.int8]
    scale = Scale.decades([*held, *steps, LARGEST, SUBNORMAL])
    return RowChart(
        axis="magnitude, on a logarithmic axis",
        scale=scale,
        rows=tuple(_row(span, scale) for span in spans),
        limits=_LIMITS,
        legend=(*_LEGEND, *([_INT8] if steps else [])),
    )


def _row(span: TensorSpan, scale: Scale) -> Row:
    marks = []
    if math.isfinite(span.smallest):
        marks += [bar("a bar", scale, span.smallest, span.peak, height=38), dot("point", scale.at(span.mean), 38)]
    note = f"peak {span.peak:.3g}, rms {span.mean:.2g}"
    if span.defect:
        note += f"; {span.defect}"
    if span.int8:
        marks.append(bar("b band", scale, span.int8.step, span.int8.largest, height=85))
        note += f"; INT8 step {span.int8.step:.2g}, up to {span.int8.largest:.3g}"
    label = f"{span.module} ({span.name})" if span.module else span.name
    return Row(label, note, tuple(marks), alarm=span.defect is not None)
