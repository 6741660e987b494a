"""`edgeattn inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgeattn.cli.console import CONSOLE
from edgeattn.models.inspection import Inspection, inspect_checkpoint

_LISTED = 5
"""Networks that the table shows, unless more fit with certainty."""


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Trained weights (.safetensors, .pth).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print what a checkpoint holds: container, the network it fits, attention blocks, what would be exported."""
    found = inspect_checkpoint(checkpoint)
    if as_json:
        CONSOLE.print_json(data=found.as_dict())
        return
    CONSOLE.print(_facts(found))
    if found.guesses:
        CONSOLE.print(_guesses(found))
    if found.blocks:
        CONSOLE.print(_blocks(found))
    CONSOLE.print(f"export would make {found.export()}.", markup=False, highlight=False)


def _facts(found: Inspection) -> Table:
    table = Table(show_header=False)
    table.add_row("file", found.path)
    table.add_row("container", f"{found.container}, {found.file_bytes / 2**20:.1f} MiB")
    types = ", ".join(f"{count} {name}" for name, count in found.types.items())
    table.add_row("tensors", f"{found.tensors} ({types})")
    table.add_row("parameters", f"{found.parameters:,}")
    return table


def _guesses(found: Inspection) -> Table:
    shown = max(_LISTED, len(found.certain))
    table = Table("network", "layout", "sure", "its tensors found", "others")
    for guess in found.guesses[:shown]:
        sure = "certain" if guess.certainty == 1 else f"{guess.certainty:.1%}"
        table.add_row(guess.model, guess.layout, sure, f"{guess.matched} of {guess.expected}", str(guess.unexpected))
    if (rest := len(found.guesses) - shown) > 0:
        table.caption = f"{rest} further networks share fewer tensors with it"
    return table


def _blocks(found: Inspection) -> Table:
    table = Table("block at", "fits", "parameters")
    for block in found.blocks:
        prefix = block.prefix.encode("unicode_escape").decode() or "(the whole checkpoint)"
        table.add_row(prefix, ", ".join(block.candidates), f"{block.parameters:,}")
    return table
