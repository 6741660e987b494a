"""`edgeattn rewrite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgeattn.cli.console import CONSOLE
from edgeattn.deploy.files import rewrite_file


def rewrite(
    model: Annotated[Path, typer.Argument(help="ONNX model that any exporter wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the rewritten model goes.")],
    strip: Annotated[
        bool, typer.Option("--strip-bodies", help="Without function bodies, as TensorRT up to 10.6 needs.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the verification inputs.")] = 0,
) -> None:
    """Replace the attention cores in an ONNX model by plugin nodes, each verified numerically first.

    Exit status 1 when no core was replaced.
    """
    result = rewrite_file(model, output, strip=strip, seed=seed)
    table = Table("core", "operation", "outcome")
    for replacement in result.accepted:
        outcome = f"[green]replaced[/], relative L2 {replacement.difference:.1e} on random inputs"
        table.add_row(replacement.module or replacement.node, replacement.operation, outcome)
    for refusal in result.refused:
        table.add_row(refusal.module or refusal.node, "", f"refused: {refusal.reason}")
    CONSOLE.print(table)
    CONSOLE.print(f"{len(result.accepted)} replaced, {len(result.refused)} refused; written to {output}")
    if not result.accepted:
        raise typer.Exit(1)
