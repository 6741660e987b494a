"""Accuracy against latency with Pareto fronts, as SVG that takes its ink from the page around it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgeattn.deploy.sweep.configuration import PRECISIONS
from edgeattn.deploy.sweep.table import Row

_INK = "#010203"
"""Colour that becomes the page's own ink, light or dark."""

_COLOURS = dict(zip(PRECISIONS, ("#3b82c4", "#d9822b", "#8a63d2", "#2f9e63"), strict=True))
"""Of the precisions; they show on white and on black."""

_MARKERS = {False: "o", True: "^"}


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: target, metric and where latencies come from.
        svg: the picture.
        front: numbers of the rows on the Pareto front: no other is both as fast and as accurate.
    """

    title: str
    svg: str
    front: tuple[int, ...]


def pareto_plots(rows: Sequence[Row]) -> list[Plot]:
    """Return a plot for each target and metric, of measured latencies and of estimated ones; they are never mixed."""
    return [*_plots(rows, _measured, "measured"), *_plots(rows, _estimated, "estimated, not measured")]


def pareto(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Return the points (latency, accuracy, number) that no other is at least as good as in both, fastest first."""
    front: list[tuple[float, float, int]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _measured(row: Row) -> float | None:
    return row.latency_ms if row.device_verdict == "PASS" else None


def _estimated(row: Row) -> float | None:
    return row.estimated_ms if row.parity == "PASS" else None


def _plots(rows: Sequence[Row], latency: Callable[[Row], float | None], kind: str) -> Iterator[Plot]:
    panels: dict[tuple[str, str | None, str], list[tuple[Row, float]]] = {}
    for row in rows:
        if (found := latency(row)) is not None and row.accuracy is not None:
            panels.setdefault((row.target, row.metric, _where(row, kind)), []).append((row, found))
    for (target, metric, where), members in panels.items():
        front = pareto([(found, 100 * float(row.accuracy or 0.0), row.number) for row, found in members])
        svg = _draw(members, front, f"{metric}, points", f"latency, ms ({kind})")
        yield Plot(f"{target}: {metric} and latency ({where})", svg, tuple(number for _, _, number in front))


def _where(row: Row, kind: str) -> str:
    return f"measured: {row.measured}" if kind == "measured" else kind


def _draw(
    members: Sequence[tuple[Row, float]], front: Sequence[tuple[float, float, int]], vertical: str, horizontal: str
) -> str:
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    settings: dict[Any, Any] = {
        **ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "edgeattn",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.step(
            [point[0] for point in front], [point[1] for point in front], where="post", color=_INK, alpha=0.5, lw=1
        )
        for row, latency in members:
            accuracy = 100 * float(row.accuracy or 0.0)
            axes.plot(
                [latency], [accuracy], _MARKERS[row.plugins], color=_COLOURS[row.precision], markersize=6, alpha=0.85
            )
            axes.annotate(f"{row.number}", (latency, accuracy), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set(xlabel=horizontal, ylabel=vertical)
        axes.margins(0.12)
        axes.ticklabel_format(useOffset=False)
        axes.grid(color=_INK, alpha=0.15)
        axes.legend(handles=list(_handles([row for row, _ in members])), fontsize=8, framealpha=0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _handles(rows: Sequence[Row]) -> Iterator[Line2D]:
    for precision in PRECISIONS:
        if any(row.precision == precision for row in rows):
            yield Line2D([], [], linestyle="", marker="s", color=_COLOURS[precision], label=precision)
    for plugins, label in ((False, "plain"), (True, "plugins")):
        if any(row.plugins == plugins for row in rows):
            yield Line2D(
                [], [], linestyle="", marker=_MARKERS[plugins], color=_INK, label=label, markerfacecolor="none"
            )
    yield Line2D([], [], color=_INK, alpha=0.5, linewidth=1, label="Pareto front")
