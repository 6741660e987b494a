"""`edgeattn compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli import options
from edgeattn.cli.console import conclude, progress_bars
from edgeattn.deploy.files import compare_files
from edgeattn.export.accumulation import ACCUMULATION_BLOCK
from edgeattn.validation.tolerance import UserLimits


def compare(
    checkpoint: options.Checkpoint,
    onnx_files: Annotated[list[Path], typer.Argument(help="ONNX forms of the model.")],
    model: options.Model = None,
    layout: options.Layout = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that parity is judged on; held-out samples by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples parity is judged on, at most.")] = 200,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for parity.json and report.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for judging; large networks gain from more.")] = 1,
    plugin: Annotated[list[Path] | None, typer.Option(help="Plugin library that engines need; repeatable.")] = None,
    fp16_accumulation: Annotated[
        bool,
        typer.Option(
            "--fp16-accumulation",
            help=f"FP16 sums round their running total after every {ACCUMULATION_BLOCK} terms, as tensor cores may.",
        ),
    ] = False,
    atol: Annotated[
        list[str] | None,
        typer.Option(help="Largest absolute difference, NAME:NUMBER or NUMBER, in place of the derived limit."),
    ] = None,
    rtol: Annotated[
        list[str] | None,
        typer.Option(help="Largest relative L2 of an image, NAME:NUMBER or NUMBER, in place of the derived limit."),
    ] = None,
) -> None:
    """Judge ONNX files, and engines built from them here, against the PyTorch original with the same weights.

    Exit status 1 when a file fails parity, 2 when the input cannot be used.
    """
    model = options.chosen_model(checkpoint, model)
    with progress_bars() as progress:
        record = compare_files(
            model,
            checkpoint,
            onnx_files,
            images=images,
            sample_count=samples,
            output=output,
            threads=threads,
            plugins=tuple(plugin or ()),
            layout=layout,
            accumulation=ACCUMULATION_BLOCK if fp16_accumulation else None,
            limits=UserLimits.parse(rtol or (), atol or ()),
            progress=progress,
        )
    conclude({model: record}, {model: output} if output else {})
