"""`edgeattn sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, parse_size, progress_bars
from edgeattn.deploy.pipeline import ExportRequest
from edgeattn.deploy.tuning import Sensitivity, SensitivityRequest, analyse
from edgeattn.deploy.tuning.modules import GRANULARITIES
from edgeattn.deploy.tuning.sensitivity import LOWERED, SUFFIXES
from edgeattn.export.calibration_methods import DEFAULT_METHOD

_BAR = 12
"""Characters of the longest bar."""


def sensitivity(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory; an unfinished one is continued.")],
    model: options.Model = None,
    layout: options.Layout = None,
    precision: Annotated[str, typer.Option(help=f"What modules are lowered to: {' or '.join(LOWERED)}.")] = LOWERED[0],
    granularity: options.Granularity = GRANULARITIES[0],
    depth: options.Depth = None,
    size: options.Size = None,
    calibration: options.CalibrationImages = None,
    calibration_method: options.CalibrationMethod = DEFAULT_METHOD,
    calibration_cache: options.CalibrationCache = None,
    int8_attention: options.Int8Attention = False,
    images: Annotated[
        Path | None, typer.Option(help="Images that modules are judged on; held-out samples by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples modules are judged on, at most.")] = 100,
    workers: options.Workers = None,
) -> None:
    """Lower one torch module at a time, and all but one, and rank the modules by the harm that they do.

    Exit status 2 when the input cannot be used. A killed run goes on where it stopped when it is started again.
    """
    request = SensitivityRequest(
        ExportRequest(
            model=options.chosen_model(checkpoint, model),
            checkpoint=checkpoint,
            layout=layout,
            size=parse_size(size) if size else None,
            fp16=precision == "fp16",
            int8=precision == "int8",
            calibration=calibration,
            calibration_method=calibration_method,
            calibration_cache=calibration_cache,
            int8_attention=int8_attention,
            images=images,
            sample_count=samples,
        ),
        precision=precision,
        granularity=granularity,
        depth=depth,
        workers=workers,
    )
    with progress_bars() as progress:
        result = analyse(request, output, progress)
    CONSOLE.print(sensitivity_table(result))
    everything = result.everything
    CONSOLE.print(
        f"everything in {result.precision.upper()}: {everything.loss:+.3f} {result.metric} lost, "
        f"{everything.labels:.3f} % same labels, {everything.snr:.1f} dB; {result.measured}",
        highlight=False,
        markup=False,
    )
    for note in result.notes:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
    files = ", ".join(f"sensitivity.{precision}{suffix}" for suffix in SUFFIXES)
    CONSOLE.print(f"record and plot in {output}: {files}", highlight=False)


def sensitivity_table(result: Sensitivity) -> Table:
    """Return a row for each module, the most harmful first, with a bar for the size of the noise that it adds."""
    title = f"{result.model}: modules in {result.precision.upper()}, {result.samples} samples (CPU)"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("lost", "same labels", "dB", "others lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("noise added", no_wrap=True)
    loudest = max((_amplitude(entry.alone.snr) for entry in result.modules), default=0.0)
    for entry in result.modules:
        length = round(_BAR * _amplitude(entry.alone.snr) / loudest) if loudest else 0
        table.add_row(
            escape(entry.module),
            f"{entry.alone.loss:+.3f}",
            f"{entry.alone.labels:.3f} %",
            f"{entry.alone.snr:.1f}",
            f"{entry.without.loss:+.3f}",
            "[red]does not run[/]" if entry.alone.failure else f"[red]{'█' * max(length, 1)}[/]",
        )
    table.caption = f"{result.metric} lost with this module alone, and with all others; signal to noise of the output"
    return table


def _amplitude(decibels: float) -> float:
    """Return noise over signal; at most as large as the signal itself."""
    return float(min(1.0, 10 ** (-max(decibels, 0.0) / 20)))
