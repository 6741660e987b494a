"""Section of a page: the error along the network, and the first module that its inputs do not explain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.validation.report_charts import CurveChart, Mark, Scale, curve, dot, spread
from edgeattn.validation.report_page import Section, magnitudes, number, section

LISTED = 8
"""Modules in the table below the chart: those whose own error is largest beside what explains it."""

_CURVES = (
    ("total", "a", "total error"),
    ("inherited", "a dotted", "inherited from the inputs"),
)
_POINTS = (("limit", "d point", "explained by rounding"), ("local", "b point", "local: on the same inputs"))
"""Zero, which exact operations make and allow, has no place on a logarithmic axis."""


def divergence_section(record: Mapping[str, Any], anchor: str = "divergence") -> Section:
    """Return the section of a search for the first divergence.

    Args:
        record: content of a `divergence.json`.
        anchor: id of the heading.
    """
    points = record["points"]
    listed = sorted(points, key=_excess, reverse=True)[:LISTED]
    title = f"Error along the network: {record['candidate']}"
    return section("divergence.html.j2", anchor, title, record=record, chart=_chart(record, points), listed=listed)


def _chart(record: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> CurveChart | None:
    """Return the chart; None where nothing was compared."""
    if not points:
        return None
    across = Scale(0.0, max(len(points) - 1.0, 1.0), logarithmic=False)
    up = Scale.decades(magnitudes(point[what] for point in points for what in ("total", "local", "limit")))

    def place(index: int, value: object) -> tuple[float, float]:
        found = number(value)
        return across.at(index), round(100 - up.at(math.inf if found is None else found), 2)

    marks = [
        curve(kind, [place(index, point[what]) for index, point in enumerate(points)]) for what, kind, _ in _CURVES
    ]
    marks += [
        dot(kind, *place(index, point[what]))
        for what, kind, _ in _POINTS
        for index, point in enumerate(points)
        if number(point[what]) != 0
    ]
    culprits = [index for index, point in enumerate(points) if point["diverges"]]
    marks += [dot("alarm", *place(index, points[index]["local"])) for index in culprits]
    if culprits:
        marks.append(Mark("limit", f"M{across.at(culprits[0])} 0V100"))
    legend = [(kind, text) for _, kind, text in (*_CURVES, *_POINTS)]
    return CurveChart(
        title=record["verdict"],
        horizontal=f"{len(points)} tensors in the order of computation",
        vertical="relative L2",
        across=spread(_beginnings(points, across)),
        up=up,
        marks=tuple(marks),
        legend=tuple(legend + ([("alarm", "diverges")] if culprits else [])),
    )


def _beginnings(points: Sequence[Mapping[str, Any]], across: Scale) -> list[tuple[float, str]]:
    """Return where each outermost module begins."""
    names = [str(point["module"]).partition(".")[0] for point in points]
    return [
        (across.at(index), name)
        for index, name in enumerate(names)
        if name and (index == 0 or names[index - 1] != name)
    ]


def _excess(point: Mapping[str, Any]) -> float:
    """Order points: those that cannot be compared first, then by how much of the limit the local error takes."""
    local, limit = number(point["local"]), number(point["limit"])
    if point["failure"] is not None or local is None or limit is None:
        return math.inf
    return local / limit if limit else (math.inf if local else 0.0)
