"""`edgeattn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli.console import CONSOLE, conclude, parse_size, progress_bars
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.deploy.pipeline import PLUGIN_HOSTS, ExportRequest, ExportRun
from edgeattn.export.calibration_methods import DEFAULT_METHOD, METHODS
from edgeattn.foundation import UserError
from edgeattn.models.inspection import guess_model


def export(
    checkpoint: Annotated[str, typer.Argument(help=f"Trained weights (.safetensors, .pth), or '{BUNDLED}'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")],
    model: Annotated[
        str | None, typer.Option(help="Model declaration; see `edgeattn list models`. Guessed from a file's tensors.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input; the model's own by default.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Batch, height and width may vary.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write FP16 forms.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also write INT8 forms (INT8 layers, FP16 rest).")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Images or .npz that INT8 is calibrated on; bundled training images by default.")
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(help=f"How INT8 ranges are chosen: {', '.join(method.name for method in METHODS)}.")
    ] = DEFAULT_METHOD,
    calibration_cache: Annotated[
        Path | None, typer.Option(help="Folder where runs share calibration results, by data and graph.")
    ] = None,
    int8_attention: Annotated[
        bool, typer.Option("--int8-attention", help="Attention products in INT8 too; needs --int8.")
    ] = False,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also write forms with plugin nodes.")] = False,
    plugin_host: Annotated[
        str, typer.Option(help=f"{' or '.join(PLUGIN_HOSTS)}; python, for TensorRT 10.15+, adds a node per launch.")
    ] = PLUGIN_HOSTS[0],
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
    if model is None:
        if checkpoint == BUNDLED:
            raise UserError(f"'{BUNDLED}' is the weights of many models. Choose one with --model.")
        guess = guess_model(checkpoint)
        model = guess.model
        CONSOLE.print(f"model: {model}, certain: all {guess.expected} tensors fit, and no other is in the file")
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        size=parse_size(size) if size else None,
        dynamic=dynamic,
        fp16=fp16,
        int8=int8,
        calibration=calibration,
        calibration_method=calibration_method,
        calibration_cache=calibration_cache,
        int8_attention=int8_attention,
        plugins=plugins,
        plugin_host=plugin_host,
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
