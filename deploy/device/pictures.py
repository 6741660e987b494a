"""What `run` labels: the pictures of image files, folders and videos, one at a time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import DeviceError

VIDEOS = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm"))
"""Endings of the files that `ffmpeg` takes apart."""


@dataclass(frozen=True)
class Picture:
    """One image, or one frame of a video.

    Attributes:
        name: the file's own name without its ending; frames have a number from 1 after it.
        pixels: RGB (H, W, 3) uint8.
    """

    name: str
    pixels: np.ndarray


def pictures(sources: Sequence[Path], size: tuple[int, ...]) -> Iterator[Picture]:
    """Yield all pictures in order, resized to (height, width) = `size`; one is in memory at a time.

    Args:
        sources: image files, videos, or folders of them.
        size: of the network's input.

    Raises:
        DeviceError: a file does not exist, two have the same name (both before the first picture), or one cannot be
            read.
    """
    files = list(_files(sources))
    stems = [file.stem for file in files]
    if repeated := sorted(stem for stem in stems if stems.count(stem) > 1):
        raise DeviceError(f"two images are called {repeated[0]!r}, and one mask would replace the other. Rename one.")
    for file in files:
        if file.suffix.lower() in VIDEOS:
            for number, frame in enumerate(read_video(file), start=1):
                yield Picture(f"{file.stem}_{number:06}", resized(frame, size, file))
        else:
            yield Picture(file.stem, read_image(file, size))


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    for path in sources:
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
            image = np.asarray(pillow(f"read {path}").open(path).convert("RGB"))
    except (OSError, ValueError) as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(
            f"{path} is no image that can be read: {error}. Give .ppm, .npy or, with Pillow, others."
        ) from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DeviceError(f"{path} is {image.dtype} of shape {image.shape}, not uint8 (H, W, 3). Convert it.")
    return resized(image, size, path)


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, RGB (H, W, 3) uint8, as `ffmpeg` decodes them.

    Raises:
        DeviceError: ffmpeg is missing or cannot read the file to its end.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise DeviceError(f"ffmpeg is needed to read {path}. `sudo apt install ffmpeg` installs it.")
    # Each frame arrives as a PPM image, which says its own size; -xerror makes damage an error rather than a gap.
    command = (program, "-nostdin", "-v", "error", "-xerror", "-i", str(path), "-f", "image2pipe", "-c:v", "ppm", "-")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while (frame := _next_ppm(process.stdout)) is not None:
                yield frame
            complaint = process.stderr.read().decode(errors="replace").split("\n")
            status = process.wait()
        finally:
            process.kill()
        if status != 0 or complaint[0]:
            raise DeviceError(f"ffmpeg cannot read {path}: {complaint[0] or f'status {status}'}. Check the file.")


def _next_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """Return the next image of a pipe; None at its end."""
    header = [stream.readline() for _ in range(3)]
    if not header[0]:
        return None
    width, height = map(int, header[1].split())
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        return None  # ffmpeg stopped within a frame, and says why
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def resized(image: np.ndarray, size: tuple[int, ...], path: Path) -> np.ndarray:
    """Return an image (H, W, 3) uint8 at (height, width) = `size`, bilinear.

    Raises:
        DeviceError: the size differs and Pillow is not there.
    """
    if image.shape[:2] == size:
        return image
    library = pillow(f"resize {path} from {image.shape[0]}x{image.shape[1]} to {size[0]}x{size[1]}")
    return np.asarray(library.fromarray(image).resize((size[1], size[0]), library.Resampling.BILINEAR))


def pillow(purpose: str) -> Any:
    """Return the module PIL.Image.

    Raises:
        DeviceError: it is not installed; the message says what for it is needed.
    """
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
