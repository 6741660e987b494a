"""`edgeattn tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, conclude, parse_size, progress_bars
from edgeattn.deploy.pipeline import PLUGIN_HOSTS, ExportRequest
from edgeattn.deploy.tuning import MEASURES, TuneRequest, Tuning, tune
from edgeattn.deploy.tuning.modules import GRANULARITIES
from edgeattn.deploy.tuning.search import PRECISIONS
from edgeattn.deploy.tuning.tune import CURVE, RECORD
from edgeattn.export.calibration_methods import DEFAULT_METHOD


def tune_precisions(
    checkpoint: options.Checkpoint,
    budget: Annotated[str, typer.Option(help="; ".join(measure.summary for measure in MEASURES) + ".")],
    target: Annotated[str, typer.Option(help="Deployment target that costs are estimated for.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory; an unfinished one is continued.")],
    model: options.Model = None,
    layout: options.Layout = None,
    granularity: options.Granularity = GRANULARITIES[0],
    depth: options.Depth = None,
    size: options.Size = None,
    opset: options.Opset = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Tune and write the form with plugin nodes too.")] = False,
    plugin_host: Annotated[
        str, typer.Option(help=f"{' or '.join(PLUGIN_HOSTS)}; python, for TensorRT 10.15+, adds a node per launch.")
    ] = PLUGIN_HOSTS[0],
    calibration: options.CalibrationImages = None,
    calibration_method: options.CalibrationMethod = DEFAULT_METHOD,
    calibration_cache: options.CalibrationCache = None,
    int8_attention: options.Int8Attention = False,
    images: Annotated[
        Path | None, typer.Option(help="Images that the budget is judged on; held-out samples by default.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Samples at most: one half to search on, the other to confirm on.")
    ] = 200,
    curve: Annotated[int, typer.Option(min=0, help="Further points of the Pareto plot, at most.")] = CURVE,
    workers: options.Workers = None,
) -> None:
    """Choose the cheapest mix of INT8, FP16 and FP32 within an accuracy budget, and write and judge its model.

    Exit status 1 when the written model fails parity, 2 when the input cannot be used. A killed run goes on where it
    stopped when it is started again.
    """
    request = TuneRequest(
        ExportRequest(
            model=options.chosen_model(checkpoint, model),
            checkpoint=checkpoint,
            layout=layout,
            size=parse_size(size) if size else None,
            opset=opset,
            int8=True,
            plugins=plugins,
            plugin_host=plugin_host,
            target=target,
            calibration=calibration,
            calibration_method=calibration_method,
            calibration_cache=calibration_cache,
            int8_attention=int8_attention,
            images=images,
            sample_count=samples,
        ),
        budget=budget,
        granularity=granularity,
        depth=depth,
        workers=workers,
        curve=curve,
    )
    with progress_bars() as progress:
        result = tune(request, output, progress)
    CONSOLE.print(tuning_table(result))
    for note in result.notes:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
    CONSOLE.print(f"record and plot in {output}: {RECORD}, pareto.png, pareto.svg", highlight=False)
    conclude({result.samples.model: result.parity}, {result.samples.model: output})


def tuning_table(result: Tuning) -> Table:
    """Return the corners of the search and its answer."""
    table = Table(title=escape(f"{result.samples.model}: budget {result.budget.text}"), title_justify="left")
    table.add_column("form")
    for column in ("int8/fp16/fp32", "MACs", "ms", "search", "confirm", "all"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        assignment, cost = row.outcome.assignment, row.outcome.cost
        counts = "/".join(str(assignment.count(kind)) for kind in PRECISIONS)
        figures = ("" if loss is None else f"{loss:+.3f}" for loss in (row.search, row.confirmation, row.everything))
        share, milliseconds = ("", "") if cost is None else (f"{cost.int8_share:.1%}", f"{1e3 * cost.seconds:.3f}")
        table.add_row(row.name, counts, share, milliseconds, *figures, style="bold" if row.chosen else None)
    table.caption = (
        "modules by precision; multiplications of convolutions in INT8; time estimated for "
        f"{result.target}, not measured; lost on each half of the samples and on all: {result.budget.measure.unit}"
    )
    return table
