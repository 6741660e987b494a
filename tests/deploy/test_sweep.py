"""Sweeps: complete and correct although workers die, tasks fail and devices are missing; nothing is done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from distributed import LocalCluster
from pyarrow import parquet

from edgeattn.cli.main import main
from edgeattn.deploy.sweep import engine
from edgeattn.deploy.sweep.configuration import example, read_sweep
from edgeattn.deploy.sweep.engine import Workers, run_tasks
from edgeattn.deploy.sweep.page import write_page
from edgeattn.deploy.sweep.plan import make_plan
from edgeattn.deploy.sweep.plots import pareto, pareto_plots
from edgeattn.deploy.sweep.table import Row, write_table
from edgeattn.deploy.sweep.tasks import BLOCKED, DONE, FAILED, SKIPPED, Task, content_key
from edgeattn.foundation import UserError
from edgeattn.models import MODELS

STEPS = '''
import os
import signal
import time
import uuid


def step(job):
    """Leave a trace of the execution, and do what the settings say."""
    trace = job.root.parent / "executions" / f"{job.folder.parent.name} {job.label} {uuid.uuid4().hex}"
    trace.write_text(str(os.getpid()))
    if job.settings.get("hangs"):
        hung = job.root.parent / "hung"
        if not hung.exists():
            hung.write_text(str(os.getpid()))
            time.sleep(60)
    if job.settings.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.settings.get("fails"):
        raise ArithmeticError("the numbers are off")
    value = job.settings["value"] + sum(need.facts["value"] for need in job.needs.values())
    (job.folder / "value").write_text(str(value))
    return {"value": value, "threads": os.environ["OMP_NUM_THREADS"]}
'''


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a sweep whose tasks are those of a module that only this test has."""
    (tmp_path / "sweep_steps.py").write_text(STEPS)
    (tmp_path / "executions").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "sweep"


def step(stage: str, label: str, *needs: Task, value: int = 1, resource: str | None = None, **settings: object) -> Task:
    """Return a task that adds its value to those of the tasks it needs."""
    settings = {"value": value, **settings}
    function = "sweep_steps:step"
    key = content_key(function, settings, {}, needs, None)
    return Task(stage, label, function, settings, key, tuple(need.name for need in needs), resource)


def executions(root: Path) -> Counter[str]:
    """Return how often each task was begun."""
    return Counter(trace.name.rpartition(" ")[0] for trace in (root.parent / "executions").iterdir())


def kill_who_hangs(root: Path) -> threading.Thread:
    """Kill the worker process that executes the task that hangs, as soon as it does."""

    def watch() -> None:
        hung = root.parent / "hung"
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if hung.exists() and (process := hung.read_text()):
                os.kill(int(process), signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_killed_worker_loses_nothing_and_repeats_nothing(root: Path) -> None:
    shared = step("export", "shared", value=100)
    tasks = [shared]
    for number in range(24):
        formed = step("parity", f"{number}", shared, value=number, hangs=number == 9)
        tasks += [formed, step("bundle", f"{number}", formed)]
    seen: dict[str, tuple[int, int]] = {}
    watcher = kill_who_hangs(root)
    results = run_tasks(
        tasks, root, Workers(count=2), lambda stage, done, total: seen.update({stage: (done, total)}), call="first"
    )
    watcher.join()
    assert (root.parent / "hung").exists()
    assert [results[task.name].status for task in tasks] == [DONE] * 49
    assert [results[f"bundle {number}"].facts["value"] for number in range(24)] == [101 + n for n in range(24)]
    assert {result.facts["threads"] for result in results.values()} == {"1"}
    assert len({result.process for result in results.values()}) in (2, 3)  # two, and the one in place of the dead one
    assert executions(root) == Counter({task.name: 1 for task in tasks}) + Counter(["parity 9"])
    assert seen == {"export": (1, 1), "parity": (24, 24), "bundle": (24, 24)}

    again = run_tasks(tasks, root, Workers(count=2), call="second")
    assert again == results
    assert sum(executions(root).values()) == 50


def test_a_failure_stops_only_what_needs_it_and_is_tried_again(root: Path) -> None:
    def tasks(**settings: object) -> list[Task]:
        first, second = step("export", "a"), step("export", "b", **settings)
        return [first, second, step("parity", "a", first), step("parity", "b", second)]

    results = run_tasks(tasks(fails=True), root, Workers(count=1), call="first")
    assert [result.status for result in results.values()] == [DONE, FAILED, DONE, BLOCKED]
    assert results["export b"].message == "ArithmeticError: the numbers are off"
    assert "in step" in results["export b"].trace
    assert results["parity b"].message == "needs export b, which is failed"
    record = json.loads(tasks(fails=True)[1].record(root).read_text())
    assert (record["status"], record["message"]) == (FAILED, results["export b"].message)

    (root / results["parity a"].folder / "value").write_text("somebody changed this")
    results = run_tasks(tasks(), root, Workers(count=1), call="second")
    assert {result.status for result in results.values()} == {DONE}
    assert results["parity a"].facts["value"] == 2
    assert (root / results["parity a"].folder / "value").read_text() == "2"
    assert executions(root) == {"export a": 1, "export b": 2, "parity a": 2, "parity b": 1}


@pytest.fixture
def scheduler(root: Path) -> Iterator[str]:
    """Yield the address of a scheduler with two workers: one anywhere, one on a "board"."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        address = cluster.scheduler_address
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--resources", "board=1", "--death-timeout", "60"]
        command = [sys.executable, "-m", "dask", "worker", address, *options]
        board = subprocess.Popen(command, cwd=root.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            while len(cluster.scheduler_info["workers"]) < 2:
                assert time.monotonic() < end, "the worker does not come up"
                time.sleep(0.05)
            yield address
        finally:
            board.kill()
            board.wait()


def test_resources_decide_who_executes_and_missing_ones_end_the_wait(
    root: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    bundles = [step("bundle", f"{number}") for number in range(4)]
    tasks = [
        *bundles,
        *(step("device", bundle.label, bundle, resource="board") for bundle in bundles),
        absent := step("device", "absent", bundles[0], resource="thor"),
        step("report", "absent", absent),
    ]
    results = run_tasks(tasks, root, Workers(scheduler), call="first")
    boards = {results[f"device {bundle.label}"].process for bundle in bundles}
    assert {results[f"device {bundle.label}"].status for bundle in bundles} == {DONE}
    assert len(boards) == 1
    assert results["device absent"].status == SKIPPED
    assert "there is no worker with the resource thor" in results["device absent"].message
    assert results["report absent"].status == BLOCKED
    # The board goes away with a task, and what wants a board must not wait for it for ever.
    deadly = step("device", "deadly", bundles[0], resource="board", dies=True)
    results = run_tasks([*tasks, deadly, step("report", "deadly", deadly)], root, Workers(scheduler), call="second")
    assert results["device deadly"].status == SKIPPED
    assert "resource board" in results["device deadly"].message
    assert results["report deadly"].status == BLOCKED
    once = {task.name: 1 for task in [*tasks, deadly] if "absent" not in task.name}
    assert executions(root) == once


def test_unusable_schedulers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CONNECTION_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"tcp://127.0.0.1:9 does not answer"):
        run_tasks([step("export", "a")], root, Workers("tcp://127.0.0.1:9"), call="only")
    with pytest.raises(UserError, match="scheduler nonsense:// does not answer"):
        run_tasks([step("export", "a")], root, Workers("nonsense://"), call="only")


SWEEP = """
title = "One form"
[matrix]
precisions = ["fp16"]
plugins = [false, true]
sizes = [[64, 80]]
[[checkpoint]]
name = "digits"
model = "ccnet-digits"
[[target]]
name = "jetpack-7.1-thor-t4000"
[options]
samples = 4
golden = 1
[device]
engine = "onnxruntime"
runs = 3
seconds = 1
warm_up = 0
"""


def declare(folder: Path, text: str) -> Path:
    """Write a declaration and return its path."""
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `edgeattn sweep` in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["edgeattn", "sweep", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_a_real_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = declare(tmp_path, SWEEP), tmp_path / "out"
    assert call(monkeypatch, path, "-o", output, "--workers", 2) == 0, capsys.readouterr().err
    assert "12 tasks executed, 0 unchanged" in capsys.readouterr().out
    content = json.loads((output / "sweep.json").read_text())
    plain, plugins = content["rows"]
    assert (plain["plugins"], plugins["plugins"]) == (False, True)
    for row in (plain, plugins):
        assert (row["status"], row["parity"], row["device_verdict"], row["problems"]) == (
            "complete",
            "PASS",
            "PASS",
            [],
        )
        assert row["support"] in ("accepted", "needs attention")
        assert 0 < row["estimated_ms_low"] < row["estimated_ms"] < row["estimated_ms_high"]
        assert row["latency_ms"] > 0
        assert row["energy_per_frame_j"] is None  # this machine has no rails
        assert row["measured"].endswith("on the CPU, not TensorRT")
        assert (output / row["bundle"]).stat().st_size == row["bundle_bytes"]
    # Only the form that was asked for is in a bundle, and the exported network is shared, not made again.
    parity = next((output / "results" / "parity").glob("*plugins*.json"))
    assert json.loads(parity.read_text())["facts"]["taken_over"] == ["export", "fp16"]
    assert len(list((output / "work" / "export").iterdir())) == 1
    assert parquet.read_table(output / "sweep.parquet").to_pylist() == content["rows"]
    page = (output / "sweep.html").read_text()
    assert "One form" in page
    assert page.count("<svg") == 2

    assert call(monkeypatch, path, "-o", output) == 0
    assert "0 tasks executed, 12 unchanged" in capsys.readouterr().out


AFTER_FORMS = {"parity", "support", "estimate", "bundle", "device"}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("golden = 1", "golden = 2", {"bundle", "device"}),
        ("samples = 4", "samples = 5", AFTER_FORMS),
        ("runs = 3", "runs = 4", {"device"}),
        ("samples = 4", 'fp16_exclude = ["head"]\nsamples = 4', {"forms", *AFTER_FORMS}),
        ("[false, true]", "[true, false]", set()),
    ],
)
def test_only_what_depends_on_a_change_is_repeated(tmp_path: Path, old: str, new: str, changed: set[str]) -> None:
    before = make_plan(read_sweep(declare(tmp_path, SWEEP)))
    after = make_plan(read_sweep(declare(tmp_path, SWEEP.replace(old, new))))
    keys = {task.name: task.key for task in before.tasks}
    assert {task.stage for task in after.tasks if keys.get(task.name) != task.key} == changed


def test_files_count_by_their_content(tmp_path: Path) -> None:
    weights = MODELS.get("ccnet-digits").checkpoint
    assert weights is not None
    bundled = make_plan(read_sweep(declare(tmp_path, SWEEP)))
    (tmp_path / "copy.safetensors").write_bytes(weights.read_bytes())
    text = SWEEP.replace("[[target]]", 'path = "copy.safetensors"\n[[target]]')
    copied = make_plan(read_sweep(declare(tmp_path, text)))
    assert [task.key for task in copied.tasks] == [task.key for task in bundled.tasks]
    assert copied.tasks[0].settings["path"] == str(tmp_path / "copy.safetensors")
    (tmp_path / "copy.safetensors").write_bytes(weights.read_bytes()[:-1] + b"\0")
    changed = make_plan(read_sweep(declare(tmp_path, text)))
    assert not {task.key for task in changed.tasks} & {task.key for task in bundled.tasks}


def test_the_example_is_valid_and_declares_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--example") == 0
    assert capsys.readouterr().out == example()
    plan = make_plan(read_sweep(declare(tmp_path, example())))
    assert len(plan.combinations) == 24
    stages = Counter(task.stage for task in plan.tasks)
    assert stages == {"export": 2, "forms": 4, "parity": 12, "support": 24, "estimate": 24, "bundle": 24}
    # Every key that is commented out is one that the reader takes.
    text = re.sub(r"^# (?=[a-z_]+ = |\[device\])", "", example(), flags=re.MULTILINE)
    for folder in ("validation", "calibration"):
        (tmp_path / folder).mkdir()
    text = text.replace('layout = "official"', "").replace("bundle = true", "")
    sweep = read_sweep(declare(tmp_path, text))
    assert sweep.device is not None
    assert sweep.targets[0].resource == "jetson-orin"
    assert {task.resource for task in make_plan(sweep).tasks if task.stage == "device"} == {"jetson-orin"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("precisions", "precission", ["'precission'", "[matrix]", "'precisions'"]),
        ("[matrix]", "[matrices]", ["'matrices'", "'matrix'"]),
        ('"fp16"', '"fp61"', ["'fp61'", "'fp16'"]),
        ("[[64, 80]]", '["64x80"]', ["sizes", "64x80", "[height, width]"]),
        ("[[64, 80]]", "[[64, 8]]", ["sizes", "16 to 16384"]),
        ("samples = 4", "samples = true", ["samples", "True", "whole number"]),
        ("samples = 4", "samples = 0", ["samples", "0", "above 0"]),
        ('model = "ccnet-digits"', "", ["[[checkpoint]] number 1", "'model'"]),
        ('"ccnet-digits"', '"ccnet-digit"', ["ccnet-digit", "ccnet-digits"]),
        ("thor-t4000", "thor-t40000", ["jetpack-7.1-thor-t40000", "thor-t4000"]),
        ('"digits"', '"../digits"', ["'../digits'", "file names"]),
        ('"onnxruntime"', '"tensorflow"', ["'tensorflow'", "tensorrt"]),
        ('"onnxruntime"', '"tensorrt"', ["no target names the resource"]),
        ("golden = 1", "bundle = false", ["[device]", "bundle = false"]),
        ('model = "ccnet-digits"', 'model = "ccnet-digits"\npath = "lost.pth"', ["lost.pth", "does not exist"]),
        ("[[target]]", "[target]", ["declares no target", "[[target]]"]),
        ("title = ", "title : ", ["not TOML"]),
        ("[false, true]", "[true, true]", ["plugins", "[True, True]"]),
    ],
)
def test_unusable_declarations(tmp_path: Path, old: str, new: str, words: Sequence[str]) -> None:
    assert old in SWEEP
    with pytest.raises(UserError) as error:
        read_sweep(declare(tmp_path, SWEEP.replace(old, new, 1)))
    for word in words:
        assert word in str(error.value), error.value


def test_command_line_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = declare(tmp_path, SWEEP)
    assert call(monkeypatch, path) == 2
    assert call(monkeypatch, path, "-o", path) == 2
    assert call(monkeypatch, path, "-o", tmp_path / "out", "--workers", 2, "--scheduler", "tcp://a:1") == 2
    assert call(monkeypatch, tmp_path / "none.toml", "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("error:") == 4


def rows() -> list[Row]:
    """Return rows of two precisions, one with a hostile name and failures."""

    def row(number: int, precision: str, accuracy: float, milliseconds: float, **known: object) -> Row:
        values = {"status": "complete", "problems": (), "parity": "PASS", "metric": "mIoU", **known}
        return Row(
            number, "digits", "ccnet-digits", 64, 80, precision, False, "orin", accuracy=accuracy,
            original_accuracy=0.9, estimated_ms=milliseconds, estimated_ms_low=0.5 * milliseconds,
            estimated_ms_high=2 * milliseconds, **values,
        )  # type: ignore[arg-type]  # fmt: skip

    return [
        row(1, "fp32", 0.9, 4.0),
        row(2, "fp16", 0.9, 2.0, latency_ms=3.0, measured="a board", device_verdict="PASS", energy_per_frame_j=0.02),
        row(3, "int8", 0.8, 1.0),
        row(4, "bf16", 0.7, 3.0, problems=("device failed: <script>alert(1)</script>",), status="failed"),
        row(5, "int8", 0.95, 0.5, parity="FAIL"),
    ]


def test_pareto_fronts_hold_what_nothing_beats_and_nothing_that_failed() -> None:
    assert pareto([(2.0, 5.0, 1), (1.0, 4.0, 2), (1.0, 3.0, 3), (3.0, 5.0, 4)]) == [(1.0, 4.0, 2), (2.0, 5.0, 1)]
    measured, estimated = pareto_plots(rows())
    assert (measured.front, estimated.front) == ((2,), (3, 2))
    assert "a board" in measured.title
    assert "not measured" in estimated.title
    assert "#010203" not in estimated.svg
    assert "currentColor" in estimated.svg


def test_page_is_self_contained_and_readable_on_a_phone(tmp_path: Path) -> None:
    page = write_page("A <b>title</b>", rows(), {"sweep": "x.toml"}, tmp_path).read_text()
    addresses = set(re.findall(r"""https?://[^\s"'<>]+""", page))
    namespaces = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/", "https://matplotlib.org/")
    assert all(address.startswith(namespaces) for address in addresses)
    assert "<script" not in page
    assert not re.search(r"<(link|img|iframe)|@import|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert 'content="width=device-width' in page
    assert "A &lt;b&gt;title" in page
    # On a phone every cell carries the name of its column: 15 of each combination, 14 of each engine.
    assert len(re.findall(r"<td[^>]* data-label=", page)) == 15 * len(rows()) + 14
    assert "0.0200 J" in page
    assert [row.passed for row in rows()] == [True, True, True, False, False]


def test_table_keeps_types_in_parquet(tmp_path: Path) -> None:
    write_table(rows(), {"format": 1}, tmp_path)
    table = parquet.read_table(tmp_path / "sweep.parquet")
    assert table.to_pylist() == json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert str(table.schema.field("plugins").type) == "bool"
    assert str(table.schema.field("bundle_bytes").type) == "int64"
