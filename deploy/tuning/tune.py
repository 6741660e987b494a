"""`edgeattn tune`: the cheapest mix of INT8, FP16 and FP32 within an accuracy budget, searched, confirmed, written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from edgeattn.deploy.files import form_of
from edgeattn.deploy.pipeline import ExportRequest, Progress
from edgeattn.deploy.tuning.budget import Budget, parse_budget
from edgeattn.deploy.tuning.data import ALL, CONFIRMATION, NONE, SEARCH, JudgedSamples
from edgeattn.deploy.tuning.evaluation import Evaluator, Outcome, Trial, Workbench, evaluator
from edgeattn.deploy.tuning.forms import KnownCalibration
from edgeattn.deploy.tuning.plots import PLOTS, write_pareto
from edgeattn.deploy.tuning.scores import Score
from edgeattn.deploy.tuning.search import Assignment, Measured, Search
from edgeattn.deploy.tuning.sensitivity import measure_alone
from edgeattn.deploy.tuning.setup import MEASURED, ModuleRun
from edgeattn.deploy.tuning.strategy import Harm, Strategy
from edgeattn.export.conformance import check_qdq
from edgeattn.export.fp16 import Fp16Result
from edgeattn.export.int8 import MINIMUM_SNR
from edgeattn.foundation import UserError, write_text
from edgeattn.models import MODELS
from edgeattn.validation.open_form import open_form
from edgeattn.validation.parity import Form

RECORD = "tuning.json"
TUNED = "tuned"

CURVE = 8
"""Assignments that are measured for the plot alone."""

FIELDS = {
    "budget": "as it was given, the largest loss that keeps it, and its unit",
    "cost": "where seconds come from; nothing of it was measured on the target",
    "chosen": "the assignment that was written, on all samples",
    "confirmed": "the chosen assignment keeps the budget on the second half of the samples, which the search never saw",
    "confirmations": "how many assignments the second half was asked about; beyond 1 it has taken part in the choice, "
    "and what it says of the chosen one is flattering",
    "tried[]": "every assignment that was evaluated, in order",
    "tried[].part": "samples it was judged on: search (first half), confirmation (second half)",
    "tried[].alone": "one module in INT8 or FP16 in an FP32 model, evaluated for the order of the search only",
    "tried[].precisions": "by torch module; an INT8 module has its convolutions and linear layers in INT8",
    "tried[].rest": "precision of everything else, and around INT8 layers",
    "*.loss": "what is lost against the PyTorch original on the same samples, in the unit of the budget",
    "*.task": "task metric of the model, 0 to 1; null without targets",
    "*.labels": "fraction of the labels that are the original's",
    "*.snr": "signal-to-noise ratio of the noisiest output, in dB; inf without noise, -inf where nothing can be said",
    "*.seconds": "estimated time of one inference on the target",
    "*.int8_share": "share of the multiplications in convolutions that are INT8",
}
"""The meaning of the members of `tuning.json`, which carries them itself."""


@dataclass(frozen=True)
class TuneRequest:
    """What to tune.

    Attributes:
        export: model, checkpoint, size, data, options of INT8, and the target, which must be given.
        budget: such as "mIoU -0.3", see `parse_budget`.
        granularity: see `modules_of`.
        depth: see `modules_of`.
        workers: processes; the machine's number of processors when None.
        curve: assignments between the default quantisation and FP16 that are measured for the plot, at most.
    """

    export: ExportRequest
    budget: str
    granularity: str = "layer"
    depth: int | None = None
    workers: int | None = None
    curve: int = CURVE


@dataclass(frozen=True)
class Row:
    """One form in the summary of a search.

    Attributes:
        name: what it is.
        outcome: its assignment and cost.
        search: what it loses on the first half of the samples; None where it was not measured there.
        confirmation: on the second half, likewise.
        everything: on all samples, likewise.
        chosen: it is the answer.
    """

    name: str
    outcome: Outcome
    search: float | None
    confirmation: float | None
    everything: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Tuning:
    """Result of a search.

    Attributes:
        budget: what had to be kept.
        target: name of the target.
        chosen: the assignment that was written, on all samples.
        original: the original's score on all samples.
        confirmed: it keeps the budget on the second half of the samples.
        confirmations: how many assignments the second half was asked about.
        rows: the original and the corners of the search, the default quantisation, and the answer as the last.
        tried: everything that was evaluated, in order.
        samples: how many were judged on.
        parity: content of `parity.json`.
        notes: sentences that a user should read.
    """

    budget: Budget
    target: str
    chosen: Outcome
    original: Score
    confirmed: bool
    confirmations: int
    rows: tuple[Row, ...]
    tried: tuple[Outcome, ...]
    samples: JudgedSamples
    parity: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The model's task metric."""
        return MODELS.get(self.samples.model).metric

    @property
    def loss(self) -> float:
        """What the chosen assignment loses on all samples, in the unit of the budget."""
        return self.budget.loss(self.chosen.score, self.original)


def tune(request: TuneRequest, output: Path, progress: Progress | None = None) -> Tuning:
    """Search the cheapest assignment within a budget, write its model, judge it, and record everything tried.

    The search sees the first half of the samples only; what it finds has to keep the budget on the second half too. A
    killed search goes on where it stopped.

    Args:
        request: what to tune.
        output: run directory; gets `model.tuned.onnx` and what `edgeattn export` writes for a form, `tuning.json`, the
            Pareto plot, and the result of every evaluation.
        progress: told about stages and steps.

    Raises:
        UserError: something given cannot be used.
    """
    budget = parse_budget(request.budget)
    if request.export.target is None:
        raise UserError("the cost of a precision depends on the target. Name one with --target.")
    run = TuneRun(
        request.export,
        output,
        progress,
        granularity=request.granularity,
        depth=request.depth,
        workers=request.workers,
    )
    return run.tune(budget, request.curve)


class TuneRun(ModuleRun):
    """One search; see `tune`."""

    def tune(self, budget: Budget, curve: int) -> Tuning:
        """Search, write and judge."""
        self._refuse_other_tasks(budget)
        bench = self.prepare()
        self._refuse_samples_without_truth(bench.samples, budget)
        with evaluator(bench, self.workers, lambda done, total: self.progress("tune", done, total)) as evaluate:
            session = _Session(bench, evaluate, budget)
            chosen = session.strategy.run().assignment
            session.strategy.trace(curve)
            halves = [session.evaluate([chosen], part)[0] for part in (SEARCH, CONFIRMATION)]
        score = halves[0].score.added(halves[1].score)
        original = session.originals[SEARCH].added(session.originals[CONFIRMATION])
        forms, notes = self._write(bench, chosen)
        answers = session.strategy.confirmations
        confirmed = session.keeps(halves[1])
        result = Tuning(
            budget=budget,
            target=str(bench.target),
            chosen=replace(halves[0], part=ALL, score=score),
            original=original,
            confirmed=confirmed,
            confirmations=len(answers),
            rows=tuple(session.rows(chosen)),
            tried=tuple(session.tried.values()),
            samples=bench.samples,
            parity=self.judge(forms),
            notes=(*self.data_notes, *notes, *_notes(bench.samples, len(answers), chosen)),
        )
        path = self.directory.path
        write_text(path / RECORD, json.dumps(as_dict(result), indent=1, allow_nan=False) + "\n")
        for suffix in PLOTS:
            write_pareto(points_of(result), result.budget, result.target, path / f"pareto{suffix}")
        return result

    def _refuse_other_tasks(self, budget: Budget) -> None:
        """Refuse, before any work, too few samples and a budget of a metric that the model is not judged by."""
        if len(self.samples) < 2:
            raise UserError(
                f"{len(self.samples)} sample cannot be divided into one half to search on and one to confirm on. Raise "
                "--samples, or give more images."
            )
        metric = budget.measure.metric
        if metric is not None and metric != self.spec.metric:
            raise UserError(
                f"the budget {budget.text!r} is one of {metric}, and {self.spec.name} is judged by {self.spec.metric}. "
                "Give a budget of that, or one such as 'labels 99.5'."
            )

    def _refuse_samples_without_truth(self, samples: JudgedSamples, budget: Budget) -> None:
        if budget.measure.metric is not None and samples.unlabelled:
            raise UserError(
                f"the budget {budget.text!r} needs ground truth, and {samples.unlabelled} of {samples.count} samples "
                "have none. Give a budget such as 'labels 99.5', which compares with the original's labels."
            )

    def _write(self, bench: Workbench, chosen: Assignment) -> tuple[list[Form], list[str]]:
        """Write the FP32 forms and the tuned ones, and return them with notes on the latter."""
        fp32 = self.plugin_path("fp32")
        notes: list[str] = []

        def make(_: onnx.ModelProto) -> tuple[Fp16Result, dict[str, object]]:
            made = bench.maker.form(chosen)
            if not self.request.int8_attention and (broken := check_qdq(made.model)):
                raise RuntimeError("the tuned model breaks the Q/DQ rules: " + " ".join(broken))
            return made, {"assignment": dict(chosen.precisions), "rest": chosen.rest}

        settings = {
            "assignment": chosen.key,
            "calibration": _calibration_key(bench.calibration),
            "surroundings": hashlib.sha256(bench.surroundings.key.encode()).hexdigest(),
        }
        tuned = self.convert(TUNED, bench.graph, make, settings)
        notes += self.notes.get(TUNED, [])
        forms = [
            replace(form_of(open_form(file, name=name)), name=name)
            for precision, path in (("fp32", fp32), (TUNED, tuned))
            for name, file, _ in self.representations(precision, path)
        ]
        lowered = any(form.precision != "fp32" for form in forms)
        return [form for form in forms if lowered or form.name.startswith(TUNED)], notes

    def stripped_path(self, precision: str) -> Path:
        """Where a stripped form goes: the tuned one has no precision of its own in its name."""
        return super().stripped_path(precision if precision == "fp32" else TUNED)


def _notes(samples: JudgedSamples, confirmations: int, chosen: Assignment) -> list[str]:
    """Return what keeps a reader from trusting the figures too much."""
    half = samples.count // 2
    notes = [
        f"the search saw the first {half} of {samples.count} samples; the other {samples.count - half} were asked "
        f"{confirmations} time{'' if confirmations == 1 else 's'} whether its answer keeps the budget."
    ]
    if confirmations > 1:
        notes.append(
            f"{confirmations - 1} answer{'' if confirmations == 2 else 's'} of the search did not keep the budget on "
            "the second half, which has thereby taken part in the choice: its figure is flattering now. More samples "
            "make the search more certain."
        )
    if chosen.rest == "fp32":
        notes.append("nothing cheaper than FP32 keeps the budget on both halves; the tuned form is the FP32 one.")
    return notes


def _calibration_key(known: KnownCalibration | None) -> list[object]:
    return [known.fingerprint, known.method, known.attention] if known else []


class _Session:
    """The evaluations of one search, with what they mean for the budget.

    Attributes:
        strategy: the search.
        originals: the original's score by part of the samples.
        tried: every outcome by part and assignment, in order.
    """

    def __init__(self, bench: Workbench, evaluator_: Evaluator, budget: Budget) -> None:
        self._bench, self._evaluator, self._budget = bench, evaluator_, budget
        self.originals = {part: bench.samples.original(part) for part in (SEARCH, CONFIRMATION)}
        self.tried: dict[tuple[str, str], Outcome] = {}
        assert bench.calibration is not None
        noise = bench.calibration.results.noise
        self.strategy = Strategy(
            search=Search(self._measure, budget.allowance, evaluator_.workers),
            confirm=lambda assignment: self.keeps(self.evaluate([assignment], CONFIRMATION)[0]),
            alone=self._harm,
            savings=self._savings,
            modules=bench.modules,
            noisy=frozenset(
                module.name for module in bench.modules if any(noise[layer] < MINIMUM_SNR for layer in module.layers)
            ),
        )

    def evaluate(self, assignments: Sequence[Assignment], part: str) -> list[Outcome]:
        """Return the outcome of each assignment on a part of the samples."""
        return self._run([Trial(each, part) for each in assignments])

    def loss(self, outcome: Outcome) -> float:
        """Return what an outcome lost, in the unit of the budget."""
        return self._budget.loss(outcome.score, self.originals[outcome.part])

    def keeps(self, outcome: Outcome) -> bool:
        """Whether an outcome keeps the budget."""
        return self._budget.keeps(outcome.score, self.originals[outcome.part])

    def rows(self, chosen: Assignment) -> Iterator[Row]:
        """Yield the summary: the corners of the search, the default quantisation, the answer."""
        plan = self.strategy
        corners = (("FP32", plan.exact), ("FP16", plan.half), ("INT8, default", plan.start), (TUNED, chosen))
        for name, assignment in corners:
            halves = [self.tried.get((part, assignment.key)) for part in (SEARCH, CONFIRMATION)]
            first, second = halves
            assert first is not None
            losses = [None if half is None else self.loss(half) for half in halves]
            both = None
            if second is not None:
                original = self.originals[SEARCH].added(self.originals[CONFIRMATION])
                both = self._budget.loss(first.score.added(second.score), original)
            yield Row(name, first, losses[0], losses[1], both, chosen=assignment is chosen)

    def _run(self, trials: Sequence[Trial]) -> list[Outcome]:
        outcomes = self._evaluator(trials)
        self.tried.update({(found.part, found.assignment.key): found for found in outcomes})
        return outcomes

    def _measure(self, assignments: Sequence[Assignment]) -> list[Measured]:
        found = self.evaluate(assignments, SEARCH)
        return [Measured(each.assignment, self.loss(each), _seconds(each)) for each in found]

    def _harm(self, precision: str) -> dict[str, Harm]:
        """Return labels flipped, then noise: both add up over modules, which mIoU with its ups and downs does not."""
        lowered = [module for module in self._bench.modules if precision == "fp16" or module.layers]
        scores = measure_alone(self._run, self._bench.modules, lowered, precision, SEARCH)
        return {name: self._harms(score) for name, score in scores.items()}

    def _harms(self, score: Score) -> Harm:
        flipped = math.inf if score.failure else 1 - score.agreement
        return (score.noise_share, flipped) if self._budget.measure.name == "snr" else (flipped, score.noise_share)

    def _savings(self, cheaper: Assignment, dearer: Assignment) -> dict[str, float]:
        """Return the seconds that the whole takes longer when one module has the dearer precision."""
        names = [module.name for module in self._bench.modules]
        one_each = [cheaper.changed(name, dearer.precisions[name]) for name in names]
        base, *changed = self._evaluator([Trial(each, NONE) for each in (cheaper, *one_each)])
        return {name: _seconds(found) - _seconds(base) for name, found in zip(names, changed, strict=True)}


def _seconds(outcome: Outcome) -> float:
    assert outcome.cost is not None
    return outcome.cost.seconds


def is_alone(outcome: Outcome) -> bool:
    """Whether an assignment lowers one module of an FP32 model, for the order of the search only."""
    lowered = [kind for kind in outcome.assignment.precisions.values() if kind != "fp32"]
    return outcome.assignment.rest == "fp32" and len(lowered) == 1


def points_of(tuning: Tuning) -> list[Measured]:
    """Return the complete assignments that the search measured, and the chosen one as the last."""
    half = tuning.samples.original(SEARCH)
    tried = [found for found in tuning.tried if found.part == SEARCH and not is_alone(found)]
    points = [Measured(each.assignment, tuning.budget.loss(each.score, half), _seconds(each)) for each in tried]
    last = next(point for point in points if point.assignment.key == tuning.chosen.assignment.key)
    return [*points, last]


def as_dict(tuning: Tuning) -> dict[str, Any]:
    """Return the content of `tuning.json`."""
    originals = {part: tuning.samples.original(part) for part in (SEARCH, CONFIRMATION)}
    budget, metric = tuning.budget, tuning.metric
    return {
        "format": 1,
        "fields": FIELDS,
        "model": tuning.samples.model,
        "target": tuning.target,
        "budget": {"text": budget.text, "allowance": budget.allowance, "unit": budget.measure.unit},
        "samples": {"count": tuning.samples.count, "search": tuning.samples.count // 2},
        "measured": MEASURED,
        "cost": f"estimated for {tuning.target}, not measured there",
        "metric": metric,
        "original": {"task": None if tuning.samples.unlabelled else _plain(tuning.original.task(metric))},
        "chosen": _entry(tuning.chosen, tuning.original, tuning),
        "confirmed": tuning.confirmed,
        "confirmations": tuning.confirmations,
        "loss_by_part": {SEARCH: _plain(tuning.rows[-1].search), CONFIRMATION: _plain(tuning.rows[-1].confirmation)},
        "tried": [_entry(each, originals[each.part], tuning) for each in tuning.tried],
        "notes": list(tuning.notes),
    }


def _entry(outcome: Outcome, original: Score, tuning: Tuning) -> dict[str, Any]:
    score, cost = outcome.score, outcome.cost
    return {
        "part": outcome.part,
        "alone": is_alone(outcome),
        "loss": _plain(tuning.budget.loss(score, original)),
        "task": None if tuning.samples.unlabelled or score.failure else _plain(score.task(tuning.metric)),
        "labels": _plain(score.agreement),
        "snr": _plain(score.snr),
        "failure": score.failure,
        "seconds": cost.seconds if cost else None,
        "int8_share": cost.int8_share if cost else None,
        "rest": outcome.assignment.rest,
        "precisions": dict(outcome.assignment.precisions),
    }


def _plain(number: float | None) -> float | str | None:
    """Return a number as strict JSON has it."""
    if number is None or math.isfinite(number):
        return number
    return None if math.isnan(number) else f"{number}"
