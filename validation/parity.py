"""Parity: every ONNX form of a model against its PyTorch original, on data, per tensor and in task units."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime
import polygraphy
import torch
from torch import nn

from edgeattn.foundation import UserError
from edgeattn.models.spec import ModelSpec, Sample
from edgeattn.validation import runners
from edgeattn.validation.metrics import Agreement, Confusion, TensorComparison, TensorError
from edgeattn.validation.open_form import open_form
from edgeattn.validation.records import (
    Form,
    FormParity,
    Parity,
    Picture,
    SizeCheck,
    TaskScore,
    write_parity,
)
from edgeattn.validation.runners import FormFacts, Latency, TorchRunner
from edgeattn.validation.tolerance import Tolerance, arithmetic_of, tolerance

__all__ = [
    "Form",
    "FormParity",
    "Parity",
    "Picture",
    "SizeCheck",
    "TaskScore",
    "compare_forms",
    "compare_sizes",
    "write_parity",
]

Arrays = Mapping[str, np.ndarray]


_LOADING_ERRORS: tuple[type[Exception], ...] = (UserError, *runners.RUNTIME_ERRORS)
"""What a form's runner raises when it cannot begin; `UserError` where FP16 cannot be emulated."""


class _Tally:
    """Running comparison of one form with the original."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.outputs: dict[str, TensorComparison] = {}
        self.agreement = Agreement()
        self.confusion = Confusion(len(spec.classes))

    def add(self, reference: Arrays, actual: Arrays, labels: np.ndarray, target: np.ndarray | None) -> np.ndarray:
        """Add one sample; returns the form's labels (K, H, W)."""
        for name in self.spec.main_outputs:
            self.outputs.setdefault(name, TensorComparison()).add(reference[name], actual[name])
        found = _labels(self.spec, actual, labels.shape[-2:])
        self.agreement.add(labels, found)
        if target is not None:
            self.confusion.add(target, found)
        return found

    def errors(self) -> dict[str, TensorError]:
        return {name: comparison.result() for name, comparison in self.outputs.items()}

    def reasons(self, limits: Tolerance, drop: float, unlabelled: int = 0) -> tuple[str, ...]:
        """Return what exceeds the limits. Comparisons are written so that NaN fails."""
        found = []
        for name, error in self.errors().items():
            if error.mismatched:
                found.append(f"output {name}: {error.mismatched} values are NaN or infinite on one side only")
            if not error.compared:
                found.append(f"output {name}: no value is finite on both sides, so nothing could be compared")
            if limits.relative_l2 is not None and not error.worst_relative_l2 <= limits.relative_l2:
                found.append(
                    f"output {name}: relative L2 {error.worst_relative_l2:.2e} exceeds {limits.relative_l2:.2e}"
                )
        agreement = self.agreement.fraction
        if limits.label_agreement is not None and not agreement >= limits.label_agreement:
            found.append(f"label agreement {agreement:.3%} is below {limits.label_agreement:.3%}")
        if limits.task_drop is not None and not abs(drop) <= limits.task_drop:
            stricter = f" ({unlabelled} samples have no target; the original's labels stood in)" if unlabelled else ""
            found.append(f"mIoU differs by {100 * drop:.2f} points, more than {100 * limits.task_drop:.2f}{stricter}")
        return tuple(found)


class _Candidate:
    """A form with its runner."""

    def __init__(self, spec: ModelSpec, form: Form, threads: int) -> None:
        self.file = open_form(form.path, name=form.name, threads=threads, plugins=form.plugin_libraries)
        self.spec, self.form = spec, form
        self.facts, self.runner = self.file.facts, self.file.runner
        self.arithmetic = arithmetic_of(self.file.model)
        self.failure: str | None = None

    def activate(self, stack: ExitStack) -> None:
        try:
            stack.enter_context(self.runner)
        except _LOADING_ERRORS as error:
            self.failure = f"{self.file.runtime} cannot load it: {error}"

    def run(self, feed: Arrays, reference: Arrays) -> Arrays | None:
        """Return the outputs in FP32, or None when the form cannot be run any more; the reason is kept."""
        if self.failure:
            return None
        try:
            outputs = self.runner.infer(runners.feed_for(self.runner, self.facts, feed))
        except runners.RUNTIME_ERRORS as error:
            self.failure = f"{self.file.runtime} cannot run it: {error}"
            return None
        self.failure = self._defect(outputs, reference)
        return None if self.failure else {name: array.astype(np.float32, copy=False) for name, array in outputs.items()}

    def _defect(self, outputs: Arrays, reference: Arrays) -> str | None:
        """Return what keeps outputs from being compared at all."""
        for name in self.spec.main_outputs:
            if name not in outputs:
                return f"output {name} is missing; the graph has {', '.join(outputs)}"
            if outputs[name].shape != reference[name].shape:
                return f"output {name} has shape {outputs[name].shape}, not {reference[name].shape}"
        return None

    def limits(self, tally: _Tally) -> Tolerance:
        """Derive the tolerance from the graph and the range of the original's outputs."""
        errors = tally.errors().values()
        widest = max(errors, key=lambda error: error.reference_peak / (error.reference_rms or 1.0), default=None)
        peak, rms = (widest.reference_peak, widest.reference_rms) if widest else (0.0, 0.0)
        return tolerance(self.form.precision, self.arithmetic, peak=peak, rms=rms)


def _broken_claims(form: Form, facts: FormFacts) -> Iterator[str]:
    """Yield what a form's declaration says and its file does not hold."""
    if form.plugin != bool(facts.plugin_nodes):
        yield f"declared {'with' if form.plugin else 'without'} plugin nodes, but holds {facts.plugin_nodes}"
    expected = {"fp32": (False, False), "fp16": (True, False)}.get(form.precision, (facts.fp16, True))
    if (facts.fp16, facts.qdq) != expected:
        held = [name for name, present in (("FP16 tensors", facts.fp16), ("Q/DQ nodes", facts.qdq)) if present]
        yield f"declared {form.precision}, but the graph holds {' and '.join(held) or 'neither FP16 nor Q/DQ'}"


def _labels(spec: ModelSpec, outputs: Arrays, size: tuple[int, int]) -> np.ndarray:
    """Return the labels (K, H, W) that the outputs of one sample mean."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(outputs[name])) for name in spec.main_outputs}
    return spec.labels(tensors, size)[0].numpy()


def _score(confusion: Confusion) -> TaskScore:
    return TaskScore(confusion.mean_iou(), tuple(float(score) for score in confusion.class_iou()))


def _original_runner(spec: ModelSpec, original: nn.Module, threads: int) -> TorchRunner:
    return TorchRunner(original, spec.inputs, [output.name for output in spec.outputs], threads=threads)


def compare_forms(
    spec: ModelSpec,
    original: nn.Module,
    forms: Sequence[Form],
    samples: Iterable[Sample],
    *,
    progress: Callable[[int], None] | None = None,
    threads: int = 1,
    latency_runs: int = 10,
    pictures: int = 6,
) -> Parity:
    """Run the original and every form on the same samples, one at a time, and judge the forms.

    Nothing is kept of a sample but sums, and the label maps of the first few for the report. Where a sample has no
    target, the original's labels stand in for it: the task metric then asks more of a form than the truth would, and
    the record counts such samples.

    Args:
        spec: declares inputs, outputs, preprocessing, labels and classes.
        original: the PyTorch network with its trained weights; its mode and weights are left as they were.
        forms: ONNX files to judge.
        samples: images, with targets where the truth is known; one pass over them is made.
        progress: called after each sample with the number of samples done.
        threads: threads within an operation, of torch and of ONNX Runtime. More than one pays only for large networks
            on idle cores: the two would fight for busy ones.
        latency_runs: timed runs of each form on the first sample; 0 for none.
        pictures: how many samples to keep label maps of.

    Returns:
        The measurements and a verdict for each form.

    Raises:
        UserError: a file is missing or no ONNX model, or there is no sample.
        ValueError: two forms have one name.
    """
    if len({form.name for form in forms}) < len(forms):
        raise ValueError(f"forms need unique names, not {[form.name for form in forms]}")
    candidates = [_Candidate(spec, form, threads) for form in forms]
    tallies = [_Tally(spec) for _ in forms]
    confusion, kept, timed = Confusion(len(spec.classes)), [], _Timed()
    done = unlabelled = 0
    with ExitStack() as stack:
        reference_runner = stack.enter_context(_original_runner(spec, original, threads))
        for candidate in candidates:
            candidate.activate(stack)
        for done, sample in enumerate(samples, start=1):
            feed = spec.network_inputs(sample)
            reference = dict(reference_runner.infer(feed))
            labels = _labels(spec, reference, sample.images[0].shape[:2])
            unlabelled += sample.target is None
            truth = labels if sample.target is None else sample.target
            confusion.add(truth, labels)
            found = {}
            for candidate, tally in zip(candidates, tallies, strict=True):
                outputs = candidate.run(feed, reference)
                if outputs is not None:
                    found[candidate.form.name] = tally.add(reference, outputs, labels, truth)
            if done <= pictures:
                kept.append(Picture(sample.images, sample.target, labels, found))
            if done == 1 and latency_runs:
                timed = _time_all(reference_runner, candidates, feed, runs=latency_runs, threads=threads)
            if progress:
                progress(done)
    if not done:
        raise UserError(f"there is no sample to compare {spec.name} on. Give at least one image.")
    score = _score(confusion)
    return Parity(
        model=spec.name,
        classes=spec.classes,
        samples=done,
        unlabelled=unlabelled,
        original=score,
        original_latency=timed.original,
        forms=tuple(
            _judge(candidate, tally, score, timed.forms.get(candidate.form.name), unlabelled)
            for candidate, tally in zip(candidates, tallies, strict=True)
        ),
        pictures=tuple(kept),
        environment=_environment(),
    )


def _judge(
    candidate: _Candidate, tally: _Tally, original: TaskScore, latency: Latency | None, unlabelled: int
) -> FormParity:
    limits = candidate.limits(tally)
    score = _score(tally.confusion)
    drop = original.mean_iou - score.mean_iou
    broken = (*_broken_claims(candidate.form, candidate.facts), *candidate.file.broken_claims)
    measured = (candidate.failure,) if candidate.failure else tally.reasons(limits, drop, unlabelled)
    return FormParity(
        form=candidate.form,
        facts=candidate.facts,
        measured=candidate.file.measured,
        outputs=tally.errors(),
        label_agreement=tally.agreement.fraction,
        score=score,
        task_drop=drop,
        tolerance=limits,
        reasons=broken + measured,
        latency=latency,
    )


@dataclass
class _Timed:
    """Latencies of the original and of the forms by name."""

    original: Latency | None = None
    forms: dict[str, Latency] = field(default_factory=dict)


def _time_all(
    reference: TorchRunner, candidates: Sequence[_Candidate], feed: Arrays, *, runs: int, threads: int
) -> _Timed:
    original = runners.measure_latency(lambda: reference.infer(feed), runs=runs, threads=threads)
    timed = _Timed(original)
    for candidate in candidates:
        if candidate.failure:
            continue
        try:
            latency = candidate.file.latency(feed, runs=runs, threads=threads)
        except runners.RUNTIME_ERRORS as error:
            candidate.failure = f"{candidate.file.runtime} cannot run the file itself, only its emulation: {error}"
        else:
            timed.forms[candidate.form.name] = latency
    return timed


def _environment() -> dict[str, str]:
    modules = (onnxruntime, onnx, torch, polygraphy, np)
    versions = {module.__name__: str(module.__version__) for module in modules}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}


def compare_sizes(
    spec: ModelSpec,
    original: nn.Module,
    forms: Sequence[Form],
    sizes: Sequence[tuple[int, int]],
    *,
    samples: Iterable[Sample] | None = None,
    threads: int = 1,
) -> tuple[SizeCheck, ...]:
    """Compare forms with the original at other image sizes, on real images resized to them.

    Targets do not survive resizing, so the task metric is not judged here; relative L2 and label agreement are, by the
    same tolerance as at the trained size.

    Args:
        spec: declares inputs, outputs, preprocessing and labels.
        original: the PyTorch network with its trained weights.
        forms: ONNX files; one with a fixed size is skipped at other sizes, and the record says so.
        sizes: (height, width) in pixels.
        samples: images to resize; by default the first two of the model's held-out samples.
        threads: threads within an operation, of torch and of ONNX Runtime. More than one pays only for large networks
            on idle cores: the two would fight for busy ones.

    Returns:
        One check for each form and size, forms in the outer order.

    Raises:
        UserError: a file is missing or no ONNX model, or there is no image.
    """
    if samples is None and spec.samples is not None:
        samples = spec.samples(2)
    given = list(samples or ())
    if not given:
        raise UserError(f"there is no image to check the sizes of {spec.name} with. Give at least one sample.")
    candidates = [_Candidate(spec, form, threads) for form in forms]
    checks: list[list[SizeCheck]] = [[] for _ in candidates]
    with ExitStack() as stack:
        reference = stack.enter_context(_original_runner(spec, original, threads))
        for candidate in candidates:
            candidate.activate(stack)
        for size in sizes:
            feeds = [spec.network_inputs(sample.resized(size)) for sample in given]
            references = [dict(reference.infer(feed)) for feed in feeds]
            for candidate, found in zip(candidates, checks, strict=True):
                found.append(_check_size(candidate, size, feeds, references))
    return tuple(check for found in checks for check in found)


def _check_size(
    candidate: _Candidate, size: tuple[int, int], feeds: Sequence[Arrays], references: Sequence[Arrays]
) -> SizeCheck:
    name, nan = candidate.form.name, float("nan")
    if candidate.failure:
        return SizeCheck(name, size, {}, nan, (candidate.failure,))
    if not runners.accepts(candidate.runner, feeds[0]):
        return SizeCheck(name, size, {}, nan, (), skipped="the form takes one fixed size")
    tally = _Tally(candidate.spec)
    for feed, reference in zip(feeds, references, strict=True):
        outputs = candidate.run(feed, reference)
        if outputs is None:
            failure, candidate.failure = candidate.failure, None  # the next size may run
            return SizeCheck(name, size, {}, nan, (str(failure),))
        tally.add(reference, outputs, _labels(candidate.spec, reference, size), None)
    limits = replace(candidate.limits(tally), task_drop=None)
    errors = {output: error.worst_relative_l2 for output, error in tally.errors().items()}
    return SizeCheck(name, size, errors, tally.agreement.fraction, tally.reasons(limits, nan))
