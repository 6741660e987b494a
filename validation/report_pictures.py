"""The pictures of a report: inputs, and labels before and after the export."""

from __future__ import annotations

import base64
import colorsys
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from edgeattn.validation.records import Picture
from edgeattn.validation.report_page import template_environment

PICTURE_SIDE = 192
"""Longest side of a picture in pixels; keeps six samples of a two-frame model with six forms under 2 MB."""

_AGREES, _DIFFERS = (232, 232, 232), (214, 24, 31)
_BACKGROUND = (38, 42, 51)

# All that is shown in it is escaped or encoded, so the first end is its own.
_SECTION = re.compile(r'<section id="pictures">.*?</section>', re.DOTALL)


def pictures_section(pictures: Sequence[Picture], classes: Sequence[str]) -> Markup:
    """Return the part of a page that shows samples.

    Args:
        pictures: the samples.
        classes: class names by label.
    """
    colours = palette(len(classes))
    body = (
        template_environment()
        .get_template("pictures.html.j2")
        .render(
            pictures=[_shown(picture, classes, colours) for picture in pictures],
            legend=list(zip(classes, colours, strict=True)) if any(map(_has_masks, pictures)) else [],
        )
    )
    return Markup(body)


def pictures_of_page(page: str) -> Markup | None:
    """Return that part of a page that this release wrote; None where it has none."""
    found = _SECTION.search(page)
    return Markup(found[0]) if found else None


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour (0..255) per class: a dark one for class 0, then hues as far apart as possible."""
    # Steps of the golden ratio keep neighbouring labels apart in hue however many there are.
    hues = ((0.58 + index * 0.618034) % 1.0 for index in range(classes - 1))
    tones = ((0.62, 0.95), (0.85, 0.75))
    vivid = (colorsys.hsv_to_rgb(hue, *tones[index % 2]) for index, hue in enumerate(hues))
    return [_BACKGROUND, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in vivid)][:classes]


def _has_masks(picture: Picture) -> bool:
    """Say whether a sample's labels are those of its pixels, not of the image as a whole."""
    return int(picture.original[0].size) > 1


def _shown(picture: Picture, classes: Sequence[str], colours: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Return what the page shows of a sample: one panel for each labelled image of it."""
    return list(_panels(picture, colours)) if _has_masks(picture) else [_caption(picture, classes)]


def _caption(picture: Picture, classes: Sequence[str]) -> dict[str, Any]:
    """Return the images of a sample that has one label, as data URIs, with the label's name by everyone."""
    original = int(picture.original.item())
    return {
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
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
