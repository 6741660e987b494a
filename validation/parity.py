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
from edgeattn.models.deployable import LABELS, label_margins
from edgeattn.models.spec import ModelSpec, Sample
from edgeattn.validation import runners
from edgeattn.validation.metrics import Agreement, Confusion, TensorComparison, TensorError
from edgeattn.validation.open_form import open_form
from edgeattn.validation.qdq_consistency import contradictions
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
from edgeattn.validation.saturation import Condition, Squashing, condition_of
from edgeattn.validation.tolerance import (
    CONFIDENCE,
    FP32_RELATIVE_L2,
    NO_LIMITS,
    Tolerance,
    UserLimits,
    arithmetic_of,
    as_set_by_user,
    tolerance,
)

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

    def __init__(self, spec: ModelSpec, squashed: Iterable[Squashing] = (), *, exact: bool = False) -> None:
        self.spec = spec
        self.exact = exact
        self.close: int | None = None
        self.measured = [entry.name for entry in spec.outputs if not entry.auxiliary and entry.meaning != LABELS]
        self.outputs: dict[str, TensorComparison] = {}
        self.squashed = {entry.output: entry for entry in squashed}
        self.samples: dict[str, list[tuple[float, Condition]]] = {}
        self.agreement = Agreement()
        self.confusion = Confusion(len(spec.classes))

    def add(
        self,
        reference: Arrays,
        actual: Arrays,
        labels: np.ndarray,
        target: np.ndarray | None,
        close: int | None = None,
    ) -> np.ndarray:
        """Add one sample, of whose labels `close` are close calls; returns the form's labels (K, H, W)."""
        if close is not None:
            self.close = (self.close or 0) + close
        for name in self.measured:
            relative = self.outputs.setdefault(name, TensorComparison()).add(reference[name], actual[name])
            if name in self.squashed:
                condition = condition_of(self.squashed[name], reference[name])
                self.samples.setdefault(name, []).append((relative * condition.reference, condition))
        found = _labels(self.spec, actual, labels.shape[-2:])
        self.agreement.add(labels, found)
        if target is not None:
            self.confusion.add(target, found)
        return found

    def errors(self) -> dict[str, TensorError]:
        return {name: comparison.result() for name, comparison in self.outputs.items()}

    def reasons(self, limits: Tolerance, drop: float, unlabelled: int = 0) -> tuple[str, ...]:
        """Return what exceeds the limits, the task first. Comparisons are written so that NaN fails."""
        found = []
        if limits.task_drop is not None and not abs(drop) <= limits.task_drop:
            stricter = f" ({unlabelled} samples have no target; the original's labels stood in)" if unlabelled else ""
            allowed = f"{100 * limits.task_drop:.2f}{stricter}"
            found.append(f"{self.spec.metric} differs by {100 * drop:.2f} points, more than {allowed}")
        for name, error in self.errors().items():
            if error.mismatched:
                found.append(f"output {name}: {error.mismatched} values are NaN or infinite on one side only")
            if not error.compared:
                found.append(f"output {name}: no value is finite on both sides, so nothing could be compared")
            found.extend(f"output {name}: {excess}" for excess in self._excess(name, error, limits))
        differing = self.agreement.total - self.agreement.equal
        if self.exact and self.close is not None and not differing <= self.close:
            found.append(
                f"{differing} labels differ, but of the original's only {self.close} lie so close to another that FP32 "
                "rounding explains it"
            )
        agreement = self.agreement.fraction
        if limits.label_agreement is not None and not agreement >= limits.label_agreement:
            found.append(f"label agreement {agreement:.3%} is below {limits.label_agreement:.3%}")
        return tuple(found)

    def _excess(self, name: str, error: TensorError, limits: Tolerance) -> Iterator[str]:
        """Yield which limits of its own error an output exceeds."""
        limit = limits.of_output(name)
        if limit.max_abs is not None and not error.max_abs <= limit.max_abs:
            yield f"absolute difference {error.max_abs:.2e} exceeds {limit.max_abs:.2e}"
        if limit.relative_l2 is None:
            return
        if name not in self.samples:
            if not error.worst_relative_l2 <= limit.relative_l2:
                yield f"relative L2 {error.worst_relative_l2:.2e} exceeds {limit.relative_l2:.2e}"
            return
        judged = [(wrong, limits.allowed_error(name, at) or 0.0, at.reference) for wrong, at in self.samples[name]]
        if beyond := [entry for entry in judged if not entry[0] <= entry[1]]:
            wrong, allowed, norm = max(beyond, key=lambda entry: entry[0] / (entry[1] or 1.0))
            yield f"relative L2 {wrong / norm:.2e} exceeds {allowed / norm:.2e}"


class _Candidate:
    """A form with its runner."""

    def __init__(self, spec: ModelSpec, form: Form, threads: int) -> None:
        self.file = open_form(
            form.path,
            name=form.name,
            threads=threads,
            plugins=form.plugin_libraries,
            accumulation=form.accumulation,
        )
        self.spec, self.form = spec, form
        self.facts, self.runner = self.file.facts, self.file.runner
        self.arithmetic = arithmetic_of(self.file.model, accumulation=form.accumulation)
        self.failure: str | None = None

    def tally(self) -> _Tally:
        """Return an empty comparison of the form."""
        return _Tally(self.spec, self.arithmetic.squashed, exact=self.form.precision == "fp32")

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

    def limits(self, tally: _Tally, user: UserLimits) -> Tolerance:
        """Derive the tolerance from the graph and the range of the original's outputs, or take what the user set."""
        errors = tally.errors().values()
        widest = max(errors, key=lambda error: error.reference_peak / (error.reference_rms or 1.0), default=None)
        peak, rms = (widest.reference_peak, widest.reference_rms) if widest else (0.0, 0.0)
        derived = tolerance(self.form.precision, self.arithmetic, peak=peak, rms=rms, metric=self.spec.metric)
        return as_set_by_user(derived, user, self.spec.main_outputs)


def _broken_claims(form: Form, facts: FormFacts) -> Iterator[str]:
    """Yield what a form's declaration says and its file does not hold."""
    if form.plugin != bool(facts.plugin_nodes):
        yield f"declared {'with' if form.plugin else 'without'} plugin nodes, but holds {facts.plugin_nodes}"
    parts = {"FP16 tensors": facts.fp16, "BF16 tensors": facts.bf16, "Q/DQ nodes": facts.qdq}
    expected = {
        "fp32": (False, False, False),
        "fp16": (True, False, False),
        "bf16": (False, True, False),
    }.get(form.precision, (facts.fp16, facts.bf16, True))
    if tuple(parts.values()) != expected:
        held = [name for name, present in parts.items() if present]
        yield f"declared {form.precision}, but the graph holds {' and '.join(held) or 'neither FP16 nor Q/DQ'}"


def _labels(spec: ModelSpec, outputs: Arrays, size: tuple[int, int]) -> np.ndarray:
    """Return the labels (K, H, W) that the outputs of one sample mean."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(outputs[name])) for name in spec.main_outputs}
    return spec.labels(tensors, size)[0].numpy()


def _close_calls(spec: ModelSpec, reference: Arrays, size: tuple[int, int]) -> int | None:
    """Return how many labels of the original lie so close to another that the FP32 bar lets them change.

    None where the form gives more than labels, so that its numbers are judged themselves.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in reference.items()}
    margins = label_margins(spec, tensors, size)
    # Both scores may be wrong by the bar, and single values by CONFIDENCE times the root mean square.
    return None if margins is None else int((margins <= 2 * CONFIDENCE * FP32_RELATIVE_L2).sum())


def _original_runner(spec: ModelSpec, original: nn.Module, threads: int) -> TorchRunner:
    outputs = [output.name for output in spec.outputs]
    return TorchRunner(original, spec.inputs, outputs, input_type=spec.input_type, threads=threads)


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
    limits: UserLimits = NO_LIMITS,
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
        limits: what the user set for the errors of outputs, in place of the derived limits.

    Returns:
        The measurements and a verdict for each form.

    Raises:
        UserError: a file is missing or no ONNX model, or there is no sample.
        ValueError: two forms have one name.
    """
    if len({form.name for form in forms}) < len(forms):
        raise ValueError(f"forms need unique names, not {[form.name for form in forms]}")
    candidates = [_Candidate(spec, form, threads) for form in forms]
    limits.check(spec.main_outputs)
    tallies = [candidate.tally() for candidate in candidates]
    confusion, kept, timed = Confusion(len(spec.classes)), [], _Timed()
    done = unlabelled = 0
    with ExitStack() as stack:
        reference_runner = stack.enter_context(_original_runner(spec, original, threads))
        for candidate in candidates:
            candidate.activate(stack)
        for done, sample in enumerate(samples, start=1):
            feed = spec.network_inputs(sample)
            reference = dict(reference_runner.infer(feed))
            size = sample.images[0].shape[:2]
            labels, close = _labels(spec, reference, size), _close_calls(spec, reference, size)
            unlabelled += sample.target is None
            truth = labels if sample.target is None else sample.target
            confusion.add(truth, labels)
            found = {}
            for candidate, tally in zip(candidates, tallies, strict=True):
                outputs = candidate.run(feed, reference)
                if outputs is not None:
                    found[candidate.form.name] = tally.add(reference, outputs, labels, truth, close)
            if done <= pictures:
                kept.append(Picture(sample.images, sample.target, labels, found))
            if done == 1 and latency_runs:
                timed = _time_all(reference_runner, candidates, feed, runs=latency_runs, threads=threads)
            if progress:
                progress(done)
    if not done:
        raise UserError(f"there is no sample to compare {spec.name} on. Give at least one image.")
    score = TaskScore.of(spec.metric, confusion)
    return Parity(
        model=spec.name,
        classes=spec.classes,
        samples=done,
        unlabelled=unlabelled,
        original=score,
        original_latency=timed.original,
        forms=tuple(
            _judge(candidate, tally, score, limits, timed.forms.get(candidate.form.name), unlabelled)
            for candidate, tally in zip(candidates, tallies, strict=True)
        ),
        pictures=tuple(kept),
        environment=_environment(),
    )


def _judge(
    candidate: _Candidate,
    tally: _Tally,
    original: TaskScore,
    user: UserLimits,
    latency: Latency | None,
    unlabelled: int,
) -> FormParity:
    limits = candidate.limits(tally, user)
    score = TaskScore.of(original.metric, tally.confusion)
    drop = original.value - score.value
    broken = (
        *_broken_claims(candidate.form, candidate.facts),
        *candidate.file.broken_claims,
        *contradictions(candidate.file.model),
    )
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
        if candidate.failure or candidate.facts.bf16:  # ONNX Runtime has no BF16 convolution to time
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
    limits: UserLimits = NO_LIMITS,
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
        limits: what the user set for the errors of outputs, in place of the derived limits.

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
    limits.check(spec.main_outputs)
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
                found.append(_check_size(candidate, size, feeds, references, limits))
    return tuple(check for found in checks for check in found)


def _check_size(
    candidate: _Candidate,
    size: tuple[int, int],
    feeds: Sequence[Arrays],
    references: Sequence[Arrays],
    user: UserLimits,
) -> SizeCheck:
    name, nan = candidate.form.name, float("nan")
    if candidate.failure:
        return SizeCheck(name, size, {}, nan, (candidate.failure,))
    if not runners.accepts(candidate.runner, feeds[0]):
        return SizeCheck(name, size, {}, nan, (), skipped="the form takes one fixed size")
    tally = candidate.tally()
    for feed, reference in zip(feeds, references, strict=True):
        outputs = candidate.run(feed, reference)
        if outputs is None:
            failure, candidate.failure = candidate.failure, None  # the next size may run
            return SizeCheck(name, size, {}, nan, (str(failure),))
        close = _close_calls(candidate.spec, reference, size)
        tally.add(reference, outputs, _labels(candidate.spec, reference, size), None, close)
    limits = replace(candidate.limits(tally, user), task_drop=None)
    errors = {output: error.worst_relative_l2 for output, error in tally.errors().items()}
    return SizeCheck(name, size, errors, tally.agreement.fraction, tally.reasons(limits, nan))
