"""Evaluates assignments, in this process or in several, and keeps every result in a file of its own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgeattn.deploy.pipeline import save_model
from edgeattn.deploy.tuning.cost import Cost, cost_of
from edgeattn.deploy.tuning.data import NONE, JudgedSamples, labels_of
from edgeattn.deploy.tuning.forms import FormMaker, KnownCalibration, Surroundings
from edgeattn.deploy.tuning.modules import Module
from edgeattn.deploy.tuning.scores import Score, Scorer
from edgeattn.deploy.tuning.search import Assignment
from edgeattn.export.model_file import load_model
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import inline_plugins
from edgeattn.foundation import UserError, sha256_of, write_text
from edgeattn.models import MODELS
from edgeattn.validation import runners
from edgeattn.validation.open_form import OpenForm, open_form


@dataclass(frozen=True)
class Trial:
    """One assignment on one part of the samples."""

    assignment: Assignment
    part: str


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        assignment: the assignment.
        part: the samples it was judged on.
        score: its accuracy.
        cost: its estimated cost; None without a target.
    """

    assignment: Assignment
    part: str
    score: Score
    cost: Cost | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "precisions": dict(self.assignment.precisions),
            "rest": self.assignment.rest,
            "part": self.part,
            "score": self.score.as_dict(),
            "cost": self.cost.as_dict() if self.cost else None,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Outcome:
        """Read what `as_dict` gave."""
        cost = Cost(**record["cost"]) if record["cost"] else None
        assignment = Assignment(record["precisions"], record["rest"])
        return cls(assignment, record["part"], Score.from_dict(record["score"]), cost)


@dataclass(frozen=True)
class Workbench:
    """Everything that a process needs to evaluate assignments.

    Attributes:
        graph: file of the FP32 graph, with unique node names.
        modules: its modules.
        samples: what is judged on.
        calibration: of all layers; None where no assignment uses INT8.
        surroundings: what else decides the forms.
        target: name of the deployment target that costs are estimated for; None for no cost.
        plugins: plugin nodes stay in the form that is judged and estimated.
        results: folder of the results.
    """

    graph: Path
    modules: tuple[Module, ...]
    samples: JudgedSamples
    calibration: KnownCalibration | None
    surroundings: Surroundings
    target: str | None
    plugins: bool
    results: Path

    @cached_property
    def maker(self) -> FormMaker:
        """Makes the forms."""
        return FormMaker(load_model(self.graph), self.modules, self.calibration, self.surroundings)

    @cached_property
    def _basis(self) -> str:
        """Hash of what every result depends on beside the trial."""
        known = self.calibration
        parts = {
            "graph": sha256_of(self.graph),
            "samples": self.samples.digest,
            "modules": [[module.name, *module.nodes] for module in self.modules],
            "calibration": [known.fingerprint, known.method, known.attention] if known else None,
            "surroundings": self.surroundings.key,
            "target": self.target,
            "plugins": self.plugins,
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def path_of(self, trial: Trial) -> Path:
        """Return where the result of a trial is kept."""
        text = f"{self._basis};{trial.part};{trial.assignment.key}"
        return self.results / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def known(self, trial: Trial) -> Outcome | None:
        """Return the kept result of a trial, or None where there is no readable one."""
        try:
            outcome = Outcome.from_dict(json.loads(self.path_of(trial).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return outcome if outcome.assignment.key == trial.assignment.key and outcome.part == trial.part else None

    def form(self, assignment: Assignment) -> onnx.ModelProto:
        """Return the form that is judged and estimated."""
        made = self.maker.form(assignment).model
        return made if self.plugins else inline_plugins(made)

    def evaluate(self, trial: Trial) -> Outcome:
        """Make and judge an assignment, and keep the result."""
        model = self.form(trial.assignment)
        cost = cost_of(model, self.target) if self.target else None
        score = Score()
        if trial.part != NONE:
            with tempfile.TemporaryDirectory() as folder:
                score = self._judge(save_model(model, Path(folder) / "trial.onnx"), trial.part)
        outcome = Outcome(trial.assignment, trial.part, score, cost)
        write_text(self.path_of(trial), json.dumps(outcome.as_dict()) + "\n")
        return outcome

    def _judge(self, path: Path, part: str) -> Score:
        spec = MODELS.get(self.samples.model)
        opened = open_form(path, name="trial")
        scorer = Scorer(len(spec.classes))
        try:
            with opened.runner:
                for judged in self.samples.part(part):
                    outputs = _infer(opened, spec.network_inputs(judged.sample))
                    labels = labels_of(spec, outputs, judged.sample.images[0].shape[:2])
                    scorer.add(judged.outputs, outputs, truth=judged.truth, original=judged.labels, labels=labels)
        except runners.RUNTIME_ERRORS as error:
            return Score(failure=f"{opened.runtime} cannot run it: {error}")
        return scorer.result()


def _infer(opened: OpenForm, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = opened.runner.infer(runners.feed_for(opened.runner, opened.facts, feed))
    return {name: array.astype(np.float32) for name, array in outputs.items()}


_bench: Workbench | None = None
"""The workbench of a worker process."""


def _begin(bench: Workbench) -> None:
    global _bench
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _bench = bench


def _end_with_parent() -> None:
    """End this process when its parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(trial: Trial) -> Outcome:
    assert _bench is not None
    return _bench.evaluate(trial)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates trials; see `evaluator`.

    Attributes:
        bench: what is evaluated.
        workers: processes.
        progress: called with the number of trials done and the number in all.
    """

    bench: Workbench
    workers: int
    progress: Callable[[int, int], None]
    _pool: ProcessPoolExecutor | None
    _asked: dict[Path, bool]

    def __call__(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Return the outcome of every trial, in order; those that are known already are not repeated.

        Raises:
            UserError: a worker process died.
        """
        paths = [self.bench.path_of(trial) for trial in trials]
        self._asked.update({path: self._asked.get(path, False) for path in paths})
        outcomes: dict[Path, Outcome] = {}
        missing: dict[Path, Trial] = {}
        for path, trial in zip(paths, trials, strict=True):
            known = self.bench.known(trial)
            if known is None:
                missing[path] = trial
            else:
                self._finish(outcomes, path, known)
        for path, outcome in self._evaluated(missing):
            self._finish(outcomes, path, outcome)
        return [outcomes[path] for path in paths]

    def _evaluated(self, trials: Mapping[Path, Trial]) -> Iterator[tuple[Path, Outcome]]:
        if self._pool is None:
            yield from ((path, self.bench.evaluate(trial)) for path, trial in trials.items())
            return
        running: dict[Future[Outcome], Path] = {self._pool.submit(_work, trial): path for path, trial in trials.items()}
        try:
            yield from ((running[future], future.result()) for future in as_completed(running))
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {self.workers} worker processes died, perhaps for lack of memory. What is finished is kept: "
                "run the command again with fewer --workers."
            ) from error
        finally:
            for future in running:
                future.cancel()

    def _finish(self, outcomes: dict[Path, Outcome], path: Path, outcome: Outcome) -> None:
        outcomes[path] = outcome
        self._asked[path] = True
        self.progress(sum(self._asked.values()), len(self._asked))


@contextmanager
def evaluator(
    bench: Workbench, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Iterator[Evaluator]:
    """Yield something that evaluates trials in several processes.

    Args:
        bench: what is evaluated.
        workers: processes; the machine's number of processors when None, and this process alone for 1.
        progress: called with the number of trials done and the number in all, which may grow.
    """
    count = workers or os.cpu_count() or 1
    move = progress or (lambda done, total: None)
    if count == 1:
        yield Evaluator(bench, 1, move, None, {})
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(bench,)) as pool:
        yield Evaluator(bench, count, move, pool, {})
