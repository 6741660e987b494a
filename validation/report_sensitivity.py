"""Section of a page: what each module costs in accuracy when it alone gets a lower precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeattn.validation.report_charts import Row, RowChart, Scale, bar
from edgeattn.validation.report_page import Section, decimal, number, section

SHOWN = 40
"""Modules in the chart, the most harmful ones."""


def sensitivity_section(record: Mapping[str, Any]) -> Section:
    """Return the section of an analysis.

    Args:
        record: content of a `sensitivity.PRECISION.json`.
    """
    modules = record["modules"][:SHOWN]
    scale = Scale.linear(_noise(entry["alone"]) for entry in modules)
    chart = RowChart(
        axis="noise of the output when this module alone is lowered, % of the signal",
        scale=scale,
        rows=tuple(
            Row(
                entry["module"],
                _note(entry, record["everything"]),
                (bar("a bar", scale, 0, _noise(entry["alone"])),),
                alarm=entry["alone"]["failure"] is not None,
            )
            for entry in modules
        ),
    )
    precision = record["precision"]
    return section(
        "sensitivity.html.j2",
        f"sensitivity-{precision}",
        f"Sensitivity to {precision.upper()}",
        record=record,
        chart=chart,
        rest=len(record["modules"]) - len(modules),
    )


def _noise(effect: Mapping[str, Any]) -> float:
    """Return the noise in percent of the signal; 100 where the form did not run or all is noise."""
    ratio = number(effect["snr"])
    return 100.0 if ratio is None or ratio < 0 else 100 * 10 ** (-ratio / 20)


def _note(entry: Mapping[str, Any], everything: Mapping[str, Any]) -> str:
    if entry["alone"]["failure"] is not None:
        return str(entry["alone"]["failure"])
    whole, rest = number(everything["loss"]), number(entry["without"]["loss"])
    saved = None if whole is None or rest is None else whole - rest
    return (
        f"{_noise(entry['alone']):.2g} %; alone {decimal(entry['alone']['loss'])} lost, without {decimal(saved)} saved"
    )
