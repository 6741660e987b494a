"""Sensitivity and tuning: the search against exhaustive ones, a module made hostile to INT8, runs that were killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.deploy.files import compare_files
from edgeattn.deploy.pipeline import ExportRequest
from edgeattn.deploy.tuning import SensitivityRequest, TuneRequest, analyse, parse_budget, tune
from edgeattn.deploy.tuning.forms import FormMaker
from edgeattn.deploy.tuning.modules import Module, modules_of
from edgeattn.deploy.tuning.scores import Score
from edgeattn.deploy.tuning.search import Assignment, Change, Measured, Search, pareto
from edgeattn.deploy.tuning.setup import ModuleRun
from edgeattn.deploy.tuning.strategy import Strategy
from edgeattn.export.conformance import check_qdq
from edgeattn.export.int8 import Int8Options, quantise
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import read_checkpoint, save_checkpoint

SIZE = (64, 80)
TARGET = "jetpack-6.2-orin-nx-16"
HOSTILE = "layer2"
"""Part of ccnet-digits whose second convolution the tests make hostile to INT8."""


# Budgets


@pytest.mark.parametrize(
    ("text", "measure", "allowance"),
    [
        ("mIoU -0.3", "mIoU", 0.3),
        ("miou -.5 points", "mIoU", 0.5),
        ("mIoU 0", "mIoU", 0.0),
        ("top1 -1", "top1", 1.0),
        ("labels 99.5", "labels", 0.5),
        ("labels 99.5 %", "labels", 0.5),
        (" snr 20 dB", "snr", -20.0),
    ],
)
def test_budgets(text: str, measure: str, allowance: float) -> None:
    budget = parse_budget(text)
    assert budget.measure.name == measure
    assert budget.allowance == pytest.approx(allowance)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["''", "mIoU -0.3"]),
        ("mIoU", ["'mIoU'", "number"]),
        ("-0.3", ["'-0.3'"]),
        ("mIoU 0.3", ["'mIoU 0.3'", "between -100 and 0"]),
        ("labels 0.995x", ["0.995x"]),
        ("labels 101", ["above 0 and up to 100"]),
        ("speed 3", ["'speed'", "snr 20"]),
        ("snr 1e3", ["1e3"]),
    ],
)
def test_budgets_that_mean_nothing(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_budget(text)
    assert all(word in str(raised.value) for word in words), raised.value


def test_losses() -> None:
    original = Score(((8, 0), (0, 8)), 16, 16, {"y": (0.0, 1.0)})
    worse = Score(((8, 0), (4, 4)), 12, 16, {"y": (0.01, 1.0), "z": (0.001, 1.0)})
    assert parse_budget("labels 75").loss(worse, original) == pytest.approx(25)
    assert parse_budget("mIoU -100").loss(worse, original) == pytest.approx(100 - 50 * (8 / 12 + 4 / 8))
    assert worse.snr == pytest.approx(20)
    assert parse_budget("snr 20").keeps(worse, original)
    for text in ("labels 1", "mIoU -100", "snr -20"):
        assert not parse_budget(text).keeps(Score(failure="no"), original)
    assert dataclasses.replace(worse, mismatched=1).snr == -math.inf
    assert worse.added(original).agreement == pytest.approx(28 / 32)
    assert Score.from_dict(json.loads(json.dumps(worse.as_dict()))) == worse


# The search, on problems whose answer is known


@dataclasses.dataclass
class Synthetic:
    """Losses and savings that add up, in place of models and data.

    Attributes:
        harm: what each module loses in INT8.
        gain: seconds that each saves in INT8.
        half: what each loses in FP16.
        hidden: what the answer loses on the second half of the samples beside that.
    """

    harm: Sequence[int]
    gain: Sequence[int]
    half: int = 0
    hidden: int = 0
    measured: int = 0

    def strategy(self, allowance: int, width: int = 1) -> Strategy:
        names = [f"m{index}" for index in range(len(self.harm))]
        return Strategy(
            search=Search(lambda trials: [self.measure(each) for each in trials], allowance, width),
            confirm=lambda assignment: self.loss(assignment) + self.hidden * assignment.count("int8") <= allowance,
            alone=lambda kind: {
                name: (float(self.harm[place] if kind == "int8" else self.half),) for place, name in enumerate(names)
            },
            savings=lambda cheaper, dearer: {
                name: self.seconds(cheaper.changed(name, dearer.precisions[name])) - self.seconds(cheaper)
                for name in names
            },
            modules=[Module(name, (name,), (name,)) for name in names],
            noisy=frozenset(),
        )

    def loss(self, assignment: Assignment) -> float:
        costs = zip(assignment.precisions.values(), self.harm, strict=True)
        return float(sum({"int8": harm, "fp16": self.half, "fp32": 0}[kind] for kind, harm in costs))

    def seconds(self, assignment: Assignment) -> float:
        kinds = zip(assignment.precisions.values(), self.gain, strict=True)
        base = 1000 if assignment.rest == "fp16" else 2000
        return float(base + sum({"int8": -gain, "fp16": 0, "fp32": 50}[kind] for kind, gain in kinds))

    def measure(self, assignment: Assignment) -> Measured:
        self.measured += 1
        return Measured(assignment, self.loss(assignment), self.seconds(assignment))

    def optimum(self, allowance: int) -> float:
        """Return the least cost within the allowance, of all mixes of INT8 and FP16."""
        names = [f"m{index}" for index in range(len(self.harm))]
        mixes = itertools.product(("int8", "fp16"), repeat=len(names))
        every = [Assignment(dict(zip(names, mix, strict=True)), "fp16") for mix in mixes]
        return min(self.seconds(each) for each in every if self.loss(each) <= allowance)


HARMS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(HARMS, st.integers(0, 60), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_search_is_optimal_where_every_module_saves_as_much(harm: list[int], allowance: int, width: int) -> None:
    problem = Synthetic(harm, [3] * len(harm))
    found = problem.strategy(allowance, width).run()
    assert found.loss <= allowance
    assert found.seconds == problem.optimum(allowance)


@given(HARMS, st.data(), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_search_keeps_the_budget_and_leaves_nothing_to_put_back(
    harm: list[int], data: st.DataObject, allowance: int
) -> None:
    gain = data.draw(st.lists(st.integers(-3, 9), min_size=len(harm), max_size=len(harm)))
    problem = Synthetic(harm, gain)
    found = problem.strategy(allowance).run()
    assert found.loss <= allowance
    assert found.seconds <= 1000  # never dearer than FP16, which keeps the budget here
    for name, kind in found.assignment.precisions.items():
        other = found.assignment.changed(name, "int8" if kind == "fp16" else "fp16")
        assert problem.loss(other) > allowance or problem.seconds(other) >= found.seconds
    wide = Synthetic(harm, gain).strategy(allowance, width=3).run()
    assert (wide.assignment.key, wide.seconds) == (found.assignment.key, found.seconds)


def test_search_takes_the_worst_module_out_and_nothing_else() -> None:
    problem = Synthetic([1, 40, 1, 1], [5, 5, 5, 5])
    found = problem.strategy(10).run()
    assert found.assignment.precisions == {"m0": "int8", "m1": "fp16", "m2": "int8", "m3": "int8"}
    assert problem.measured <= 6  # FP32, FP16, the start, the first change; trying the module once more


def test_search_mixes_in_fp32_where_fp16_loses_too_much() -> None:
    problem = Synthetic([9, 9, 9], [5, 5, 5], half=4)
    found = problem.strategy(8).run()
    assert found.loss <= 8
    assert sorted(found.assignment.precisions.values()) == ["fp16", "fp16", "fp32"]
    assert problem.strategy(-1).run().assignment.rest == "fp32"  # nothing but FP32 can be given


def test_confirmation_on_unseen_samples_decides() -> None:
    problem = Synthetic([1, 2, 3, 4], [5, 5, 5, 5], hidden=2)
    plan = problem.strategy(10)
    found = plan.run()
    assert problem.loss(found.assignment) + 2 * found.assignment.count("int8") <= 10
    assert found.assignment.count("int8") >= 2
    assert list(plan.confirmations.values()) == [False] * (len(plan.confirmations) - 1) + [True]
    assert Synthetic([1, 1], [5, 5], hidden=100, half=0).strategy(3).run().assignment.count("int8") == 0


def test_pareto_front() -> None:
    exact = Assignment({}, "fp32")
    points = [Measured(exact, loss, seconds) for loss, seconds in ((3, 1), (1, 2), (2, 2), (1, 3), (math.inf, 0))]
    assert [(point.loss, point.seconds) for point in pareto(points)] == [(3, 1), (1, 2)]


def test_changes_that_save_nothing_are_the_first_to_go() -> None:
    start = Assignment({"a": "int8", "b": "int8"}, "fp16")
    changes = [Change("a", "fp16", (9.0,), 1.0), Change("b", "fp16", (0.1,), -1.0)]
    assert [stage.key for stage in Search.stages(start, changes)] == [
        "rest=fp16;a=int8;b=fp16",
        "rest=fp16;a=fp16;b=fp16",
    ]


# Real models


def request(folder: Path | None = None, **changes: object) -> ExportRequest:
    """Return a small export of ccnet-digits; its weights lie in the folder where one is given."""
    checkpoint = str(folder / "hostile.safetensors") if folder else "bundled"
    return ExportRequest("ccnet-digits", checkpoint, **{"size": SIZE, "sample_count": 4, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the same function, with one channel a thousand times larger between two convolutions.

    BatchNorm and ReLU in between commute with a positive factor, so the following weights make up for it exactly.
    """
    folder = tmp_path_factory.mktemp("hostile")
    state = {name: tensor.clone() for name, tensor in read_checkpoint(MODELS.get("ccnet-digits").checkpoint).items()}
    channel = int(state[f"{HOSTILE}.0.bn1.weight"].abs().argmax())
    for part in ("weight", "bias"):
        state[f"{HOSTILE}.0.bn1.{part}"][channel] *= 1000
    state[f"{HOSTILE}.0.conv2.weight"][:, channel] /= 1000
    save_checkpoint(state, folder / "hostile.safetensors", {})
    return folder


def test_the_module_made_hostile_to_int8_ranks_worst(hostile: Path) -> None:
    asked = SensitivityRequest(request(hostile, int8=True), granularity="block", depth=1, workers=1)
    steps: list[tuple[str, int, int]] = []
    result = analyse(asked, hostile / "run", lambda *step: steps.append(step))
    worst, second = result.modules[:2]
    assert worst.module == HOSTILE
    assert worst.alone.snr < second.alone.snr - 6
    best_without = max(result.modules, key=lambda entry: entry.without.snr)
    assert best_without.module == HOSTILE
    assert best_without.without.snr > result.everything.snr + 6
    count = len(result.modules)
    assert ("sensitivity", 2 * count + 1, 2 * count + 1) in steps
    record = json.loads((hostile / "run" / "sensitivity.int8.json").read_text())
    assert [entry["module"] for entry in record["modules"]] == [entry.module for entry in result.modules]
    assert "CPU" in record["measured"]
    assert all((hostile / "run" / f"sensitivity.int8{suffix}").stat().st_size > 1000 for suffix in (".png", ".svg"))

    files = {path: path.stat().st_mtime_ns for path in (hostile / "run" / "evaluations").iterdir()}
    assert len(files) == 2 * count + 1
    damaged = next(iter(files))
    damaged.write_text("{")
    assert analyse(asked, hostile / "run") == result  # one is evaluated anew, the others are not
    assert {path for path, age in files.items() if path.stat().st_mtime_ns != age} == {damaged}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportRequest]:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    export = request(int8=True, target=TARGET, plugins=True)
    return folder, export


def test_tune_writes_a_form_that_is_like_any_other(tuned: tuple[Path, ExportRequest]) -> None:
    folder, export = tuned
    # 36 dB is more than INT8 throughout gives, so that the search has to work.
    result = tune(TuneRequest(export, "snr 36", granularity="block", depth=1, workers=1, curve=1), folder)
    assert result.chosen.score.snr >= 36
    assert result.loss <= result.budget.allowance
    kinds = result.chosen.assignment
    assert 0 < kinds.count("int8") < sum(bool(module) for module in kinds.precisions)
    assert result.rows[-1].chosen
    assert result.rows[2].search > result.budget.allowance  # the default quantisation alone
    assert result.parity["verdict"] == "PASS"
    assert {entry["form"]["name"] for entry in result.parity["forms"]} == {
        *("fp32", "fp32 plugin", "tuned", "tuned plugin")
    }
    assert {report["verdict"] for report in result.parity["support"]} == {"accepted"}

    model = onnx.load(folder / "model.tuned.onnx")
    onnx.checker.check_model(model)
    assert check_qdq(model) == []
    record = json.loads((folder / "tuning.json").read_text())
    assert record["chosen"]["precisions"] == dict(kinds.precisions)
    assert 0 < record["chosen"]["int8_share"] < 1
    parts = [(entry["part"], entry["alone"]) for entry in record["tried"]]
    assert {("search", True), ("search", False), ("confirmation", False)} <= set(parts)
    assert "half" in record["fields"]["tried[].part"]
    assert all((folder / f"pareto{suffix}").stat().st_size > 1000 for suffix in (".png", ".svg"))

    judged = compare_files("ccnet-digits", "bundled", [folder / "model.tuned.onnx"], sample_count=2)
    assert judged["forms"][0]["form"]["precision"] == "int8"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "model.tuned.onnx" in {name for stage in manifest["stages"].values() for name in stage["outputs"]}


def test_assignments_are_what_quantise_makes_and_calibration_is_read_once(tuned: tuple[Path, ExportRequest]) -> None:
    folder, export = tuned
    run = ModuleRun(export, folder, granularity="layer", workers=1)
    bench = run.prepare()
    assert run.calibration is not None
    quantisable = [module for module in bench.modules if module.layers]
    chosen = {module.name for module in quantisable[::2]}
    assignment = Assignment(
        {module.name: "int8" if module.name in chosen else "fp32" for module in bench.modules}, "fp32"
    )
    made = bench.maker.form(assignment).model
    others = [layer for module in quantisable if module.name not in chosen for layer in module.layers]
    expected = quantise(bench.maker.model, run.calibration, Int8Options(exclude=others, minimum_snr=-math.inf)).model
    assert made.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)

    assert bench.calibration is not None
    exact = FormMaker(bench.maker.model, bench.modules, None)
    plain = exact.form(Assignment(dict.fromkeys(assignment.precisions, "fp32"), "fp32"))
    assert plain.model == bench.maker.model


def test_a_killed_search_goes_on(tuned: tuple[Path, ExportRequest], tmp_path: Path) -> None:
    """Kill a run in two processes after its first results; the second run takes those over and does the rest."""
    folder = tmp_path / "run"
    shutil.copytree(tuned[0], folder, ignore=shutil.ignore_patterns("evaluations", "samples"))  # exported already
    arguments = [*("sensitivity", "bundled", "--model", "ccnet-digits", "--size", "64x80", "--samples", "2")]
    arguments += ["--granularity", "block", "--depth", "1", "--workers", "2", "--precision", "fp16", "-o", str(folder)]
    command = [sys.executable, "-m", "edgeattn.cli.main", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    evaluations = folder / "evaluations"
    try:
        deadline = time.monotonic() + 200
        while len(list(evaluations.glob("[!.]*.json"))) < 2:
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
        while _group_lives(process.pid):  # the workers end with it
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    (evaluations / ".edgeattn-tmp-killed-while-writing.json").write_text("{")
    ages = {path.name: path.stat().st_mtime_ns for path in evaluations.glob("[!.]*.json")}
    export = request(fp16=True, sample_count=2)
    asked = SensitivityRequest(export, precision="fp16", granularity="block", depth=1, workers=1)
    result = analyse(asked, folder)
    files = {path.name: path.stat().st_mtime_ns for path in evaluations.iterdir()}
    assert ages.items() <= files.items()
    assert 2 <= len(ages) < len(files) == 2 * len(result.modules) + 1


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(
        _group_of(int(entry.name)) == group and "Z" not in (entry / "stat").read_text().rpartition(")")[2].split()[0]
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
    )


def _group_of(process: int) -> int | None:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


def test_blocks_and_layers(tuned: tuple[Path, ExportRequest]) -> None:
    model = onnx.load(tuned[0] / "intermediate" / "model.modules.onnx")
    layers = {module.name: module for module in modules_of(model)}
    assert layers["head.cca.value_conv"].layers == layers["head.cca.value_conv"].nodes
    assert len(layers["head.cca.value_conv"].layers) == 2  # both calls of the recurrence
    assert layers["head.cca.core"].layers == ()
    assert "relu" not in layers  # rounding twice changes nothing
    blocks = {module.name for module in modules_of(model, granularity="block", depth=1)}
    assert "head" in blocks
    assert not any("." in name for name in blocks)
    with pytest.raises(UserError, match="granularity"):
        modules_of(model, granularity="channel")
    with pytest.raises(UserError, match="depth 2"):
        modules_of(model, depth=2)


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--target"):
        tune(TuneRequest(request(int8=True), "mIoU -1"), tmp_path)
    with pytest.raises(UserError, match="one of top-1"):
        tune(TuneRequest(request(int8=True, target=TARGET), "top1 -1", workers=1), tmp_path)
    with pytest.raises(UserError, match="'int4'"):
        analyse(SensitivityRequest(request(), precision="int4"), tmp_path)
    with pytest.raises(UserError, match="--dynamic"):
        ModuleRun(request(int8=True, dynamic=True), tmp_path)
