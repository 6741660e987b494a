"""`edgeattn split`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, conclude, parse_size, progress_bars
from edgeattn.deploy.split import RECORD, SplitRequest, split_network
from edgeattn.deploy.video import COMBINATIONS
from edgeattn.export.opsets import DEFAULT_OPSET


def split(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help=f"Folder of the graphs and of {RECORD}.")],
    model: options.Model = None,
    layout: options.Layout = None,
    size: options.Size = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write FP16 graphs.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write INT8 graphs (INT8 layers, FP16 rest).")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Images or .npz for INT8 and for FP16's ranges; bundled training images by default."),
    ] = None,
    references: Annotated[
        int | None, typer.Option(min=1, help="COSNet: references that the attention takes; any number by default.")
    ] = None,
    combination: Annotated[
        str | None,
        typer.Option(
            help="COSNet: " + "; ".join(f"{name}: {entry.summary}" for name, entry in COMBINATIONS.items()) + "."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that parity is judged on; held-out samples by default.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help=f"ONNX opset; {DEFAULT_OPSET} by default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples parity is judged on, at most.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Threads for judging; large networks gain from more.")] = 1,
) -> None:
    """Export a few-shot or video network as its two graphs, and judge both together against the PyTorch original.

    Exit status 1 when parity fails, 2 when the input cannot be used.
    """
    request = SplitRequest(
        model=options.chosen_model(checkpoint, model),
        checkpoint=checkpoint,
        layout=layout,
        size=parse_size(size) if size else None,
        fp16=fp16,
        int8=int8,
        calibration=calibration,
        references=references,
        combination=combination,
        images=images,
        sample_count=samples,
        opset=opset,
        threads=threads,
    )
    with progress_bars() as progress:
        record = split_network(request, output, progress=progress)
    CONSOLE.print(_graphs(record))
    for note in record["notes"]:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
    CONSOLE.print(f"record: {output / RECORD}", highlight=False, markup=False)
    conclude({f"{record['model']}, {name}": parity for name, parity in record["parity"].items()}, {})


def _graphs(record: Mapping[str, Any]) -> Table:
    """Return the files as a table, with the verdict of the chains that each is part of."""
    table = Table(title=f"{record['model']}: two graphs", title_justify="left")
    for column in ("graph", "file", "size", "both graphs"):
        table.add_column(column, justify="right" if column == "size" else "left", no_wrap=True)
    for entry in record["graphs"]:
        passed = entry["verdict"] == "PASS"
        verdict = "[green]PASS[/]" if passed else "[bold red]FAIL[/]"
        table.add_row(entry["graph"], entry["file"], decimal(entry["bytes"]), verdict)
    return table
