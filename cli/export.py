"""`edgeattn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, conclude, parse_size, progress_bars
from edgeattn.deploy.pipeline import PLUGIN_HOSTS, ExportRequest, ExportRun
from edgeattn.export.calibration_methods import DEFAULT_METHOD
from edgeattn.models.deployable import POSTPROCESSES
from edgeattn.validation.tolerance import UserLimits


def export(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")],
    model: options.Model = None,
    layout: options.Layout = None,
    size: options.Size = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Batch, height and width may vary.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also write FP16 forms.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Also write BF16 forms.")] = False,
    fp16_exclude: Annotated[
        list[str] | None,
        typer.Option(help="Module path, operator type or node that stays FP32 beside FP16 or BF16; repeatable."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also write INT8 forms (INT8 layers, FP16 rest).")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Images or .npz for INT8 and for ranges; bundled training images by default."),
    ] = None,
    calibration_method: options.CalibrationMethod = DEFAULT_METHOD,
    calibration_cache: options.CalibrationCache = None,
    int8_exclude: Annotated[
        list[str] | None,
        typer.Option(help="Module path, operator type or node that stays in floating point; repeatable."),
    ] = None,
    int8_attention: Annotated[
        bool, typer.Option("--int8-attention", help="Attention products in INT8 too; needs --int8.")
    ] = False,
    with_preprocess: Annotated[
        bool,
        typer.Option(
            "--with-preprocess", help="The graph takes RGB uint8 images (batch, H, W, 3) and normalises them."
        ),
    ] = False,
    with_postprocess: Annotated[
        str | None, typer.Option(help=f"The graph gives {' or '.join(POSTPROCESSES)} at the input's size.")
    ] = None,
    plugins: Annotated[bool, typer.Option("--plugins", help="Also write forms with plugin nodes.")] = False,
    plugin_host: Annotated[
        str, typer.Option(help=f"{' or '.join(PLUGIN_HOSTS)}; python, for TensorRT 10.15+, adds a node per launch.")
    ] = PLUGIN_HOSTS[0],
    target: Annotated[str | None, typer.Option(help="Deployment target; see `edgeattn list targets`.")] = None,
    opset: options.Opset = None,
    images: Annotated[
        Path | None, typer.Option(help="Images that parity is judged on; held-out samples by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples parity is judged on, at most.")] = 200,
    extra_size: Annotated[
        list[str] | None, typer.Option(help="Further HEIGHTxWIDTH at which dynamic forms are judged; repeatable.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for judging; large networks gain from more.")] = 1,
    atol: Annotated[
        list[str] | None,
        typer.Option(help="Largest absolute difference, NAME:NUMBER or NUMBER, in place of the derived limit."),
    ] = None,
    rtol: Annotated[
        list[str] | None,
        typer.Option(help="Largest relative L2 of an image, NAME:NUMBER or NUMBER, in place of the derived limit."),
    ] = None,
) -> None:
    """Export a trained checkpoint, judge every ONNX form against the PyTorch original, and write the evidence.

    Exit status 1 when a form fails parity, 2 when the input cannot be used.
    """
    if model is None:
        guess = options.guessed_model(checkpoint)
        model = guess.model
        CONSOLE.print(
            f"model: {model}, certain: all {guess.expected} tensors of its layout {guess.layout} fit, and no other is "
            "in the file"
        )
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        layout=layout,
        size=parse_size(size) if size else None,
        dynamic=dynamic,
        fp16=fp16,
        bf16=bf16,
        fp16_exclude=tuple(fp16_exclude or ()),
        int8=int8,
        int8_exclude=tuple(int8_exclude or ()),
        calibration=calibration,
        calibration_method=calibration_method,
        calibration_cache=calibration_cache,
        int8_attention=int8_attention,
        preprocess=with_preprocess,
        postprocess=with_postprocess,
        plugins=plugins,
        plugin_host=plugin_host,
        target=target,
        opset=opset,
        images=images,
        sample_count=samples,
        extra_sizes=tuple(parse_size(text) for text in extra_size or ()),
        threads=threads,
        limits=UserLimits.parse(rtol or (), atol or ()),
    )
    with progress_bars() as progress:
        run = ExportRun(request, output, progress)
        CONSOLE.print(f"weights: layout {run.loaded.layout}, {run.loaded.report.summary()}")
        record = run.run()
    if run.directory.skipped:
        CONSOLE.print(f"unchanged, not repeated: {', '.join(run.directory.skipped)}", style="dim")
    for stage, notes in run.notes.items():
        for note in notes:
            CONSOLE.print(f"note on {stage}: {note}", highlight=False)
    conclude({model: record}, {model: output})
