"""The report: one HTML file that needs no network, readable on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from edgeattn.foundation import UserError, write_text
from edgeattn.validation.metrics import METRICS
from edgeattn.validation.records import Parity
from edgeattn.validation.report_charts import CurveChart, Scale, stairs
from edgeattn.validation.report_page import Section, template_environment
from edgeattn.validation.report_pictures import palette, pictures_section

__all__ = ["palette", "render_report", "write_report"]

_COLOURS = "abcde"
"""Classes of the page's colours."""


def write_report(
    parity: Parity, path: str | Path, *, manifest: Mapping[str, Any], sections: Sequence[Section] = ()
) -> Path:
    """Write the report as one self-contained HTML file, atomically.

    Args:
        parity: what was measured.
        path: the file to write.
        manifest: facts of the run by name, such as versions, hashes, target and checkpoint; mappings may nest.
        sections: what else the page shows.

    Returns:
        The path.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = pictures_section(parity.pictures, parity.classes)
    return write_text(path, render_report(parity.as_dict(), pictures, manifest=manifest, sections=sections))


def render_report(
    record: Mapping[str, Any],
    pictures: Markup | None,
    *,
    manifest: Mapping[str, Any],
    sections: Sequence[Section] = (),
) -> str:
    """Return the page of a comparison.

    Args:
        record: what was measured, as `Parity.as_dict` and `parity.json` have it.
        pictures: the part that shows samples, see `edgeattn.validation.report_pictures`; None where there is none.
        manifest: facts of the run by name.
        sections: what else the page shows.

    Raises:
        UserError: the record is not of this release.
    """
    try:
        occurring = _occurring(record)
        return (
            template_environment()
            .get_template("report.html.j2")
            .render(
                parity=record,
                sections=sections,
                outputs=_output_names(record),
                histograms=[(name, _histogram(record, name)) for name in _output_names(record)],
                pictures=pictures or "",
                metric=METRICS[record["original"]["metric"]],
                occurring=occurring,
                absent=len(record["classes"]) - len(occurring),
                derivations=_derivations(record),
                problems=_problems(record),
                facts=[*_flat({"computed with": record["environment"]}), *_flat(manifest)],
            )
        )
    except (KeyError, TypeError, ValueError, IndexError, jinja2.UndefinedError) as error:
        raise UserError(
            f"the comparison is not recorded as this release does it ({error}). Run `edgeattn export` again."
        ) from error


def _output_names(record: Mapping[str, Any]) -> list[str]:
    """Return the names of all outputs that some form was compared on, in order."""
    return list(dict.fromkeys(name for entry in record["forms"] for name in entry["outputs"]))


def _derivations(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return each distinct tolerance with the forms that it judges."""
    groups: list[tuple[list[str], Any]] = []
    for entry in record["forms"]:
        names = next((names for names, limits in groups if limits == entry["tolerance"]), None)
        if names is None:
            groups.append(([entry["form"]["name"]], entry["tolerance"]))
        else:
            names.append(entry["form"]["name"])
    return [(", ".join(names), limits) for names, limits in groups]


def _problems(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what TensorRT's parser does not take as it is, with the file's name, rejections first."""
    return [
        (report["model"], finding)
        for severity in ("rejected", "needs attention")
        for report in record["support"]
        for finding in report["findings"]
        if finding["severity"] == severity
    ]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings and lists with dotted names."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _occurring(record: Mapping[str, Any]) -> list[int]:
    """Return the labels of the classes that the truth or some form holds."""
    scores = np.array(
        [record["original"]["by_class"], *(entry["score"]["by_class"] for entry in record["forms"])], np.float64
    )
    return [int(label) for label in np.flatnonzero(~np.isnan(scores).all(axis=0))]


def _histogram(record: Mapping[str, Any], output: str) -> CurveChart:
    """Return the error histograms of all forms for one output."""
    edges = np.asarray(record["histogram_log10_edges"], np.float64)
    shares = {
        index: np.asarray(entry["outputs"][output]["histogram"]) / max(entry["outputs"][output]["compared"], 1)
        for index, entry in enumerate(record["forms"])
        if output in entry["outputs"]
    }
    filled = np.flatnonzero(sum(shares.values()))
    first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, len(edges) - 1)
    across = Scale.decades(10.0 ** edges[first : last + 1])
    up = Scale.decades(value for share in shares.values() for value in share)
    precisions = list(dict.fromkeys(entry["form"]["precision"] for entry in record["forms"]))
    marks, legend = [], []
    for index, share in shares.items():
        form = record["forms"][index]["form"]
        # Forms with and without plugin nodes often coincide: a thick pale line below a dashed one shows both.
        style = "dashed" if form["plugin"] else "pale"
        kind = f"{_COLOURS[precisions.index(form['precision']) % len(_COLOURS)]} {style}"
        steps = [
            (across.at(10.0 ** edges[place]), 100 - up.at(share[place]) if share[place] else 100.0)
            for place in range(first, last)
        ]
        marks.append(stairs(kind, steps, across.at(10.0 ** edges[last])))
        legend.append((kind, form["name"]))
    return CurveChart(
        title=f"Histogram of the absolute errors of {output}",
        horizontal="absolute error",
        vertical="share of values",
        across=across.ticks,
        up=up,
        marks=tuple(marks),
        legend=tuple(legend),
    )
