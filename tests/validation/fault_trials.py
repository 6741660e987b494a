"""Whether parity notices an injected fault, and whether `bisect` names the module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgeattn.foundation import UserError
from edgeattn.validation.divergence import OnnxForm, Point, bisect
from edgeattn.validation.divergence.search import NETWORK
from edgeattn.validation.parity import Form, compare_forms

from fault_subjects import Subject  # isort: skip
from faults import Fault, Injection, inject  # isort: skip


@dataclass(frozen=True)
class Trial:
    """One fault in one form of one model.

    Attributes:
        fault: name of the fault.
        model: name of the model.
        precision: of the form.
        detected: parity failed.
        reason: the first reason that parity gave.
        modules: where the fault is.
        named: the module that `bisect` named; None when it found no divergence.
        segment: modules of all nodes between the last tensors that are right and the first that is wrong.
    """

    fault: str
    model: str
    precision: str
    detected: bool
    reason: str
    modules: tuple[str, ...]
    named: str | None
    segment: tuple[str, ...]

    @property
    def located(self) -> bool:
        """Whether the module that `bisect` named is one whose computation is wrong."""
        return self.named in self.modules


def injections(subject: Subject, precision: str, faults: Iterable[Fault]) -> list[Injection]:
    """Return the damaged forms for those faults that can befall a form."""
    found = [inject(kind, subject.forms[precision], subject.weights, subject.epsilons) for kind in faults]
    return [injection for injection in found if injection is not None]


def run_trials(subject: Subject, precision: str, damaged: Iterable[Injection], folder: Path) -> list[Trial]:
    """Judge damaged forms by parity, all on one pass over the samples, and search each."""
    trials, opened = [], {}
    for injection in damaged:
        path = folder / f"{injection.fault.name}.onnx"
        onnx.save(injection.model, path)
        try:
            opened[injection.fault.name] = injection, OnnxForm(path, sessions=subject.sessions)
        except UserError as error:  # the damaged graph is so inconsistent that it is refused
            trials.append(_trial(subject, precision, injection, str(error), None))
    forms = [Form(name, form.path, precision, plugin=False) for name, (_, form) in opened.items()]
    if not forms:
        return trials
    parity = compare_forms(
        subject.spec, subject.original, forms, subject.samples(precision), latency_runs=0, pictures=0
    )
    for entry in parity.forms:
        injection, form = opened[entry.form.name]
        found = bisect(subject.reference, form, subject.feeds())
        trials.append(_trial(subject, precision, injection, next(iter(entry.reasons), ""), found.first))
    return trials


def _trial(subject: Subject, precision: str, injection: Injection, reason: str, first: Point | None) -> Trial:
    return Trial(
        fault=injection.fault.name,
        model=subject.name,
        precision=precision,
        detected=bool(reason),
        reason=reason[:160],
        modules=tuple(sorted(path or NETWORK for path in injection.modules)),
        named=first.module if first else None,
        segment=first.modules if first else (),
    )
