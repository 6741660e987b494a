"""The error along the network, drawn."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from edgeattn.foundation import atomic_path
from edgeattn.validation.divergence.records import Divergence

_FLOOR = 1e-9
"""What a logarithmic axis shows of zero."""


def write_plot(divergence: Divergence, path: Path) -> Path:
    """Draw total, inherited and local error and the limit of every point; the suffix decides the format.

    Raises:
        UserError: the folder cannot be written.
    """
    points = divergence.points
    figure = Figure(figsize=(max(8.0, 0.16 * len(points)), 5.0), layout="constrained")
    axes = figure.subplots()
    places = range(len(points))
    ceiling = max([1.0, *(value for point in points for value in (point.total, point.local) if math.isfinite(value))])

    def shown(value: float) -> float:
        return min(max(value, _FLOOR), 10 * ceiling) if not math.isnan(value) else 10 * ceiling

    axes.plot(places, [shown(point.total) for point in points], label="total", color="tab:blue")
    axes.plot(places, [shown(point.inherited) for point in points], label="inherited", color="tab:blue", linestyle=":")
    axes.plot(places, [shown(point.local) for point in points], "o", label="local", color="tab:green", markersize=3)
    axes.step(places, [shown(point.limit) for point in points], label="explained", color="tab:gray", where="mid")
    culprits = [(place, point) for place, point in enumerate(points) if point.diverges]
    if culprits:
        heights = [shown(point.local) for _, point in culprits]
        axes.plot([place for place, _ in culprits], heights, "X", label="diverges", color="tab:red", markersize=8)
        axes.axvline(culprits[0][0], color="tab:red", linewidth=0.8)
        axes.annotate(culprits[0][1].label, (culprits[0][0], heights[0]), color="tab:red", rotation=20)
    axes.set_yscale("log")
    axes.set_ylabel("relative L2")
    axes.set_title(f"{divergence.candidate} against {divergence.reference}")
    axes.set_xticks(list(places), [point.label for point in points], rotation=90, fontsize=6)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."))
    return path
