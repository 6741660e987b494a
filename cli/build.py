"""`edgeattn build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgeattn.cli.console import CONSOLE, ERRORS, progress_bars
from edgeattn.export.engine import (
    AGREES,
    BuildCancelled,
    BuildRequest,
    BuildResult,
    Configuration,
    PrecisionOptions,
    ProfileOptions,
    build_engine,
    print_line,
    profiles_of,
)
from edgeattn.targets import TARGETS

LOCAL = "local"
"""Stands for this machine, wherever a target is asked for."""

CANCELLED = 130
"""Exit status after Ctrl-C, as shells have it."""


def build(
    model: Annotated[Path, typer.Argument(help="ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write.")],
    target: Annotated[str, typer.Option(help=f"Deployment target, or '{LOCAL}' for this machine.")] = LOCAL,
    fp16: Annotated[bool, typer.Option("--fp16", help="Convert the graph to FP16 first.")] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantise the graph's layers first; the rest FP32, or FP16 with --fp16."),
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help=".npz of preprocessed inputs that INT8 needs.")] = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="Range NAME=MIN:OPT:MAX of a dynamic axis, for all inputs; repeatable.")
    ] = None,
    min_shapes: Annotated[
        list[str] | None, typer.Option(help="Smallest shapes, image:1x3x64x64,...; repeatable, one for each profile.")
    ] = None,
    opt_shapes: Annotated[list[str] | None, typer.Option(help="Usual shapes, likewise.")] = None,
    max_shapes: Annotated[list[str] | None, typer.Option(help="Largest shapes, likewise.")] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="C++ plugin library, or folder of kernels for Python plugins; repeatable.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="Scratch memory in MiB, at most.")] = None,
    builder_level: Annotated[int | None, typer.Option(help="Effort from 0 to 5; TensorRT's default is 3.")] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for later TensorRT versions of the same major.")
    ] = False,
    hardware_compatible: Annotated[
        str | None, typer.Option(help="Also for other GPUs: ampere-plus or same-compute-capability.")
    ] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be exchanged later.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let FP32 products round their inputs to TF32.")] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Folder of timing caches; ~/.cache/edgeattn/timing.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even when the engine is up to date.")] = False,
    print_trtexec: Annotated[
        bool, typer.Option("--print-trtexec", help="Build nothing; print the trtexec line for the target's version.")
    ] = False,
) -> None:
    """Build a TensorRT engine in exactly the precision of the graph, on the machine it is for.

    Exit status 1 when the engine's types are not those of the graph, 2 when it cannot be built here.
    """
    options = ProfileOptions(
        tuple(min_shapes or ()), tuple(opt_shapes or ()), tuple(max_shapes or ()), axes=tuple(axis or ())
    )
    request = BuildRequest(
        model=model,
        output=output,
        target=None if target == LOCAL else TARGETS.get(target),
        configuration=Configuration(
            profiles=profiles_of(model, options),
            plugins=tuple(plugin or ()),
            workspace_mib=workspace,
            builder_level=builder_level,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            refit=refit,
            tf32=tf32,
        ),
        precision=PrecisionOptions(fp16, int8, calibration),
        timing_cache=timing_cache,
        force=force,
    )
    if print_trtexec:
        line, notes = print_line(request)
        _print_notes(notes)
        CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    try:
        with progress_bars() as progress:
            result = build_engine(request, progress)
    except BuildCancelled:
        ERRORS.print("cancelled; the engine is as it was, and what was measured is kept for the next build")
        raise typer.Exit(CANCELLED) from None
    _conclude(result)


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        ERRORS.print(f"note: {note}", markup=False, highlight=False)


def _conclude(result: BuildResult) -> None:
    """Print what was built and how its types compare with the graph's."""
    record = result.record
    for reason in result.reasons:
        CONSOLE.print(f"built, because {reason}", markup=False, highlight=False)
    if not result.reasons:
        CONSOLE.print(f"{result.engine} is up to date", markup=False, highlight=False)
    _print_notes(tuple(record["notes"]))
    table = Table("engine", "TensorRT", "GPU", "TF32", "tensors of its layers")
    tensors = ", ".join(f"{count} {name}" for name, count in record["precision"]["tensors"].items())
    key = record["key"]
    gpu = f"{record['gpu']} (sm_{key['SM']})"
    table.add_row(str(result.engine), key["TensorRT"], gpu, "on" if record["tf32"] else "off", tensors)
    CONSOLE.print(table)
    check = record["precision"]
    if check["verdict"] == AGREES:
        CONSOLE.print(f"types agree with the graph: {check['compared']} tensors compared, {check['unread']} unreadable")
        return
    for difference in check["differences"]:
        ERRORS.print(f"FAIL: {difference}", markup=False, highlight=False)
    for name in check["unseen"]:
        ERRORS.print(f"FAIL: the graph has tensors of type {name}, but the engine shows none", markup=False)
    if not check["compared"]:
        ERRORS.print("FAIL: no tensor of the engine could be compared with the graph")
    raise typer.Exit(1)
