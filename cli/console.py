"""What the sub-commands share on the terminal: consoles, progress bars, tables, size strings."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgeattn.foundation import UserError

if TYPE_CHECKING:
    from edgeattn.deploy.pipeline import Progress as ProgressCallback

CONSOLE = Console()
ERRORS = Console(stderr=True)


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) from a string such as "128x160".

    Raises:
        UserError: another form, or a size below 16 or above 16384 pixels.
    """
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip())
    if not match:
        raise UserError(f"the size {text!r} is not HEIGHTxWIDTH. Write for example --size 128x160.")
    height, width = int(match[1]), int(match[2])
    if not (16 <= height <= 16384 and 16 <= width <= 16384):
        raise UserError(
            f"the size {text!r} is outside 16 to 16384 pixels a side. Choose the size the network will see."
        )
    return height, width


@contextlib.contextmanager
def progress_bars(prefix: str = "") -> Iterator[ProgressCallback]:
    """Show one bar per stage while the block runs, and yield the function that moves them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, transient=False) as bars:
        tasks = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"{prefix}{stage}", total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield move


def parity_table(name: str, record: Mapping[str, Any]) -> Table:
    """Return the verdicts of a comparison, the content of a `parity.json`, as a table with a row per form."""
    table = Table(title=f"{name}: parity with PyTorch (CPU)", title_justify="left")
    for column in ("form", "relative L2", "max abs", "labels", record["original"]["metric"], "change", "verdict"):
        table.add_column(column, justify="left" if column in ("form", "verdict") else "right", no_wrap=True)
    table.add_row("PyTorch", "", "", "", _number(record["original"]["value"], ".4f"), "", "", style="dim")
    for entry in record["forms"]:
        errors = entry["outputs"].values()
        drop = entry["task_drop"]
        table.add_row(
            entry["form"]["name"],
            _number(max((error["worst_relative_l2"] for error in errors), key=_size, default=None), ".1e"),
            _number(max((error["max_abs"] for error in errors), key=_size, default=None), ".1e"),
            _number(entry["label_agreement"], ".3%"),
            _number(entry["score"]["value"], ".4f"),
            _number(None if drop is None else 0.0 - 100 * drop, "+.2f"),
            "[green]PASS[/]" if entry["verdict"] == "PASS" else "[bold red]FAIL[/]",
        )
    return table


def _size(value: float | str | None) -> float:
    """Order numbers as a record holds them; what is unknown counts as largest."""
    return math.inf if value is None else float(value)


def _number(value: float | str | None, form: str) -> str:
    return "?" if value is None else format(float(value), form)


def print_failures(name: str, record: Mapping[str, Any]) -> None:
    """Print why forms and sizes failed, if any did."""
    for entry in record["forms"]:
        for reason in entry["reasons"]:
            ERRORS.print(f"[bold red]FAIL[/] {name}, {entry['form']['name']}: {reason}")
    for check in record["sizes"]:
        for reason in check["reasons"]:
            height, width = check["size"]
            ERRORS.print(f"[bold red]FAIL[/] {name}, {check['form']} at {height}x{width}: {reason}")


def print_support(name: str, record: Mapping[str, Any]) -> None:
    """Print what the target's TensorRT does not take as it is, if anything."""
    for report in record["support"]:
        for finding in report["findings"]:
            if finding["severity"] != "advice":
                subject = f"{name}, {report['model']}, {finding['subject'] or 'the model'}"
                ERRORS.print(
                    f"{finding['severity']} by TensorRT {report['tensorrt']}: {subject}: {finding['detail']} "
                    f"{finding['remedy']}",
                    markup=False,
                    highlight=False,
                )


def conclude(records: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
    """Print table, report path and failures of each comparison.

    Args:
        records: contents of `parity.json` by name.
        folders: where the reports are, by the same names; none for comparisons that wrote none.

    Raises:
        typer.Exit: with status 1, when one of them failed or a target's TensorRT rejects a form.
    """
    for name, record in records.items():
        CONSOLE.print(parity_table(name, record))
        if name in folders:
            CONSOLE.print(f"report: {folders[name] / 'report.html'}")
        print_failures(name, record)
        print_support(name, record)
    rejected = any(report["verdict"] == "rejected" for record in records.values() for report in record["support"])
    if rejected or any(record["verdict"] != "PASS" for record in records.values()):
        raise typer.Exit(1)
