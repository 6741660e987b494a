"""`edgeattn sweep`: plan, execute, and write the table and the comparison page."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from edgeattn.deploy.sweep.configuration import read_sweep
from edgeattn.deploy.sweep.engine import Progress, Workers, run_tasks
from edgeattn.deploy.sweep.page import write_page
from edgeattn.deploy.sweep.plan import make_plan
from edgeattn.deploy.sweep.table import Row, make_rows, write_table
from edgeattn.deploy.sweep.tasks import DONE, FAILED
from edgeattn.export.run_directory import versions
from edgeattn.foundation import UserError, sha256_of

FORMAT = 1
"""Version of the layout of `sweep.json`."""


@dataclass(frozen=True)
class SweepReport:
    """What came of a sweep.

    Attributes:
        title: its title.
        rows: one for each combination.
        files: table and page.
        executed: tasks that this call executed, failed ones included.
        reused: tasks whose results were there already.
    """

    title: str
    rows: tuple[Row, ...]
    files: tuple[Path, ...]
    executed: int
    reused: int


def run_sweep(path: Path, output: Path, workers: Workers, progress: Progress | None = None) -> SweepReport:
    """Run a sweep; what an earlier call in the same folder has finished is not repeated.

    Args:
        path: the file that declares it, see `edgeattn.deploy.sweep.configuration`.
        output: folder for everything; all workers see it under this path.
        workers: who executes the tasks.
        progress: told about ended tasks.

    Raises:
        UserError: the declaration or the workers cannot be used. A combination that fails raises nothing.
    """
    sweep = read_sweep(path)
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is a file. Give a folder with -o.")
    root = output.absolute()
    plan = make_plan(sweep)
    call = uuid.uuid4().hex
    results = run_tasks(plan.tasks, root, workers, progress, call=call)
    rows = make_rows(plan.combinations, results)
    facts = {
        "format": FORMAT,
        "title": sweep.title,
        "sweep": path.name,
        "sweep_sha256": sha256_of(path),
        "tasks": len(results),
        "task_seconds": round(sum(result.seconds for result in results.values()), 1),
        "versions": versions(),
    }
    files = write_table(rows, facts, root)
    texts = {**facts, "versions": ", ".join(f"{name} {version}" for name, version in versions().items())}
    files.append(write_page(sweep.title, rows, texts, root))
    ended = [result for result in results.values() if result.status in (DONE, FAILED)]
    executed = sum(result.call == call for result in ended)
    return SweepReport(sweep.title, tuple(rows), tuple(files), executed, len(ended) - executed)
