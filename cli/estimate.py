"""`edgeattn estimate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from edgeattn.cli.console import CONSOLE, parse_size
from edgeattn.export.estimate import Band, Estimate, estimate, image_sizes
from edgeattn.export.estimate.measured import Comparison, compare_measured
from edgeattn.export.estimate.plot import SUFFIXES, roofline_plot
from edgeattn.export.estimate.sized_graph import load
from edgeattn.foundation import UserError, write_text
from edgeattn.targets import TARGETS

_SHOWN = 15


def estimate_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="ONNX model: plain, plugin form, any precision.")],
    target: Annotated[str, typer.Option(help="Deployment target; see `edgeattn list targets`.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of free axes of images.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Size of a free batch axis.")] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=1x128x64: shape of one input; repeatable.")
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="FP32 products may round their inputs to TF32.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Draw the roofline: {', '.join(SUFFIXES)}.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Result of benchmarks/gpu/run.py to compare plugin kernels with.")
    ] = None,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer and every assumption.")] = False,
) -> None:
    """Estimate time, traffic and memory of a model on a target. Nothing is run; needs no GPU and no TensorRT.

    Exit status 1 when the model does not fit the target's memory, 2 when the input cannot be used.
    """
    chosen = TARGETS.get(target)
    sizes = dict(_named_shape(text) for text in input_ or ())
    if size is not None or batch is not None:
        images = image_sizes(load(model), size=parse_size(size) if size else None, batch=batch)
        sizes = {**images, **sizes}
    found = estimate(model, chosen, input_sizes=sizes, tf32=tf32)
    comparisons = compare_measured(measured, chosen) if measured else ()
    _print(found, every_layer=every_layer)
    _print_comparisons(comparisons)
    if json_file is not None:
        record = {**found.as_dict(), "compared": [asdict(comparison) for comparison in comparisons]}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
    if output is not None:
        CONSOLE.print(f"roofline: {roofline_plot(found, output)}", markup=False, highlight=False)
    if not found.fits:
        raise typer.Exit(1)


def _named_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, separator, shape = text.rpartition("=")
    try:
        return name, tuple(int(extent) for extent in shape.split("x")) if separator else _refuse()
    except ValueError:
        raise UserError(f"--input {text!r} is not NAME=SHAPE. Write for example --input x=1x128x64.") from None


def _refuse() -> tuple[int, ...]:
    raise ValueError


def _print(found: Estimate, *, every_layer: bool) -> None:
    """Print layers, blocks, gains and totals."""
    whole = found.seconds.typical
    order = sorted(found.layers, key=lambda layer: -layer.seconds.typical)
    shown = found.layers if every_layer else tuple(order[:_SHOWN])
    words = "all layers in order" if every_layer else f"the {len(shown)} most expensive of {len(found.layers)} layers"
    layers = Table(
        Column("layer", overflow="fold"),
        "kind",
        "type",
        *(Column(name, justify="right") for name in ("MFLOP", "MB", "us (best to worst)", "share")),
        "bound",
        title=f"{escape(found.model)} on {found.target}: estimate, not measured; {words}",
        title_justify="left",
    )
    for layer in shown:
        layers.add_row(
            escape(layer.module or layer.nodes[0]),
            layer.kind,
            layer.precision,
            f"{layer.flops / 1e6:,.1f}",
            f"{layer.bytes_moved / 1e6:,.2f}",
            _band(layer.seconds, 1e6),
            f"{layer.seconds.typical / whole:.1%}",
            layer.bound,
        )
    CONSOLE.print(layers)
    blocks = Table("block", *(Column(name, justify="right") for name in ("layers", "GFLOP", "MB", "share of time")))
    for block in found.blocks[: None if every_layer else 8]:
        blocks.add_row(
            escape(block.module),
            str(block.layers),
            f"{block.flops / 1e9:,.2f}",
            f"{block.bytes_moved / 1e6:,.1f}",
            f"{block.share:.1%}",
        )
    CONSOLE.print(blocks)
    gains = Table(
        "change",
        *(Column(name, justify="right") for name in ("ms saved", "MB less moved", "MB less activations")),
        "",
    )
    for gain in found.gains:
        figures = [
            f"{1e3 * gain.seconds_saved.typical:,.3f}",
            f"{gain.bytes_saved / 1e6:,.1f}",
            f"{gain.activation_bytes_saved / 1e6:,.1f}",
        ]
        has = "in the model; " if gain.present else ""
        gains.add_row(gain.change, *(figures if gain.applies else ["", "", ""]), has + escape(gain.note))
    CONSOLE.print(gains)
    CONSOLE.print(
        f"time {_band(found.seconds, 1e3)} ms; {found.flops / 1e9:,.2f} GFLOP, {found.bytes_moved / 1e6:,.1f} MB "
        f"moved; activations {found.peak_activation_bytes / 2**20:,.1f} MiB (at least "
        f"{found.live_activation_bytes / 2**20:,.1f}), weights {found.weight_bytes / 2**20:,.1f} MiB, engine about "
        f"{found.engine_bytes / 2**20:,.1f} MiB",
        highlight=False,
    )
    verdict = "[green]fits[/]" if found.fits else "[bold red]does not fit[/]"
    CONSOLE.print(f"{verdict}: {escape(found.fit_reason)}", highlight=False)
    for note in (*found.roof.notes, *found.notes):
        CONSOLE.print(f"note: {note}", markup=False, highlight=False)
    if every_layer:
        for sentence in found.assumptions:
            CONSOLE.print(f"assumed: {sentence}", markup=False, highlight=False)
    else:
        CONSOLE.print(
            "Layers are fused after stated rules and efficiencies are assumed; --all lists them.", style="dim"
        )


def _band(band: Band, scale: float) -> str:
    return f"{scale * band.typical:,.3g} ({scale * band.low:,.3g} to {scale * band.high:,.3g})"


def _print_comparisons(comparisons: tuple[Comparison, ...]) -> None:
    if not comparisons:
        CONSOLE.print("not compared with a measurement: none was given (--measured).", style="dim")
        return
    table = Table("plugin kernel", "type", "layout", "estimated us", "measured us", "error", "in the band")
    for entry in comparisons:
        table.add_row(
            entry.workload,
            entry.element,
            entry.layout,
            _band(entry.estimated, 1e6),
            f"{1e6 * entry.measured_seconds:,.1f}",
            f"{entry.error:+.0%}",
            "yes" if entry.within_band else "no",
        )
    CONSOLE.print(table)
    CONSOLE.print(f"measured on {comparisons[0].gpu}", markup=False, highlight=False)
