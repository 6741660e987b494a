"""`edgeattn sweep`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgeattn.cli.console import CONSOLE, ERRORS, progress_bars
from edgeattn.deploy.sweep.configuration import example as example_file
from edgeattn.deploy.sweep.engine import Workers
from edgeattn.deploy.sweep.page import figure, mebibytes, points
from edgeattn.deploy.sweep.sweep import run_sweep
from edgeattn.deploy.sweep.table import Row
from edgeattn.foundation import UserError


def sweep(
    declaration: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.toml", help="What to combine; see --example.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the sweep; an unfinished one is continued.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of this machine; one for each processor by default.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Dask scheduler, such as tcp://10.0.0.1:8786, whose workers execute the tasks instead."),
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a commented SWEEP.toml and do nothing else.")
    ] = False,
) -> None:
    """Run a matrix of checkpoints, sizes, precisions, plugins and targets, and compare the results on one page.

    What an earlier call in the same folder has finished is not repeated; a combination that fails does not stop the
    others. A device takes part as a worker with a resource that the target names (`dask worker ADDRESS --nthreads 1
    --resources jetson-orin=1`); all workers see the folder of the sweep under the same path. Exit status 1 when a
    combination failed, 2 when the input cannot be used; tasks that no worker may run are skipped, which is no failure.
    """
    if example:
        typer.echo(example_file(), nl=False)
        return
    if declaration is None or output is None:
        raise UserError("a sweep needs its declaration and a folder. Give SWEEP.toml and -o; --example shows a file.")
    if scheduler is not None and workers is not None:
        raise UserError(
            f"--workers {workers} starts processes here, but --scheduler {scheduler} has its own. Drop one."
        )
    with progress_bars() as progress:
        report = run_sweep(declaration, output, Workers(scheduler, workers or os.cpu_count() or 1), progress)
    for target in dict.fromkeys(row.target for row in report.rows):
        CONSOLE.print(_table(target, [row for row in report.rows if row.target == target]))
    for row in report.rows:
        for problem in row.problems:
            ERRORS.print(f"{row.number}: {problem}", markup=False, highlight=False, soft_wrap=True)
    CONSOLE.print(f"{report.executed} tasks executed, {report.reused} unchanged", highlight=False)
    for file in report.files:
        CONSOLE.print(f"{file}", markup=False, highlight=False, soft_wrap=True)
    if not all(row.passed for row in report.rows):
        raise typer.Exit(1)


def _table(target: str, rows: Sequence[Row]) -> Table:
    """Return the combinations of a target and what is known of them."""
    table = Table(title=escape(target), title_justify="left", caption_justify="left")
    for column in ("#", "combination", "status", "parity"):
        table.add_column(column, no_wrap=column != "combination")
    for column in ("points", "est. ms", "ms", "mJ", "bundle"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        form = f"{row.checkpoint} {row.height}x{row.width} {row.precision}{' plugins' if row.plugins else ''}"
        energy = None if row.energy_per_frame_j is None else 1e3 * row.energy_per_frame_j
        table.add_row(
            f"{row.number}",
            escape(form),
            row.status,
            row.parity or "–",
            points(row.accuracy),
            figure(row.estimated_ms, ".3f"),
            figure(row.latency_ms, ".3f"),
            figure(energy, ".2f"),
            mebibytes(row.bundle_bytes),
            style=None if row.passed else "red",
        )
    places = sorted({row.measured for row in rows if row.measured})
    measured = f"measured: {escape('; '.join(places))}" if places else "nothing was measured on a device"
    table.caption = f"points: accuracy; est. ms: roofline estimate, not measured; ms and mJ: {measured}"
    return table
