"""What each torch module costs in accuracy when it alone gets a lower precision, and when it alone does not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeattn.deploy.pipeline import ExportRequest, Progress
from edgeattn.deploy.tuning.budget import MEASURES, Measure
from edgeattn.deploy.tuning.data import ALL, JudgedSamples
from edgeattn.deploy.tuning.evaluation import Outcome, Trial, evaluator
from edgeattn.deploy.tuning.modules import Module
from edgeattn.deploy.tuning.plots import PLOTS, write_sensitivity
from edgeattn.deploy.tuning.records import Effect, ModuleSensitivity, Sensitivity
from edgeattn.deploy.tuning.scores import Score
from edgeattn.deploy.tuning.search import Assignment
from edgeattn.deploy.tuning.setup import MEASURED, ModuleRun
from edgeattn.foundation import UserError, write_text
from edgeattn.models import MODELS

LOWERED = ("int8", "fp16")
"""Precisions that modules are lowered to."""

SUFFIXES = (".json", *PLOTS)
"""Of the files `sensitivity.PRECISION` that an analysis writes."""


@dataclass(frozen=True)
class SensitivityRequest:
    """What to analyse.

    Attributes:
        export: model, checkpoint, size and data; for INT8 also its options.
        precision: "int8" or "fp16".
        granularity: see `modules_of`.
        depth: see `modules_of`.
        workers: processes; the machine's number of processors when None.
    """

    export: ExportRequest
    precision: str = "int8"
    granularity: str = "layer"
    depth: int | None = None
    workers: int | None = None


def analyse(request: SensitivityRequest, output: Path, progress: Progress | None = None) -> Sensitivity:
    """Lower modules one at a time, and all but one, and rank them. A killed analysis goes on where it stopped.

    Args:
        request: what to analyse.
        output: run directory; gets `sensitivity.PRECISION.json`, its plot, and the result of every evaluation.
        progress: told about stages and steps.

    Raises:
        UserError: something given cannot be used.
    """
    if request.precision not in LOWERED:
        raise UserError(f"modules cannot be lowered to {request.precision!r}. Choose {' or '.join(LOWERED)}.")
    if (request.precision == "int8") != request.export.int8:
        raise ValueError("the export asks for INT8 exactly when modules are lowered to it")
    run = ModuleRun(
        request.export,
        output,
        progress,
        granularity=request.granularity,
        depth=request.depth,
        workers=request.workers,
    )
    bench = run.prepare()
    lowered = [module for module in bench.modules if request.precision == "fp16" or module.layers]
    if not lowered:
        raise UserError(f"no module of {run.spec.name} has a form in {request.precision.upper()}. Nothing to analyse.")
    with evaluator(bench, run.workers, lambda done, total: run.progress("sensitivity", done, total)) as evaluate:
        outcomes = evaluate([Trial(each, ALL) for each in _assignments(bench.modules, lowered, request.precision)])
    result = _result(bench.samples, lowered, request.precision, outcomes, run.data_notes)
    paths = {suffix: run.directory.path / f"sensitivity.{request.precision}{suffix}" for suffix in SUFFIXES}
    write_text(paths[".json"], json.dumps(result.as_dict(), indent=1, allow_nan=False) + "\n")
    for suffix in PLOTS:
        write_sensitivity(result, paths[suffix])
    return result


def measure_alone(
    evaluate: Callable[[Sequence[Trial]], list[Outcome]],
    modules: Sequence[Module],
    lowered: Sequence[Module],
    precision: str,
    part: str,
) -> dict[str, Score]:
    """Return the score of each module when it alone is lowered, on a part of the samples."""
    trials = [Trial(each, part) for each in _assignments(modules, lowered, precision)[: len(lowered)]]
    return {module.name: found.score for module, found in zip(lowered, evaluate(trials), strict=True)}


def _assignments(modules: Sequence[Module], lowered: Sequence[Module], precision: str) -> list[Assignment]:
    """Return one assignment per module for it alone, one per module for all others, and one for all."""
    exact = Assignment(dict.fromkeys((module.name for module in modules), "fp32"), "fp32")
    every = Assignment({**exact.precisions, **dict.fromkeys((each.name for each in lowered), precision)}, "fp32")
    alone = [exact.changed(each.name, precision) for each in lowered]
    return [*alone, *(every.changed(each.name, "fp32") for each in lowered), every]


def task_measure(samples: JudgedSamples) -> Measure:
    """Return the model's task metric where every sample has a target, and label agreement otherwise."""
    if samples.unlabelled:
        return MEASURES.get("labels")
    metric = MODELS.get(samples.model).metric
    return next(measure for measure in MEASURES if measure.metric == metric)


def _result(
    samples: JudgedSamples, lowered: list[Module], precision: str, outcomes: list[Outcome], notes: tuple[str, ...]
) -> Sensitivity:
    measure, original = task_measure(samples), samples.original(ALL)

    def effect(outcome: Outcome) -> Effect:
        score = outcome.score
        if score.failure:
            return Effect(math.nan, math.nan, -math.inf, score.failure)
        return Effect(measure.loss(score, original), 100 * score.agreement, score.snr, None)

    effects = [effect(outcome) for outcome in outcomes]
    alone, without = effects[: len(lowered)], effects[len(lowered) : -1]
    entries = [
        ModuleSensitivity(module.name, module.nodes, module.layers, *pair)
        for module, *pair in zip(lowered, alone, without, strict=True)
    ]
    return Sensitivity(
        model=samples.model,
        precision=precision,
        metric=measure.unit,
        samples=samples.count,
        unlabelled=samples.unlabelled,
        original=100 * original.task(measure.metric) if measure.metric else 100.0,
        everything=effects[-1],
        modules=tuple(sorted(entries, key=lambda entry: (entry.alone.snr, -_size(entry.alone.loss)))),
        measured=MEASURED,
        notes=notes,
    )


def _size(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
