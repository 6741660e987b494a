"""The command run: images in, masks of class labels out."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Backend, Tell
from .errors import DeviceError
from .files import write_bytes
from .golden import labels_of
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

    Args:
        workspace: the checked bundle.
        precision: which engine.
        backend: what runs it.
        tell: told the name of each image.
        images: image files, or folders of them: .ppm and .npy (H, W, 3) uint8, and others where Pillow is installed.
        output: folder of the masks, named like the images.
        form: "pgm", "npy" or "png", which needs Pillow.

    Raises:
        DeviceError: an image cannot be read, or a mask not written.
    """
    if form not in FORMATS:
        raise DeviceError(f"there is no format {form!r} of masks. Choose {', '.join(FORMATS)}.")
    name, _ = workspace.manifest.precision(precision)
    model = workspace.manifest.content["model"]
    files = list(_files(images))
    if repeated := {file.stem for file in files if [other.stem for other in files].count(file.stem) > 1}:
        raise DeviceError(f"two images are called {min(repeated)!r}, and one mask would replace the other. Rename one.")
    count, size = len(model["inputs"]), tuple(model["size"])
    if len(files) < count:
        raise DeviceError(f"{len(files)} images are given, but the network takes {count} at a time. Give more.")
    seconds = 0.0
    written = []
    with open_session(workspace, name, backend) as session:
        for start in range(0, len(files) - count + 1, count):
            group = files[start : start + count]
            tell(", ".join(file.name for file in group))
            arrays = [preprocessed(read_image(file, size), model["preprocessing"]) for file in group]
            feed = typed(session, dict(zip(model["inputs"], arrays, strict=True)))
            begin = time.perf_counter()
            outputs = session.run(feed)
            seconds += time.perf_counter() - begin
            maps = labels_of(outputs, model["outputs"], size)[0].astype(np.uint8)
            # One map belongs to the first image; where there are as many as images, each has its own.
            for file, mask in zip(group, maps):  # noqa: B905
                path = output / f"{file.stem}.{form}"
                write_bytes(path, encoded(mask, form))
                written.append(path.name)
    unused = [file.name for file in files[len(files) - len(files) % count :]] if len(files) % count else []
    return {
        "measured": backend.measured(),
        "masks": written,
        "unused": unused,
        "classes": model["classes"],
        "seconds_in_engine": seconds,
    }


def _files(images: Sequence[Path]) -> Iterator[Path]:
    for path in images:
        if path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        elif path.is_file():
            yield path
        else:
            raise DeviceError(f"the image {path} does not exist. Check the path.")


def read_image(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """Return an RGB image (H, W, 3) uint8 of a size.

    Raises:
        DeviceError: the file is no such image, or has another size and Pillow is not there to resize it.
    """
    image: np.ndarray
    try:
        if path.suffix == ".npy":
            image = np.load(path, allow_pickle=False)
        elif path.suffix == ".ppm":
            image = _ppm(path.read_bytes())
        else:
            image = np.asarray(_pillow(f"read {path}").open(path).convert("RGB"))
    except (OSError, ValueError) as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(
            f"{path} is no image that can be read: {error}. Give .ppm, .npy or, with Pillow, others."
        ) from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DeviceError(f"{path} is {image.dtype} of shape {image.shape}, not uint8 (H, W, 3). Convert it.")
    if image.shape[:2] == size:
        return image
    pillow = _pillow(f"resize {path} from {image.shape[0]}x{image.shape[1]} to {size[0]}x{size[1]}")
    return np.asarray(pillow.fromarray(image).resize((size[1], size[0]), pillow.Resampling.BILINEAR))


def _pillow(purpose: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DeviceError(f"Pillow is needed to {purpose}. `sudo apt install python3-pil` installs it.") from error
    return Image


def _ppm(data: bytes) -> np.ndarray:
    """Return the pixels of a binary PPM file without comments."""
    magic, width, height, peak, pixels = data.split(maxsplit=4) if data[:2] == b"P6" else (b"",) * 5
    start = len(data) - int(width or 0) * int(height or 0) * 3
    if magic != b"P6" or int(peak) != 255 or start < len(data) - len(pixels) - 1:
        raise ValueError("it is no binary PPM with 255 levels and without comments")
    return np.frombuffer(data, np.uint8, offset=start).reshape(int(height), int(width), 3)


def preprocessed(image: np.ndarray, rule: Mapping[str, Any]) -> np.ndarray:
    """Turn an RGB image (H, W, 3) uint8 into a float32 array (1, 3, H, W) as the network was trained on."""
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
        _pillow("write .png").fromarray(mask).save(stream, "PNG")
    return stream.getvalue()
