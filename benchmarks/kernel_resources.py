"""What every plugin kernel takes of every GPU: registers, shared memory, stack, spills, resident programs.

`python benchmarks/kernel_resources.py` compiles all kernels at the sizes of published models for all CUDA
architectures, data types and layouts (no GPU is needed), and writes benchmarks/results/kernel_resources.json and .md.
The figures are what the assembler reports; nothing is run. Exit status 1 when a kernel has problems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from edgeattn.foundation import write_text
from edgeattn.plugins_trt.compiler import Compiled, cache_folder, compile_variants
from edgeattn.plugins_trt.resources import problems, resident_programs
from edgeattn.plugins_trt.selection import all_destinations, preset_operations, variants
from edgeattn.plugins_trt.spec import ELEMENT_BYTES

RESULTS = Path(__file__).parent / "results"
FIGURES = ("warps", "registers", "shared", "stack", "spill_stores", "spill_loads")


def measure(elements: Sequence[str], jobs: int | None) -> tuple[list[dict[str, Any]], str]:
    """Compile everything.

    Args:
        elements: data types.
        jobs: processes at a time.

    Returns:
        A record for every kernel, and the version of Triton.
    """
    wanted = all_destinations()
    listed = variants(preset_operations(), tuple(wanted), elements)
    with Progress("kernels", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bars:
        task = bars.add_task("kernels")
        compiled, tools = compile_variants(
            listed,
            {sm: destination.ptx_isa for sm, destination in wanted.items()},
            jobs=jobs,
            cache=cache_folder(),
            progress=lambda _, done, total: bars.update(task, completed=done, total=total),
        )
    return [_record(result, wanted[result.kernel.sm].shared_memory) for result in compiled], tools.triton


def _record(result: Compiled, shared_limit: int) -> dict[str, Any]:
    kernel = result.kernel
    return {
        "kernel": f"{kernel.operation}.{kernel.launch}",
        "element": kernel.element,
        "layout": kernel.layout,
        "static": dict(kernel.static),
        "sm": kernel.sm,
        "ptx_isa": kernel.ptx_isa,
        **{name: getattr(kernel, name) for name in FIGURES},
        "shared_limit": shared_limit,
        "resident_programs": resident_programs(kernel),
        "problems": problems(kernel, shared_limit),
    }


def markdown(records: Sequence[dict[str, Any]], triton: str) -> str:
    """Return the records as a table with a row per kernel, type and layout, and a column per architecture."""
    sms = sorted({record["sm"] for record in records})
    rows: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for record in records:
        sizes = " ".join(f"{name}={value}" for name, value in record["static"].items())
        rows.setdefault((record["kernel"], sizes, record["element"], record["layout"]), {})[record["sm"]] = record
    lines = [
        "Resources of every plugin kernel (`python benchmarks/kernel_resources.py`), as the assembler reports them: "
        f"compiled by Triton {triton}, not run.",
        "",
        "Cells: registers per thread / dynamic shared memory in KiB / programs that one SM holds as far as these two "
        "decide; then, where there are any, bytes spilled (stored + loaded) and bytes of stack, per thread.",
        "",
        f"Kernels with problems: {sum(bool(record['problems']) for record in records)} of {len(records)}.",
        "",
        "| " + " | ".join(["kernel", "sizes", "type", "layout", "warps", *(f"sm_{sm}" for sm in sms)]) + " |",
        "| " + " | ".join(["---"] * (5 + len(sms))) + " |",
    ]
    for key, cells in rows.items():
        warps = ", ".join(dict.fromkeys(str(record["warps"]) for record in cells.values()))
        lines.append("| " + " | ".join([*key, warps, *(_cell(cells[sm]) for sm in sms)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(record: dict[str, Any]) -> str:
    text = f"{record['registers']} / {record['shared'] / 1024:.3g} / {record['resident_programs']}"
    if spills := record["spill_stores"] + record["spill_loads"]:
        text += f", {spills} spilled"
    if record["stack"]:
        text += f", {record['stack']} stack"
    return f"**{text}**" if record["problems"] else text


def main() -> None:
    """Compile, write both files, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--element", action="append", choices=list(ELEMENT_BYTES), help="data type; all by default")
    parser.add_argument("--jobs", type=int, help="processes at a time; one for each CPU by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files")
    arguments = parser.parse_args()
    records, triton = measure(arguments.element or tuple(ELEMENT_BYTES), arguments.jobs)
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    content = f'{{\n "triton": {json.dumps(triton)},\n "kernels": [\n{lines}\n ]\n}}\n'
    write_text(arguments.output / "kernel_resources.json", content)
    write_text(arguments.output / "kernel_resources.md", markdown(records, triton))
    console = Console()
    for record in records:
        for sentence in record["problems"]:
            place = f"{record['kernel']} ({record['element']}, {record['layout']}) on sm_{record['sm']}"
            console.print(f"PROBLEM {place}: {sentence}", highlight=False, soft_wrap=True)
    found = sum(bool(record["problems"]) for record in records)
    console.print(f"{len(records)} kernels, {found} with problems: {arguments.output / 'kernel_resources.md'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
