"""The report: one HTML file that needs no network, readable on a phone."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from edgeattn.foundation import write_text
from edgeattn.validation.metrics import HISTOGRAM_EDGES, METRICS
from edgeattn.validation.records import Parity, Picture

PICTURE_SIDE = 192
"""Longest side of a picture in pixels; keeps six samples of a two-frame model with six forms under 2 MB."""

_AGREES, _DIFFERS = (232, 232, 232), (214, 24, 31)
_BACKGROUND = (38, 42, 51)


def write_report(parity: Parity, path: str | Path, *, manifest: Mapping[str, Any]) -> Path:
    """Write the report as one self-contained HTML file, atomically.

    Args:
        parity: what was measured.
        path: the file to write.
        manifest: facts of the run by name, such as versions, hashes, target and checkpoint; mappings may nest.

    Returns:
        The path.

    Raises:
        UserError: the folder cannot be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"scientific": _scientific, "percent": _percent, "points": _points, "megabytes": _megabytes}
    source = resources.files("edgeattn.validation").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    colours = palette(len(parity.classes))
    occurring = _occurring(parity)
    page = environment.from_string(source).render(
        parity=parity,
        status=parity.status,
        outputs=_output_names(parity),
        histograms=[(name, _histogram(parity, name)) for name in _output_names(parity)],
        pictures=[
            list(_panels(picture, colours) if _has_masks(picture) else _captions(picture, parity.classes))
            for picture in parity.pictures
        ],
        legend=list(zip(parity.classes, colours, strict=True)) if any(map(_has_masks, parity.pictures)) else [],
        metric=METRICS[parity.original.metric],
        occurring=occurring,
        absent=len(parity.classes) - len(occurring),
        derivations=_derivations(parity),
        facts=[*_flat({"computed with": parity.environment}), *_flat(manifest)],
    )
    return write_text(path, page)


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour (0..255) per class: a dark one for class 0, then hues as far apart as possible."""
    # Steps of the golden ratio keep neighbouring labels apart in hue however many there are.
    hues = ((0.58 + index * 0.618034) % 1.0 for index in range(classes - 1))
    tones = ((0.62, 0.95), (0.85, 0.75))
    vivid = (colorsys.hsv_to_rgb(hue, *tones[index % 2]) for index, hue in enumerate(hues))
    return [_BACKGROUND, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in vivid)][:classes]


def _output_names(parity: Parity) -> list[str]:
    """Return the names of all outputs that some form was compared on, in order."""
    return list(dict.fromkeys(name for entry in parity.forms for name in entry.outputs))


def _derivations(parity: Parity) -> list[tuple[str, Any]]:
    """Return each distinct tolerance with the forms that it judges."""
    groups: dict[Any, list[str]] = {}
    for entry in parity.forms:
        groups.setdefault(entry.tolerance, []).append(entry.form.name)
    return [(", ".join(names), limits) for limits, names in groups.items()]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings and lists with dotted names."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _occurring(parity: Parity) -> list[int]:
    """Return the labels of the classes that the truth or some form holds."""
    scores = np.array([parity.original.by_class, *(entry.score.by_class for entry in parity.forms)])
    return [int(label) for label in np.flatnonzero(~np.isnan(scores).all(axis=0))]


def _has_masks(picture: Picture) -> bool:
    """Say whether a sample's labels are those of its pixels, not of the image as a whole."""
    return int(picture.original[0].size) > 1


def _captions(picture: Picture, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the images of a sample that has one label, as data URIs, with the label's name by everyone."""
    original = int(picture.original.item())
    yield {
        "masks": False,
        "inputs": [_photo(image) for image in picture.images],
        "target": None if picture.target is None else classes[int(picture.target.item())],
        "original": classes[original],
        "forms": [
            {"name": name, "label": classes[int(labels.item())], "differs": int(labels.item()) != original}
            for name, labels in picture.forms.items()
        ],
    }


def _panels(picture: Picture, colours: list[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """Yield, for each labelled image of a sample, its pictures as data URIs."""
    maps = len(picture.original)
    for index in range(maps):
        images = picture.images[index : index + 1] if maps == len(picture.images) else picture.images
        original = picture.original[index]
        yield {
            "masks": True,
            "inputs": [_photo(image) for image in images],
            "target": None if picture.target is None else _mask(picture.target[index], colours),
            "original": _mask(original, colours),
            "forms": [
                {
                    "name": name,
                    "mask": _mask(labels[index], colours),
                    "difference": _difference(original, labels[index]),
                    "differing": int(np.count_nonzero(original != labels[index])),
                    "pixels": original.size,
                }
                for name, labels in picture.forms.items()
            ],
        }


def _photo(image: np.ndarray) -> str:
    return _data_uri(Image.fromarray(image), Image.Resampling.BILINEAR)


def _mask(labels: np.ndarray, colours: list[tuple[int, int, int]]) -> str:
    return _data_uri(Image.fromarray(np.asarray(colours, np.uint8)[labels]), Image.Resampling.NEAREST)


def _difference(original: np.ndarray, labels: np.ndarray) -> str:
    """Return a picture that is red where two label maps differ."""
    return _mask((original != labels).astype(np.intp), [_AGREES, _DIFFERS])


def _data_uri(image: Image.Image, resampling: Image.Resampling) -> str:
    """Return a PNG data URI of an image, its longest side reduced to `PICTURE_SIDE`."""
    scale = min(1.0, PICTURE_SIDE / max(image.size))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return _uri(stream)


def _uri(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _histogram(parity: Parity, output: str) -> str:
    """Draw the error histograms of all forms for one output; returns a PNG data URI."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    precisions = list(dict.fromkeys(entry.form.precision for entry in parity.forms))
    for entry in parity.forms:
        if (error := entry.outputs.get(output)) is None:
            continue
        share = np.asarray(error.histogram) / max(error.compared, 1)
        # Forms with and without plugin nodes often coincide: a thick pale line below a dashed one shows both.
        style = {"linestyle": "--"} if entry.form.plugin else {"linewidth": 3.0, "alpha": 0.5}
        colour = f"C{precisions.index(entry.form.precision)}"
        axes.stairs(share, HISTOGRAM_EDGES, color=colour, label=entry.form.name, **style)
    axes.set(xlabel="log10 of the absolute error", ylabel="share of values", yscale="log", xlim=_span(parity, output))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return _uri(stream)


def _span(parity: Parity, output: str) -> tuple[float, float]:
    """Return the range of the histogram bins that any form fills."""
    counts = sum(np.asarray(entry.outputs[output].histogram) for entry in parity.forms if output in entry.outputs)
    filled = np.flatnonzero(counts)
    if not filled.size:
        return float(HISTOGRAM_EDGES[0]), float(HISTOGRAM_EDGES[-1])
    return float(HISTOGRAM_EDGES[filled[0]]), float(HISTOGRAM_EDGES[filled[-1] + 1])


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3%}"


def _points(value: float | None) -> str:
    """Return a fraction 0..1 in points of 100."""
    return "–" if value is None or np.isnan(value) else f"{100 * value:.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
