"""Calibration data for INT8: real samples from a .npz file, a folder of images or a Python iterable."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from edgeattn.foundation import UserError

Batch = dict[str, np.ndarray]
"""One float32 array (batch, channels, height, width) for each input, by name."""

Shapes = Mapping[str, tuple[int | None, ...]]
"""Shape of each input by name; None where the size is free."""

Types = Mapping[str, np.dtype]
"""Element type of each input that is not float32, such as a mask, by name."""

Preprocess = Callable[[np.ndarray], np.ndarray]
"""From an RGB image (H, W, 3) uint8 to a network input (1, 3, H, W) float32."""

MINIMUM = 8
"""Fewest samples that are accepted by default: what the options of `to_int8` were measured with."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Files of a folder that are read; all others are ignored."""


class CalibrationSamples:
    """A stream of checked batches, read anew by every loop over it, that knows its length and fingerprint at the end.

    Only one batch is in memory at a time (and, for .npz files, the file's arrays).

    Args:
        read: starts reading from the beginning.
        inputs: names and shapes that every batch must have.
        origin: where the samples come from, for messages.
        minimum: fewest samples that are accepted.
        repeatable: the source can be read more than once.
        types: element types of the inputs that are not float32.

    Attributes:
        origin: as given.
        repeatable: as given.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Batch]],
        inputs: Shapes,
        origin: str,
        minimum: int,
        *,
        repeatable: bool = True,
        types: Types | None = None,
    ) -> None:
        self.origin = origin
        self.repeatable = repeatable
        self._read = read
        self._inputs = dict(inputs)
        self._minimum = minimum
        self._types = types or {}
        self._finished: tuple[int, str, frozenset[bytes]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch with exactly the declared inputs.

        Raises:
            UserError: an array is missing, has another type or shape, or is not finite; or there are too few samples.
        """
        digest, count, singles = hashlib.sha256(), 0, set()
        for batch in self._read():
            checked = {name: self._checked(batch, name) for name in self._inputs}
            sizes = {array.shape[0] for name, array in checked.items() if self._inputs[name][:1] == (None,)}
            if not sizes:  # every size is the model's own; some inputs may not have a batch axis
                sizes = {(*next(iter(checked.values())).shape, 1)[0]}
            if len(sizes) != 1:
                raise UserError(
                    f"the calibration samples from {self.origin} give {sorted(sizes)} samples for different inputs. "
                    "Give as many for every input."
                )
            count += sizes.pop()
            for name, array in sorted(checked.items()):
                digest.update(f"{name}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
            singles |= sample_digests(checked)
            yield checked
        require_minimum(count, self._minimum, self.origin)
        self._finished = (count, digest.hexdigest(), frozenset(singles))

    @property
    def count(self) -> int:
        """Number of samples (not batches). Reads the source through where no loop has done so yet."""
        return self._result()[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and numbers of all samples in order, for the manifest. May read the source."""
        return self._result()[1]

    def shared_with(self, batches: Iterable[Mapping[str, np.ndarray]]) -> int:
        """Return how many samples of other data, such as evaluation data, are among these. May read the source."""
        known = self._result()[2]
        return sum(len(sample_digests(batch) & known) for batch in batches)

    def _checked(self, batch: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return _checked(batch, name, self._inputs[name], self._types.get(name, np.dtype(np.float32)), self.origin)

    def _result(self) -> tuple[int, str, frozenset[bytes]]:
        if self._finished is None:
            for _ in self:
                pass
        assert self._finished is not None
        return self._finished


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return name and shape of every graph input that is not an initializer; None where the size is dynamic."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        info.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim
        )
        for info in model.graph.input
        if info.name not in constants
    }


def input_types(model: onnx.ModelProto) -> dict[str, np.dtype]:
    """Return name and element type of every graph input that is not float32."""
    types = {
        info.name: onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type) for info in model.graph.input
    }
    return {name: kind for name, kind in types.items() if kind != np.float32}


def calibration_samples(
    source: str | Path | Iterable[Mapping[str, np.ndarray]],
    *,
    inputs: Shapes,
    types: Types | None = None,
    size: tuple[int, int] | None = None,
    preprocess: Preprocess | None = None,
    minimum: int = MINIMUM,
    limit: int | None = None,
) -> CalibrationSamples:
    """Open a source of calibration samples. They are never invented: too few is an error.

    Args:
        source: a .npz file with one float32 array (N, channels, height, width) for each input, by input name, already
            preprocessed; or a folder, whose images in the order of their names are resized (bilinear), preprocessed and
            dealt to the inputs in turn, so that K inputs take K consecutive images; or an iterable of batches by input
            name, read as a stream.
        inputs: names and shapes of the network's inputs, see `input_shapes`.
        types: element types of the inputs that are not float32, see `input_types`.
        size: (height, width) in pixels that images are resized to; needed for folders.
        preprocess: from an RGB image to a network input; needed for folders.
        minimum: fewest samples that are accepted.
        limit: use at most this many samples, the first ones.

    Returns:
        The samples, in batches of the inputs' static batch size, or one by one.

    Raises:
        UserError: the source does not exist, is unreadable or holds too little. What lies inside single arrays and
            images is checked when they are read.
    """
    if limit is not None and limit < minimum:
        raise UserError(f"the limit of {limit} calibration samples is below the minimum of {minimum}. Raise the limit.")
    if not isinstance(source, (str, Path)):
        return CalibrationSamples(
            lambda: _limited(source, limit),
            inputs,
            "the given iterable",
            minimum,
            repeatable=not isinstance(source, Iterator),
            types=types,
        )
    path = Path(source)
    if path.is_dir():
        if size is None or preprocess is None:
            raise UserError(f"calibration images in {path} need a size and a preprocessing. Give both, or a .npz file.")
        singles, count = _folder(path, tuple(inputs), size, preprocess)
    elif path.is_file():
        singles, count = _npz(path, tuple(inputs))
    else:
        raise UserError(f"the calibration source {path} does not exist. Give a folder of images or a .npz file.")
    used = count if limit is None else min(limit, count)
    require_minimum(used, minimum, str(path))
    batch = max([shape[0] or 1 for shape in inputs.values() if shape], default=1)
    if used % batch:
        raise UserError(
            f"the calibration source {path} gives {used} samples, but the model takes batches of {batch}. Give a "
            f"multiple of {batch}, or export the model with a dynamic batch size."
        )
    return CalibrationSamples(lambda: _batched(islice(singles(), used), batch), inputs, str(path), minimum, types=types)


def sample_digests(batch: Mapping[str, np.ndarray]) -> set[bytes]:
    """Return a digest of each sample of a batch."""
    rows = zip(*(np.ascontiguousarray(batch[name]) for name in sorted(batch)), strict=False)
    return {hashlib.sha256(b"".join(row.tobytes() for row in sample)).digest() for sample in rows}


def require_minimum(count: int, minimum: int, origin: str) -> None:
    """Raise a `UserError` when there are fewer calibration samples than the minimum."""
    if count < minimum:
        raise UserError(
            f"{count} calibration samples from {origin} are too few: at least {minimum} are needed. Give more real "
            "samples, such as training images."
        )


def _checked(
    batch: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], kind: np.dtype, origin: str
) -> np.ndarray:
    """Return one array of a batch after checking its presence, type, shape and numbers."""
    if name not in batch:
        known = ", ".join(map(repr, batch)) or "nothing"
        raise UserError(f"the calibration samples from {origin} hold {known}, but not {name!r}. Name every input.")
    array = np.asarray(batch[name])
    wanted = "x".join("?" if size is None else str(size) for size in shape)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0:
        given = "x".join(map(str, array.shape))
        raise UserError(
            f"the calibration array {name!r} from {origin} has shape {given}, but the model takes {wanted}."
        )
    if array.dtype != kind:
        raise UserError(
            f"the calibration array {name!r} from {origin} is {array.dtype}. Give preprocessed {kind} network inputs."
        )
    if not np.isfinite(array).all():
        raise UserError(f"the calibration array {name!r} from {origin} has infinities or NaNs. Remove that sample.")
    return array


def _limited(source: Iterable[Mapping[str, np.ndarray]], limit: int | None) -> Iterator[Batch]:
    """Yield batches until they hold `limit` samples, cutting the last one."""
    left = limit
    for batch in source:
        if left is not None and left <= 0:
            return
        cut = {name: np.asarray(array)[:left] for name, array in batch.items()}
        yield cut
        if left is not None:
            left -= max((array.shape[0] for array in cut.values() if array.ndim), default=1)


def _batched(singles: Iterator[Batch], batch: int) -> Iterator[Batch]:
    """Join single samples to batches."""
    while group := list(islice(singles, batch)):
        yield {name: np.concatenate([sample[name] for sample in group]) for name in group[0]}


def _npz(path: Path, names: tuple[str, ...]) -> tuple[Callable[[], Iterator[Batch]], int]:
    """Return a reader of the single samples of a .npz file, and their number."""
    arrays = {}
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"the calibration file {path} is not a .npz file. Save it with numpy.savez.")
        with archive:
            for name in names:
                if name in archive.files:
                    arrays[name] = archive[name]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"the calibration file {path} cannot be read: {error}. Save plain arrays with numpy.savez."
        ) from error
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if missing := [name for name in names if name not in arrays]:
        raise UserError(
            f"the calibration file {path} has no array {' and no array '.join(missing)}. Save one float32 array "
            f"(N, channels, height, width) for each of the inputs {', '.join(names)}."
        )
    if len(set(counts.values())) > 1:
        raise UserError(f"the arrays of the calibration file {path} differ in their number of samples: {counts}.")
    count = min(counts.values(), default=0)
    return lambda: ({name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)), count


def image_files(folder: str | Path) -> list[Path]:
    """Return the image files directly in a folder, in the order of their names.

    Raises:
        UserError: the folder cannot be read or holds no image.
    """
    path = Path(folder)
    try:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    except OSError as error:
        raise UserError(f"cannot read the image folder {path}: {error.strerror or error}.") from error
    if not files:
        raise UserError(
            f"the image folder {path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}). Put real images "
            "directly into it."
        )
    return files


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return an image file as RGB (height, width, 3) uint8, resized (bilinear) to (height, width) = `size`.

    Raises:
        UserError: it cannot be read as an image.
    """
    height, width = size
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} cannot be read: {error}. Remove or replace it.") from error


def _folder(
    path: Path, names: tuple[str, ...], size: tuple[int, int], preprocess: Preprocess
) -> tuple[Callable[[], Iterator[Batch]], int]:
    """Return a reader of the samples that the images of a folder form, and their number."""
    files = image_files(path)
    if len(files) % len(names):
        raise UserError(
            f"the calibration folder {path} holds {len(files)} images, but the model takes {len(names)} at a time "
            f"({', '.join(names)}). Give a multiple of {len(names)}: consecutive images, by name, belong together."
        )

    def read() -> Iterator[Batch]:
        for start in range(0, len(files), len(names)):
            group = files[start : start + len(names)]
            yield {name: _image(file, size, preprocess) for name, file in zip(names, group, strict=True)}

    return read, len(files) // len(names)


def _image(path: Path, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Read, resize and preprocess one image."""
    height, width = size
    array = preprocess(read_image(path, size))
    if array.shape != (1, 3, height, width) or array.dtype != np.float32:
        raise UserError(
            f"the preprocessing turned {path} into {array.dtype} {'x'.join(map(str, array.shape))} instead of float32 "
            f"1x3x{height}x{width}. Correct the preprocessing."
        )
    return array
