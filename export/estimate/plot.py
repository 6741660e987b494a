"""The roofline plot: every layer's rate over its arithmetic intensity, under the target's peaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgeattn.export.estimate.result import Estimate, LayerEstimate
from edgeattn.foundation import UserError, atomic_path

SUFFIXES = (".png", ".svg", ".pdf")

_COLOURS = ("#1f77b4", "#d9822b", "#2f9e63", "#8a63d2", "#c0392b", "#7f7f7f", "#17becf", "#bcbd22")


def roofline_plot(estimate: Estimate, path: Path) -> Path:
    """Draw the roofline of an estimate and write it.

    Args:
        estimate: what to draw.
        path: file to write; its suffix decides the format.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the plot {path} has no known format. Name a file that ends in {', '.join(SUFFIXES)}.")
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    layers = [layer for layer in estimate.layers if layer.flops and layer.bytes_moved]
    intensities = [layer.flops / layer.bytes_moved for layer in layers] or [1.0]
    span = np.geomspace(min(0.1, min(intensities) / 2), max(1000.0, max(intensities) * 2), 200)
    used = sorted({layer.precision for layer in estimate.layers})
    for precision, style in zip(used, ("-", "--", "-.", ":"), strict=False):
        peak = estimate.roof.tensor[precision]
        axes.plot(
            span,
            np.minimum(peak, span * estimate.roof.bandwidth) / 1e12,
            style,
            color="black",
            linewidth=1.2,
            label=f"roof {precision}: {peak / 1e12:,.3g} TFLOP/s, {estimate.roof.bandwidth / 1e9:,.4g} GB/s",
        )
    for kind, colour in zip(sorted({layer.kind for layer in layers}), _COLOURS, strict=False):
        _scatter(axes, kind, colour, [layer for layer in layers if layer.kind == kind], estimate.seconds.typical)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of GPU memory traffic")
    axes.set_ylabel("rate, TFLOP/s (bar: worst to best assumed efficiency)")
    axes.set_title(
        f"{Path(estimate.model).name} on {estimate.target}: roofline, estimated, not measured\n"
        f"{1e3 * estimate.seconds.typical:.3g} ms ({1e3 * estimate.seconds.low:.3g} to "
        f"{1e3 * estimate.seconds.high:.3g} ms), {estimate.flops / 1e9:,.4g} GFLOP; area of a dot: share of the time",
        fontsize=10,
    )
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def _scatter(axes: Axes, kind: str, colour: str, layers: list[LayerEstimate], whole: float) -> None:
    """Draw the layers of one kind."""
    x = [layer.flops / layer.bytes_moved for layer in layers]
    y = [layer.flops / layer.seconds.typical / 1e12 for layer in layers]
    below = [rate - layer.flops / layer.seconds.high / 1e12 for rate, layer in zip(y, layers, strict=True)]
    above = [layer.flops / layer.seconds.low / 1e12 - rate for rate, layer in zip(y, layers, strict=True)]
    share = sum(layer.seconds.typical for layer in layers) / whole
    axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)
    axes.scatter(
        x,
        y,
        s=[12 + 900 * layer.seconds.typical / whole for layer in layers],
        color=colour,
        alpha=0.75,
        edgecolors="white",
        linewidths=0.5,
        label=f"{kind}: {share:.0%} of the time",
    )
