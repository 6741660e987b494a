"""Tasks whose results are files: executed once for the same content, wherever and however often they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError, remove_leftovers, sha256_of, write_text

DONE, FAILED, BLOCKED, SKIPPED = "done", "failed", "blocked", "skipped"
"""Outcomes: finished; raised an error; not begun, because something it needs did not finish; no worker may run it."""


@dataclass(frozen=True)
class Task:
    """One step of a sweep.

    Attributes:
        stage: what kind of step it is, such as "export"; a task needs at most one task of each stage.
        label: what it is about, such as "digits.64x80.fp16"; unique within its stage.
        function: "module:function", called with a `Job`, returns facts as JSON values and writes into the job's folder.
        settings: what the function is told, as JSON values.
        key: digest of everything the result depends on, see `content_key`.
        needs: names of the tasks that must finish before.
        resource: what a worker must have to run it, such as "jetson-orin"; any worker may when None.
    """

    stage: str
    label: str
    function: str
    settings: Mapping[str, Any]
    key: str
    needs: tuple[str, ...] = ()
    resource: str | None = None

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.stage} {self.label}"

    def folder(self, root: Path) -> Path:
        """Return where it writes its files."""
        return root / "work" / self.stage / f"{self.label}-{self.key[:12]}"

    def record(self, root: Path) -> Path:
        """Return where its result is written."""
        return root / "results" / self.stage / f"{self.label}-{self.key[:12]}.json"


@dataclass(frozen=True)
class Result:
    """Outcome of a task, which is also the content of its file.

    Attributes:
        name: the task's name.
        key: the task's key.
        status: `DONE`, `FAILED`, `BLOCKED` or `SKIPPED`; only the first two are ever written.
        call: which call of the sweep it was made by.
        message: why it is not done; empty otherwise.
        trace: traceback of an error that is a defect; empty otherwise.
        facts: what the function returned.
        folder: where the task's files are, relative to the sweep's folder.
        digest: SHA-256 of that folder.
        needed: digests of the folders of the tasks it needed, by stage.
        seconds: how long it took.
        cpu_seconds: processor time that the worker's process and those it started spent meanwhile.
        process: id of the worker's process.
        machine: name of the machine.
    """

    name: str
    key: str
    status: str
    call: str
    message: str = ""
    trace: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: str = ""
    digest: str = ""
    needed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    process: int = 0
    machine: str = ""


@dataclass(frozen=True)
class Job:
    """What a task's function gets.

    Attributes:
        root: the sweep's folder.
        folder: where it writes; may hold what a killed attempt left.
        label: the task's label.
        settings: the task's settings.
        needs: results of the tasks it needs, by stage.
    """

    root: Path
    folder: Path
    label: str
    settings: Mapping[str, Any]
    needs: Mapping[str, Result]

    def folder_of(self, stage: str) -> Path:
        """Return the folder of the needed task of a stage."""
        return self.root / self.needs[stage].folder


def content_key(
    function: str, settings: Mapping[str, Any], inputs: Mapping[str, str], needs: Sequence[Task], versions: object
) -> str:
    """Return the digest of everything that a result depends on.

    Args:
        function: what is called.
        settings: what it is told.
        inputs: SHA-256 of the files and folders that it reads, by what they are.
        needs: tasks whose files it reads.
        versions: libraries that the result depends on, as JSON values.
    """
    basis = [function, settings, inputs, [task.key for task in needs], versions]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def read_result(task: Task, root: Path) -> Result | None:
    """Return the result that was written of a task; None where there is none, or it is of another release."""
    try:
        return Result(**json.loads(task.record(root).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def finished(task: Task, root: Path, needed: Sequence[Result]) -> Result | None:
    """Return the task's result if it is done, its files are as it left them, and so is what it read; None otherwise."""
    known = read_result(task, root)
    if known is None or known.status != DONE or known.key != task.key or known.needed != _digests(needed):
        return None
    folder = root / known.folder
    return known if folder.is_dir() and sha256_of(folder) == known.digest else None


def execute(task: Task, root: Path, call: str, needed: Sequence[Result]) -> Result:
    """Execute a task, unless its result is there already, and write the result.

    A worker may die at any moment, and another one then executes the task: the result appears whole or not at all.

    Args:
        task: the task.
        root: the sweep's folder.
        call: which call of the sweep this is; what failed in this very call is not tried again.
        needed: results of the tasks it needs, which are done.
    """
    if (known := finished(task, root, needed)) is not None:
        return known
    path = task.record(root)
    known, folder = read_result(task, root), task.folder(root)
    if known is not None and known.status == FAILED and known.call == call:
        return known
    if known is not None and known.status == DONE:  # its files were changed, or what it had read
        path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
    start, before = time.monotonic(), os.times()
    outcome: dict[str, Any]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        facts = _function(task)(Job(root, folder, task.label, task.settings, {_stage(r): r for r in needed}))
        outcome = {"status": DONE, "facts": dict(facts), "digest": sha256_of(folder)}
    except UserError as error:
        outcome = {"status": FAILED, "message": str(error)}
    except Exception as error:  # one failure must not stop the rest
        message = f"{type(error).__name__}: {error}"
        outcome = {"status": FAILED, "message": message, "trace": traceback.format_exc()}
    result = Result(
        name=task.name,
        key=task.key,
        call=call,
        folder=folder.relative_to(root).as_posix(),
        needed=_digests(needed),
        seconds=time.monotonic() - start,
        cpu_seconds=sum(os.times()[:4]) - sum(before[:4]),
        process=os.getpid(),
        machine=platform.node(),
        **outcome,
    )
    write_text(path, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    return result


def _function(task: Task) -> Callable[[Job], Mapping[str, Any]]:
    module, _, name = task.function.partition(":")
    function: Callable[[Job], Mapping[str, Any]] = getattr(importlib.import_module(module), name)
    return function


def _stage(result: Result) -> str:
    return result.name.split(" ", 1)[0]


def _digests(results: Sequence[Result]) -> dict[str, str]:
    return {_stage(result): result.digest for result in results}
