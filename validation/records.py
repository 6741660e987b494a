"""The record of a comparison: what was compared, measured, allowed and found; and its JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.export.support import SupportReport
from edgeattn.foundation import write_text
from edgeattn.validation.metrics import HISTOGRAM_EDGES, METRICS, Confusion, TensorError
from edgeattn.validation.runners import FormFacts, Latency
from edgeattn.validation.tolerance import Tolerance, require_precision


@dataclass(frozen=True)
class Form:
    """One form of a model.

    Attributes:
        name: unique name in tables, such as "fp16 plugin".
        path: the ONNX file, or the engine that `edgeattn build` made here.
        precision: "fp32", "fp16" or "int8".
        plugin: the attention cores are nodes of domain `edgeattn`.
        plugin_libraries: libraries that an engine needs to load.
        accumulation: terms after which the emulation of FP16 rounds running totals to FP16; None for FP32 sums.

    Raises:
        UserError: the precision is unknown.
    """

    name: str
    path: Path
    precision: str
    plugin: bool
    plugin_libraries: tuple[Path, ...] = ()
    accumulation: int | None = None

    def __post_init__(self) -> None:
        require_precision(self.precision)


@dataclass(frozen=True)
class TaskScore:
    """What a network reaches on the task.

    Attributes:
        metric: name of the task metric, see `edgeattn.validation.metrics.METRICS`.
        value: its value, 0..1; NaN where nothing was scored.
        by_class: the value of each class, NaN where it does not occur.
    """

    metric: str
    value: float
    by_class: tuple[float, ...]

    @classmethod
    def of(cls, metric: str, confusion: Confusion) -> TaskScore:
        """Return the score that a confusion matrix amounts to."""
        rule = METRICS[metric]
        return cls(metric, rule.overall(confusion), tuple(float(score) for score in rule.classes(confusion)))


@dataclass(frozen=True)
class FormParity:
    """What was measured of one form, and the verdict.

    Attributes:
        form: the form.
        facts: what its file holds.
        measured: where and how the numbers were obtained.
        outputs: error of each output; empty when the form did not run.
        label_agreement: fraction of labels, of pixels or of whole images, that are the original's.
        score: task metric against the targets.
        task_drop: the original's task metric minus the form's (0..1).
        tolerance: limits, with their derivation.
        reasons: why it fails, one sentence each; empty when it passes.
        latency: as its runtime runs the file; None when not timed.
    """

    form: Form
    facts: FormFacts
    measured: str
    outputs: Mapping[str, TensorError]
    label_agreement: float
    score: TaskScore
    task_drop: float
    tolerance: Tolerance
    reasons: tuple[str, ...]
    latency: Latency | None

    @property
    def passed(self) -> bool:
        """Whether no limit was exceeded."""
        return not self.reasons


@dataclass(frozen=True)
class SizeCheck:
    """One form at one image size.

    Attributes:
        form: name of the form.
        size: (height, width) in pixels.
        relative_l2: largest relative L2 of a sample, by output.
        label_agreement: fraction of labels, of pixels or of whole images, that are the original's.
        reasons: why it fails; empty when it passes or was skipped.
        skipped: why the size was not run; None when it was.
    """

    form: str
    size: tuple[int, int]
    relative_l2: Mapping[str, float]
    label_agreement: float
    reasons: tuple[str, ...]
    skipped: str | None = None


@dataclass(frozen=True)
class Picture:
    """One sample kept for the report.

    Attributes:
        images: RGB inputs (H, W, 3) uint8.
        target: labels (K, H, W); None where the truth is not known.
        original: labels by the original (K, H, W).
        forms: labels by each form that ran.
    """

    images: tuple[np.ndarray, ...]
    target: np.ndarray | None
    original: np.ndarray
    forms: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        model: name of the model.
        classes: class names by label.
        samples: number of samples compared.
        unlabelled: how many of them have no target, so that the original's labels stood in for the truth.
        original: task metric of the PyTorch original.
        original_latency: of the original in eager PyTorch on the CPU; None when not timed.
        forms: one entry per form, in the order given.
        sizes: results of `compare_sizes`; add them with `dataclasses.replace`.
        pictures: the first samples, for the report; not part of `as_dict`.
        environment: versions of what computed the numbers.
    """

    model: str
    classes: tuple[str, ...]
    samples: int
    unlabelled: int
    original: TaskScore
    original_latency: Latency | None
    forms: tuple[FormParity, ...]
    sizes: tuple[SizeCheck, ...] = ()
    support: tuple[SupportReport, ...] = ()
    pictures: tuple[Picture, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every form passed, at every size it takes."""
        return all(entry.passed for entry in self.forms) and not any(check.reasons for check in self.sizes)

    @property
    def status(self) -> str:
        """Where the numbers come from, which no reader may misunderstand."""
        engines = sorted({entry.measured for entry in self.forms if entry.measured.startswith("TensorRT")})
        if engines:
            return f"Engines measured with {'; '.join(engines)}. Everything else on CPU."
        return "Measured on CPU with ONNX Runtime; nothing here ran on TensorRT, a GPU or a Jetson."

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the pictures in types that JSON has; NaN becomes null, infinity the string "inf"."""
        elsewhere = ("pictures", "support")
        record = {member.name: getattr(self, member.name) for member in fields(self) if member.name not in elsewhere}
        record["forms"] = [{"verdict": _VERDICT[entry.passed], **_members(entry)} for entry in self.forms]
        return {
            "verdict": _VERDICT[self.passed],
            "status": self.status,
            "support": [_without_nodes(report.as_dict()) for report in self.support],
            "histogram_log10_edges": _plain(HISTOGRAM_EDGES.tolist()),
            **_plain(record),
        }


_VERDICT = {True: "PASS", False: "FAIL"}


def _without_nodes(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "nodes"}


def _members(value: Any) -> dict[str, Any]:
    return {member.name: getattr(value, member.name) for member in fields(value)}


def _plain(value: Any) -> Any:
    """Return a value in the types that strict JSON has; of a path only the file's name, so that runs can move."""
    if is_dataclass(value):
        value = _members(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    return value.name if isinstance(value, Path) else value


def write_parity(parity: Parity, path: str | Path) -> Path:
    """Write `Parity.as_dict` as JSON, atomically, and return the path.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_text(path, json.dumps(parity.as_dict(), indent=1, allow_nan=False) + "\n")
