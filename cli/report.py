"""`edgeattn report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli.console import CONSOLE, ERRORS, progress_bars
from edgeattn.deploy.run_report import report_run


def report(
    run: Annotated[Path, typer.Argument(help="Folder that `edgeattn export` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, one HTML file.")],
    work: Annotated[
        list[Path] | None, typer.Argument(help="Folders `work` of bundles of this run, copied back from devices.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that the run was judged on, to measure ranges of tensors.")
    ] = None,
) -> None:
    """Draw the page of a run with all analyses found in it, and put what devices measured beside the host's figures.

    Exit status 1 when a form of the run or an engine on a device fails parity, 2 when the input cannot be used.
    """
    with progress_bars() as progress:
        done = report_run(run, work or [], output, images=images, progress=progress)
    for note in done.notes:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
    CONSOLE.print(f"report: {done.path}")
    for failure in done.failed:
        ERRORS.print(f"[bold red]FAIL[/] {failure}")
    if done.failed:
        raise typer.Exit(1)
