"""The pictures of a report: inputs, and labels before and after; kept beside the page to be drawn again."""

from __future__ import annotations

import base64
import colorsys
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeattn.foundation import UserError, atomic_path
from edgeattn.validation.records import Picture

PICTURES = "pictures.npz"
"""Name of the file that keeps them."""

PICTURE_SIDE = 192
"""Longest side of a picture in pixels; keeps six samples of a two-frame model with six forms under 2 MB."""

_AGREES, _DIFFERS = (232, 232, 232), (214, 24, 31)
_BACKGROUND = (38, 42, 51)


def write_pictures(pictures: Sequence[Picture], path: Path) -> Path:
    """Keep images and labels in full, atomically, and return the path.

    Raises:
        UserError: the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    entries = []
    for index, picture in enumerate(pictures):
        entries.append(
            {"images": len(picture.images), "forms": list(picture.forms), "target": picture.target is not None}
        )
        arrays |= {f"{index}/image/{place}": image for place, image in enumerate(picture.images)}
        arrays[f"{index}/original"] = _small(picture.original)
        if picture.target is not None:
            arrays[f"{index}/target"] = _small(picture.target)
        arrays |= {f"{index}/form/{place}": _small(labels) for place, labels in enumerate(picture.forms.values())}
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, index=np.array(json.dumps(entries)), **arrays)
    return path


def read_pictures(path: Path) -> tuple[Picture, ...]:
    """Return the pictures that were kept; none where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return ()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return tuple(
                Picture(
                    tuple(arrays[f"{index}/image/{place}"] for place in range(entry["images"])),
                    arrays[f"{index}/target"] if entry["target"] else None,
                    arrays[f"{index}/original"],
                    {name: arrays[f"{index}/form/{place}"] for place, name in enumerate(entry["forms"])},
                )
                for index, entry in enumerate(json.loads(str(arrays["index"])))
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}). Remove it, or run `edgeattn export` again.") from error


def _small(labels: np.ndarray) -> np.ndarray:
    """Return labels in the smallest type that holds them."""
    return labels.astype(np.min_scalar_type(int(labels.max(initial=0))))


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour (0..255) per class: a dark one for class 0, then hues as far apart as possible."""
    # Steps of the golden ratio keep neighbouring labels apart in hue however many there are.
    hues = ((0.58 + index * 0.618034) % 1.0 for index in range(classes - 1))
    tones = ((0.62, 0.95), (0.85, 0.75))
    vivid = (colorsys.hsv_to_rgb(hue, *tones[index % 2]) for index, hue in enumerate(hues))
    return [_BACKGROUND, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in vivid)][:classes]


def has_masks(picture: Picture) -> bool:
    """Say whether a sample's labels are those of its pixels, not of the image as a whole."""
    return int(picture.original[0].size) > 1


def shown(picture: Picture, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the page shows of a sample: one panel for each labelled image of it."""
    if has_masks(picture):
        return list(_panels(picture, palette(len(classes))))
    return [_caption(picture, classes)]


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
