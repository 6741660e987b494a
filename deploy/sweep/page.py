"""The comparison page: one HTML file that needs no network, readable on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgeattn.deploy.sweep.plots import pareto_plots
from edgeattn.deploy.sweep.table import Row
from edgeattn.foundation import write_text

PAGE = "sweep.html"


def write_page(title: str, rows: Sequence[Row], facts: Mapping[str, Any], folder: Path) -> Path:
    """Write the page.

    Args:
        title: its heading.
        rows: the results.
        facts: what was run, by name.
        folder: where it goes.

    Raises:
        UserError: the folder cannot be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "points": points, "mebibytes": mebibytes}
    source = resources.files("edgeattn.deploy.sweep").joinpath("templates/sweep.html.j2").read_text(encoding="utf-8")
    plots = pareto_plots(rows)
    page = environment.from_string(source).render(
        title=title,
        rows=rows,
        plots=[(plot.title, Markup(plot.svg), plot.front) for plot in plots],
        front={number for plot in plots for number in plot.front},
        measured=any(row.measured for row in rows),
        facts=facts,
    )
    return write_text(folder / PAGE, page)


def figure(value: float | None, form: str, unit: str = "") -> str:
    """Return a number with its unit, or a dash where there is none."""
    return "–" if value is None else f"{value:{form}}{unit}"


def points(value: float | None) -> str:
    """Return an accuracy of 0 to 1 in points."""
    return "–" if value is None else f"{100 * value:.2f}"


def mebibytes(value: int | None) -> str:
    """Return a size in MiB."""
    return "–" if value is None else f"{value / 2**20:,.2f} MiB"
