"""A real sweep of 24 combinations on two local workers, one of which is killed; and what the engine costs.

`python benchmarks/sweep.py` prints a table and writes benchmarks/results/sweep.json. The matrix is the bundled digits
CCNet at two sizes, in three precisions, with and without plugin nodes, for two targets. It is run twice into empty
folders: on two workers, one of which is killed in the middle, and on one worker. Both must give the same results.

Overhead is that of one worker, which executes one task at a time: everything from the start of the command to its end
(its imports, starting and ending the cluster, planning, table and page) over the seconds that tasks say they took. The
first task of a process imports PyTorch, and that counts to the task. Wall time and processor time of all processes are
both given, because other work on the machine makes wall time long; it does so to tasks and the rest alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from edgeattn.deploy.sweep.engine import Workers
from edgeattn.deploy.sweep.sweep import run_sweep
from edgeattn.deploy.sweep.tasks import DONE
from edgeattn.export.run_directory import versions
from edgeattn.foundation import write_text

RESULTS = Path(__file__).parent / "results" / "sweep.json"
SWEEP = """
title = "Digits CCNet, 24 combinations"
[matrix]
precisions = ["fp32", "fp16", "int8"]
plugins = [false, true]
sizes = [[64, 80], [96, 96]]
[[checkpoint]]
name = "digits"
model = "ccnet-digits"
[[target]]
name = "jetpack-6.2-orin-nano-8"
[[target]]
name = "jetpack-7.1-thor-t4000"
[options]
samples = 24
golden = 2
"""
KILL_AFTER = 6
"""Judged forms, of 12, after which a worker is killed."""

# The first run compiles the kernels that are not in the user's cache yet, so that they count as tasks in none.
RUNS = {"two workers, one killed": ("--workers", "2", "--kill"), "one worker": ("--workers", "1")}


def main() -> None:
    """Run everything, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        _measure_all()
        return
    declaration = options.folder / "sweep.toml"
    declaration.write_text(SWEEP, encoding="utf-8")
    killer = _Killer()
    report = run_sweep(
        declaration, options.folder / "out", Workers(count=options.workers), killer if options.kill else None
    )
    print(json.dumps({"killed_process": killer.killed, "executed": report.executed, "rows": len(report.rows)}))


class _Killer:
    """A listener to progress that kills a worker process in the middle of the sweep."""

    def __init__(self) -> None:
        self.killed: int | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != "parity" or done < KILL_AFTER or self.killed is not None:
            return
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        self.killed = workers[0].pid
        os.kill(workers[0].pid, signal.SIGKILL)


def _measure(*arguments: str) -> dict[str, Any]:
    """Run this script in a process of its own, and return what it cost and what became of the tasks."""
    with tempfile.TemporaryDirectory(prefix="edgeattn-sweep-") as name:
        before, load = os.times(), os.getloadavg()[0]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--folder", name, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall, after = time.monotonic() - start, os.times()
        records = [json.loads(path.read_text()) for path in (Path(name) / "out" / "results").rglob("*.json")]
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "wall_seconds": wall,
        "task_seconds": sum(record["seconds"] for record in records),
        "cpu_seconds": sum(after[2:4]) - sum(before[2:4]),
        "task_cpu_seconds": sum(record["cpu_seconds"] for record in records),
        "processes": len({record["process"] for record in records}),
        "tasks": dict(Counter(record["status"] for record in records)),
        "by_stage": dict(Counter(record["name"].split()[0] for record in records)),
        "facts": {record["name"]: record["facts"] for record in records},
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }


def _comparable(facts: dict[str, Any]) -> dict[str, Any]:
    """Leave out what may differ between runs.

    A bundle names its run, whose parity.json holds measured latencies; a task that was killed finds more stages done.
    """
    own = ("sha256", "taken_over")
    return {name: {key: value for key, value in known.items() if key not in own} for name, known in facts.items()}


def _measure_all() -> None:
    """Measure both runs and write the results."""
    console = Console()
    measured = {}
    for name, arguments in RUNS.items():
        measured[name] = _measure(*arguments)
        console.print(f"{name}: {measured[name]['wall_seconds']:.1f} s, {measured[name]['tasks']}")
    facts = [_comparable(run.pop("facts")) for run in measured.values()]
    two, one = measured.values()
    results = {
        "machine": {"processors": os.cpu_count(), "platform": platform.platform()},
        "versions": versions(),
        "complete": two["by_stage"] == one["by_stage"] and {*two["tasks"], *one["tasks"]} == {DONE},
        "same_results": facts[0] == facts[1],
        "overhead_wall": one["wall_seconds"] / one["task_seconds"] - 1,
        "overhead_cpu": one["cpu_seconds"] / one["task_cpu_seconds"] - 1,
        "runs": measured,
    }
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    table = Table("run", "wall s", "task s", "processor s", "task processor s", "tasks", "load before")
    for name, run in measured.items():
        keys = ("wall_seconds", "task_seconds", "cpu_seconds", "task_cpu_seconds")
        table.add_row(name, *(f"{run[key]:.1f}" for key in keys), str(run["tasks"]), f"{run['load_before']:.1f}")
    console.print(table)
    console.print(f"complete: {results['complete']}, the same results in both runs: {results['same_results']}")
    console.print(f"overhead: wall {results['overhead_wall']:.1%}, processor {results['overhead_cpu']:.1%}")


if __name__ == "__main__":
    main()
