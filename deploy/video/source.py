"""The frames of a video file or of a folder, one in memory at a time, as often as they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.pictures import VIDEOS, read_video
from edgeattn.deploy.masks import image_paths, read_at_own_size
from edgeattn.foundation import UserError


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        index: its place in the video, from 0.
        name: what its mask is called: the name of its file, or that of the video and a number from 1.
        pixels: RGB (height, width, 3) uint8, at its own size.
    """

    index: int
    name: str
    pixels: np.ndarray


class Video:
    """A video file, which `ffmpeg` takes apart, or a folder of images in the order of their names.

    A file is decoded anew by every loop over it, and once before, to count its frames: what its header says of them is
    often wrong.

    Args:
        path: the file or folder.

    Raises:
        UserError: it is neither, or a folder without images or with two of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: list[Path] | None = None
        if path.is_dir():
            self._images = image_paths([path])
        elif not path.is_file():
            raise UserError(f"the video {path} does not exist. Give a video file, or a folder of frames.")
        elif path.suffix.lower() not in VIDEOS:
            raise UserError(
                f"{path} does not end in {', '.join(sorted(VIDEOS))}. Give a video file, or a folder of frames."
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        if self._images is not None:
            yield from self._images_at(range(len(self._images)))
        else:
            for index, pixels in enumerate(self._decoded()):
                yield Frame(index, f"{self.path.stem}_{index + 1:06}", pixels)

    def chosen(self, indices: Collection[int]) -> Iterator[Frame]:
        """Yield the frames of some indices, in the order of the video; no image besides is read."""
        if self._images is not None:
            yield from self._images_at(sorted(indices))
            return
        left = set(indices)
        for frame in self:
            if frame.index in left:
                left.remove(frame.index)
                yield frame
            if not left:
                return

    @functools.cached_property
    def _count(self) -> int:
        if self._images is not None:
            return len(self._images)
        count = sum(1 for _ in self._decoded())
        if not count:
            raise UserError(f"the video {self.path} holds no frame. Give another one.")
        return count

    def _images_at(self, indices: Iterable[int]) -> Iterator[Frame]:
        for index in indices:
            path = (self._images or [])[index]
            yield Frame(index, path.stem, read_at_own_size(path))

    def _decoded(self) -> Iterator[np.ndarray]:
        try:
            yield from read_video(self.path)
        except DeviceError as error:
            raise UserError(str(error)) from error
