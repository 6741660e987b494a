"""`edgeattn check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

from edgeattn.cli.console import CONSOLE
from edgeattn.export.support import (
    ACCEPTED,
    Finding,
    Severity,
    SupportReport,
    check_support,
    parse_version,
    version_text,
)
from edgeattn.foundation import UserError, write_text
from edgeattn.targets import TARGETS

_STYLE = {ACCEPTED: "green", Severity.ADVICE.value: "dim", Severity.ATTENTION.value: "yellow"}
_STYLE[Severity.REJECTED.value] = "bold red"


def check(
    onnx_file: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="ONNX model, with or without external data.")],
    target: Annotated[str | None, typer.Option(help="Deployment target; see `edgeattn list targets`.")] = None,
    tensorrt: Annotated[str | None, typer.Option(help="TensorRT version instead of a target, such as 10.10.")] = None,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Edgeattn's plugins are not loaded there.")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="NAMESPACE::NAME of another plugin that is loaded there; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
    every_node: Annotated[bool, typer.Option("--all", help="List every node, and advice too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on what needs attention, too.")] = False,
) -> None:
    """Say for every node whether the target's TensorRT takes it, and what to do where not. Needs no TensorRT.

    Exit status 1 when the model is rejected, 2 when the input cannot be used.
    """
    chosen = TARGETS.get(target) if target else None
    if (chosen is None) == (tensorrt is None):
        raise UserError(
            "the check needs either a target or a TensorRT version. Write --target NAME or --tensorrt 10.3."
        )
    report = check_support(
        onnx_file,
        chosen.tensorrt if chosen else parse_version(tensorrt or ""),
        target=chosen.name if chosen else "",
        dla_cores=(chosen.dla_cores or 0) if chosen else 0,
        own_plugins=not no_plugins,
        plugins=plugin or (),
    )
    text = json.dumps(report.as_dict(), indent=1)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        typer.echo(text)
    else:
        CONSOLE.print(_page(report, every_node=every_node))
    if not report.passes(strict=strict):
        raise typer.Exit(1)


def _page(report: SupportReport, *, every_node: bool) -> Group:
    """Return the tables: problems first, then every node if asked for, then one line of counts."""
    parts: list[Table | str] = []
    shown = report.findings if every_node else report.problems
    if shown:
        parts.append(_problems(shown))
    if every_node:
        parts.append(_nodes(report))
    return Group(*parts, *_summary(report))


def _problems(findings: tuple[Finding, ...]) -> Table:
    table = Table("verdict", Column("where", overflow="fold"), "what, and what to do", show_lines=True)
    for finding in findings:
        where = [finding.subject or "the model", finding.operator, finding.module and f"module {finding.module}"]
        what = [
            f"{finding.title}: {finding.detail}.",
            f"[bold]Do:[/] {escape(finding.remedy)}",
            f"[dim]{finding.rule}; TensorRT: {finding.versions}; {finding.mark.value}[/]",
        ]
        what[0] = escape(what[0])
        verdict = finding.severity.value
        place = escape("\n".join(line for line in where if line))
        table.add_row(f"[{_STYLE[verdict]}]{verdict}[/]", place, "\n".join(what))
    return table


def _nodes(report: SupportReport) -> Table:
    table = Table("verdict", Column("node", overflow="fold"), "operator", "module", "runs")
    for node in report.nodes:
        verdict = f"[{_STYLE[node.verdict]}]{node.verdict}[/]"
        table.add_row(verdict, escape(node.name), escape(node.operator), escape(node.module), escape(node.runs))
    return table


def _summary(report: SupportReport) -> list[str]:
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items() if count)
    place = f"{report.target} (TensorRT {version_text(report.tensorrt)})"
    place = place if report.target else f"TensorRT {version_text(report.tensorrt)}"
    verdict = f"[{_STYLE[report.verdict]}]{report.verdict}[/]"
    lines = [f"{escape(report.model)} for {place}: {verdict}; nodes: {counts or 'none'}"]
    advice = sum(finding.severity == Severity.ADVICE for finding in report.findings)
    if advice:
        lines.append(f"[dim]{advice} pieces of advice; --all lists them.[/]")
    if report.unverified:
        lines.append("[dim]Nobody has read or run this version's parser; it is taken to be as 11.1.[/]")
    return lines
