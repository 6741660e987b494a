"""Plots of sensitivities and of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from edgeattn.deploy.tuning.budget import Budget
from edgeattn.deploy.tuning.records import Sensitivity
from edgeattn.deploy.tuning.search import Measured, pareto
from edgeattn.foundation import atomic_path

PLOTS = (".png", ".svg")
"""Suffixes of the files that a plot is written to."""

_SHOWN = 60
"""Modules in a plot, the most harmful ones."""


def write_sensitivity(result: Sensitivity, path: Path) -> Path:
    """Draw the noise that each module adds alone, and what is lost alone and avoided without it.

    Args:
        result: the analysis.
        path: the file; its suffix decides the format.

    Raises:
        UserError: the folder cannot be written.
    """
    shown = result.modules[:_SHOWN]
    figure = Figure(figsize=(10.0, max(3.0, 1.6 + 0.19 * len(shown))), layout="constrained")
    noise, loss = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    noise.barh(places, [100 * min(1.0, 10 ** (-entry.alone.snr / 20)) for entry in shown])
    noise.set_xlabel("noise of the output with this module alone, % of the signal")
    noise.set_yticks(list(places), [entry.module for entry in shown], fontsize=7)
    noise.invert_yaxis()
    alone = [entry.alone.loss if math.isfinite(entry.alone.loss) else math.nan for entry in shown]
    gained = [result.everything.loss - entry.without.loss for entry in shown]
    loss.barh([place - 0.2 for place in places], alone, height=0.4, label="lost by it alone", color="tab:red")
    loss.barh([place + 0.2 for place in places], gained, height=0.4, label="saved without it", color="tab:green")
    loss.axvline(0, color="black", linewidth=0.6)
    loss.set_xlabel(result.metric)
    loss.legend(fontsize=7)
    rest = f", {len(shown)} of {len(result.modules)} modules" if len(shown) < len(result.modules) else ""
    figure.suptitle(f"{result.model}: modules in {result.precision.upper()}, {result.samples} samples{rest}")
    return _save(figure, path)


def write_pareto(points: Sequence[Measured], budget: Budget, target: str, path: Path) -> Path:
    """Draw cost against loss of the assignments of a search, its Pareto front and its answer.

    Args:
        points: the assignments; the last one is the answer.
        budget: what had to be kept.
        target: name of the target.
        path: the file; its suffix decides the format.

    Raises:
        UserError: the folder cannot be written.
    """
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    finite = [point for point in points if math.isfinite(point.loss)]
    axes.plot([1e3 * point.seconds for point in finite], [point.loss for point in finite], ".", label="tried")
    front = pareto(points)
    axes.step(
        [1e3 * point.seconds for point in front], [point.loss for point in front], where="post", label="Pareto front"
    )
    chosen = points[-1]
    if math.isfinite(chosen.loss):
        axes.plot([1e3 * chosen.seconds], [chosen.loss], "*", markersize=14, label="chosen")
    axes.axhline(budget.allowance, color="tab:red", linestyle="--", label=f"budget {budget.text}")
    axes.set_xlabel(f"estimated time on {target}, ms (not measured)")
    axes.set_ylabel(f"lost, {budget.measure.unit} (first half of the samples)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."))
    return path
