"""The command run: images or videos in, masks of class labels out."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Backend, Tell
from .errors import DeviceError
from .files import write_bytes
from .golden import labels_of
from .manifest import canonical
from .pictures import Picture, pictures, pillow
from .verify import open_session, typed
from .workspace import Workspace

FORMATS = ("pgm", "npy", "png")


def segment(
    workspace: Workspace,
    precision: str | None,
    backend: Backend,
    tell: Tell,
    *,
    images: Sequence[Path],
    output: Path,
    form: str = FORMATS[0],
) -> dict[str, Any]:
    """Write a mask of labels for each image; networks of several inputs take consecutive images.

    Where an image as a whole has one label, `labels.json` in place of masks says it by the image's name.

    Args:
        workspace: the checked bundle.
        precision: which engine.
        backend: what runs it.
        tell: told the names of the images.
        images: image files, videos, or folders of them: .ppm and .npy (H, W, 3) uint8, other images where Pillow is
            installed, and videos where ffmpeg is.
        output: folder of the masks, named like the images; frames of a video have their number after its name.
        form: "pgm", "npy" or "png", which needs Pillow.

    Raises:
        DeviceError: an image cannot be read, or a mask not written.
    """
    if form not in FORMATS:
        raise DeviceError(f"there is no format {form!r} of masks. Choose {', '.join(FORMATS)}.")
    name, _ = workspace.manifest.precision(precision)
    model = workspace.manifest.content["model"]
    count, size = len(model["inputs"]), tuple(model["size"])
    seconds = 0.0
    written: list[str] = []
    named: dict[str, dict[str, object]] = {}
    group: list[Picture] = []
    with open_session(workspace, name, backend) as session:
        for picture in pictures(images, size):
            group.append(picture)
            if len(group) < count:
                continue
            tell(", ".join(picture.name for picture in group))
            arrays = [preprocessed(picture.pixels, model["preprocessing"]) for picture in group]
            feed = typed(session, dict(zip(model["inputs"], arrays, strict=True)))
            begin = time.perf_counter()
            outputs = session.run(feed)
            seconds += time.perf_counter() - begin
            maps = labels_of(outputs, model["outputs"], size)[0]
            if maps.size == 1:
                label = int(maps[0, 0, 0])
                named[group[0].name] = {"label": label, "class": model["classes"][label]}
                group = []
                continue
            # One map belongs to the first image; where there are as many as images, each has its own.
            for labelled, mask in zip(group, maps):  # noqa: B905
                path = output / f"{labelled.name}.{form}"
                write_bytes(path, encoded(mask.astype(np.uint8), form))
                written.append(path.name)
            group = []
    if not written and not named:
        raise DeviceError(f"{len(group)} images are given, but the network takes {count} at a time. Give more.")
    if named:
        write_bytes(output / "labels.json", canonical(named))
    return {
        "measured": backend.measured(),
        "masks": written,
        "labels": named,
        "unused": [picture.name for picture in group],
        "classes": model["classes"],
        "seconds_in_engine": seconds,
    }


def preprocessed(image: np.ndarray, rule: Mapping[str, Any]) -> np.ndarray:
    """Turn an RGB image (H, W, 3) uint8 into a network input: itself where the graph does the rest, else normalised."""
    if rule.get("in_graph"):
        return np.ascontiguousarray(image[None])
    ordered = image if rule["colour_order"] == "RGB" else image[..., ::-1]
    mean, std = np.asarray(rule["mean"], np.float32), np.asarray(rule["std"], np.float32)
    normal = (ordered.astype(np.float32) * np.float32(rule["scale"]) - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)


def encoded(mask: np.ndarray, form: str) -> bytes:
    """Return the bytes of a file with a mask (H, W) uint8."""
    if form == "pgm":
        return f"P5\n{mask.shape[1]} {mask.shape[0]}\n255\n".encode() + mask.tobytes()
    stream = io.BytesIO()
    if form == "npy":
        np.save(stream, mask)
    else:
        pillow("write .png").fromarray(mask).save(stream, "PNG")
    return stream.getvalue()
