"""`edgeattn bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, progress_bars
from edgeattn.deploy.evidence import BUNDLED, checkpoint_path
from edgeattn.models import MODELS
from edgeattn.validation.divergence.records import Divergence
from edgeattn.validation.divergence.sources import compare_sources


def bisect(
    reference: Annotated[str, typer.Argument(help=f"An .onnx file, or trained weights (or '{BUNDLED}') for PyTorch.")],
    candidate: Annotated[str, typer.Argument(help="The form under test, given in the same way.")],
    model: Annotated[str | None, typer.Option(help="Model declaration; needed for PyTorch and for images.")] = None,
    layout: options.Layout = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images or .npz of inputs; held-out samples by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to compare on, at most.")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the record, the plot and a minimal failing model.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime's threads within an operation.")] = 1,
) -> None:
    """Name the first module of one form that differs from another by more than its inputs and rounding explain.

    Exit status 1 when the forms diverge, 2 when the input cannot be used.
    """
    spec = MODELS.get(model) if model else None
    with progress_bars() as progress:
        found = compare_sources(
            reference,
            candidate,
            spec,
            checkpoint=lambda text: checkpoint_path(spec, text) if spec else None,
            data=data,
            count=samples,
            output=output,
            threads=threads,
            layout=layout,
            progress=lambda done: progress("bisect", done, samples),
        )
    CONSOLE.print(divergence_table(found.divergence))
    for note in found.divergence.notes:
        CONSOLE.print(f"note: {note}", highlight=False)
    CONSOLE.print(found.divergence.verdict, highlight=False, markup=False)
    if output:
        CONSOLE.print(f"record and plot: {output}")
    if found.reduction:
        CONSOLE.print(f"minimal failing model: {found.reduction.model}, {found.reduction.nodes} nodes, with its inputs")
    if found.divergence.found:
        raise typer.Exit(1)


def divergence_table(divergence: Divergence) -> Table:
    """Return the error along the network, a row for each compared tensor."""
    table = Table(title=f"{divergence.candidate} against {divergence.reference} (CPU)", title_justify="left")
    for column in ("module", "total", "inherited", "local", "explained", ""):
        table.add_column(column, justify="left" if column in ("module", "") else "right", no_wrap=column != "module")
    for point in divergence.points:
        figures = (point.total, point.inherited, point.local, point.limit)
        row = ("-" if point.failure else f"{value:.1e}" for value in figures)
        mark = "[bold red]first[/]" if point is divergence.first else "[red]diverges[/]" if point.diverges else ""
        table.add_row(point.label, *row, mark)
    for check in divergence.outputs:
        table.add_row(
            f"output {check.name}, as one graph",
            f"{check.unmarked:.1e}",
            "",
            f"{check.difference:.1e}",
            f"{check.allowed:.1e}",
            "" if check.agrees else "[red]differs[/]",
        )
    return table
