"""`edgeattn plugins`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgeattn.cli.console import CONSOLE, ERRORS, progress_bars
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.library_builder import build_library
from edgeattn.plugins_trt.model_operations import operations_of
from edgeattn.plugins_trt.resources import problems, resident_programs
from edgeattn.plugins_trt.selection import (
    destinations,
    pair_sms,
    parse_sizes,
    preset_operations,
    sized_operations,
    variants,
)
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS

app = typer.Typer(help="Kernels of the TensorRT plugins, compiled ahead of time.", no_args_is_help=True)


@app.command("build")
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the kernel library.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Deployment target; see `edgeattn list targets`. Repeatable.")
    ] = None,
    sm: Annotated[
        list[int] | None, typer.Option(help="CUDA architecture in place of a target, such as 87. Repeatable.")
    ] = None,
    ptx_isa: Annotated[
        list[int] | None, typer.Option(help="Newest PTX ISA of each --sm, in the same order, such as 85 for 8.5.")
    ] = None,
    model: Annotated[
        list[Path] | None, typer.Option(help="ONNX model with plugin nodes, to build what it needs. Repeatable.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Sizes to compile in, such as head_channels=64,channels=512. Repeatable."),
    ] = None,
    operation: Annotated[
        list[str] | None, typer.Option(help="Operation; see `edgeattn list plugins`. All by default. Repeatable.")
    ] = None,
    element: Annotated[
        list[str] | None,
        typer.Option(help=f"Data type: {', '.join(ELEMENT_BYTES)}. The model's, else all, by default. Repeatable."),
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help=f"Memory layout: {', '.join(LAYOUTS)}. Both by default. Repeatable.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time; one for each CPU by default.")] = None,
    allow_problems: Annotated[
        bool, typer.Option("--allow-problems", help="Write the library even if kernels spill or need too much.")
    ] = False,
) -> None:
    """Compile the kernels for deployment targets; no GPU is needed.

    Without --model and --size, the sizes are those of published models. Results are cached in ~/.cache/edgeattn, or
    where the variable EDGEATTN_CACHE says. Exit status 1 when a kernel has problems, 2 when the input cannot be used.
    """
    wanted = destinations(target or (), pair_sms(sm or (), ptx_isa or ()))
    operations = [found for path in model or () for found in operations_of(path, operation or ())]
    operations += sized_operations([parse_sizes(text) for text in size or ()], operation or ()) if size else []
    if not model and not size:
        operations = preset_operations(operation or ())
    kernels = variants(operations, tuple(wanted), element or (), layout or LAYOUTS)
    with progress_bars() as progress:
        library, found = build_library(
            output, kernels, wanted, jobs=jobs, allow_problems=allow_problems, progress=progress
        )
    for name, sentences in found.items():
        for sentence in sentences:
            ERRORS.print(f"[bold red]PROBLEM[/] {name}: {sentence}", highlight=False, soft_wrap=True)
    if found and not allow_problems:
        ERRORS.print("Nothing was written. --allow-problems writes the library all the same: spills cost time only.")
        raise typer.Exit(1)
    CONSOLE.print(f"{len(library.kernels)} kernels: {output}", highlight=False)


@app.command("report")
def report(folder: Annotated[Path, typer.Argument(help="Folder of a kernel library.")]) -> None:
    """Show what the kernels of a library take of a GPU. Exit status 1 when a kernel has problems."""
    library = KernelLibrary.load(folder)
    groups: dict[str, list[CompiledKernel]] = {}
    for kernel in library.kernels:
        sizes = " ".join(f"{name}={value}" for name, value in kernel.static.items())
        isa = f"{kernel.ptx_isa // 10}.{kernel.ptx_isa % 10}"
        group = f"sm_{kernel.sm}, PTX {isa}, {kernel.element}, {kernel.layout}, {sizes}"
        groups.setdefault(group, []).append(kernel)
    for group, kernels in groups.items():
        CONSOLE.print(group, style="bold", highlight=False)
        CONSOLE.print(_resource_table(kernels))
    CONSOLE.print(
        f"Compiled by Triton {library.triton}. Registers, stack and spills are per thread, shared memory per program; "
        "all but registers in bytes. An SM holds as many programs as stated, as far as registers and shared memory "
        "decide.",
        highlight=False,
    )
    if any(problems(kernel) for kernel in library.kernels):
        raise typer.Exit(1)


def _resource_table(kernels: Sequence[CompiledKernel]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for column in ("warps", "regs", "shared", "stack", "spills", "per SM"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel in kernels:
        spills = kernel.spill_stores + kernel.spill_loads
        table.add_row(
            f"{kernel.operation}.{kernel.launch}",
            *map(str, (kernel.warps, kernel.registers, kernel.shared, kernel.stack, spills, resident_programs(kernel))),
            style="bold red" if problems(kernel) else "",
        )
    return table
