"""`edgeattn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli.console import CONSOLE, conclude, parse_size, progress_bars
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.deploy.pipeline import ExportRequest, ExportRun


def export(
    checkpoint: Annotated[str, typer.Argument(help=f"Trained weights (.safetensors, .pth), or '{BUNDLED}'.")],
    model: Annotated[str, typer.Option(help="Model declaration; see `edgeattn list models`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input; the model's own by default.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Batch, height and width may vary.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write FP16 forms.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write INT8 forms (INT8 convolutions, FP16 rest).")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Images or .npz that INT8 is calibrated on; bundled training images by default.")
    ] = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also write forms with plugin nodes.")] = False,
    target: Annotated[str | None, typer.Option(help="Deployment target; see `edgeattn list targets`.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the target's by default.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that parity is judged on; held-out samples by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples parity is judged on, at most.")] = 200,
    extra_size: Annotated[
        list[str] | None, typer.Option(help="Further HEIGHTxWIDTH at which dynamic forms are judged; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for judging; large networks gain from more.")] = 1,
) -> None:
    """Export a trained checkpoint, judge every ONNX form against the PyTorch original, and write the evidence.

    Exit status 1 when a form fails parity, 2 when the input cannot be used.
    """
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        size=parse_size(size) if size else None,
        dynamic=dynamic,
        fp16=fp16,
        int8=int8,
        calibration=calibration,
        plugins=plugins,
        target=target,
        opset=opset,
        images=images,
        sample_count=samples,
        extra_sizes=tuple(parse_size(text) for text in extra_size or ()),
        threads=threads,
    )
    with progress_bars() as progress:
        run = ExportRun(request, output, progress)
        record = run.run()
    if run.directory.skipped:
        CONSOLE.print(f"unchanged, not repeated: {', '.join(run.directory.skipped)}", style="dim")
    for stage, notes in run.notes.items():
        for note in notes:
            CONSOLE.print(f"note on {stage}: {note}", highlight=False)
    conclude({model: record}, {model: output})
