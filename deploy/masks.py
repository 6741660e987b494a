"""Masks and overlays of images by an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgeattn.deploy.pipeline import Progress
from edgeattn.export.calibration import image_files, input_shapes, read_image
from edgeattn.foundation import UserError, atomic_path
from edgeattn.models import MODELS, ModelSpec, Sample
from edgeattn.models.deployable import Deployment
from edgeattn.models.spec import TOP_1
from edgeattn.validation import runners
from edgeattn.validation.inference import SegmentationNetwork, SlidingWindow
from edgeattn.validation.open_form import OpenForm, open_form
from edgeattn.validation.report import palette

OVERLAY = ".overlay.png"
"""What the name of an overlay ends in."""


@dataclass(frozen=True)
class Masks:
    """What was written.

    Attributes:
        files: the masks; beside each lies its overlay.
        classes: class names by label.
        pixels: number of pixels of each class in all masks.
        measured: what computed them.
    """

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    pixels: tuple[int, ...]
    measured: str

    def occurring(self) -> list[tuple[str, int]]:
        """Return name and number of pixels of each class that occurs, most first."""
        found = [(name, count) for name, count in zip(self.classes, self.pixels, strict=True) if count]
        return sorted(found, key=lambda entry: -entry[1])


def write_masks(
    file: Path,
    images: Sequence[Path],
    output: Path,
    *,
    model: str,
    plan: SlidingWindow | None = None,
    plugins: Sequence[Path] = (),
    threads: int = 1,
    progress: Progress | None = None,
) -> Masks:
    """Write for each image a mask of labels, a PNG with a palette, and an overlay, both at the image's own size.

    A network of two images takes each with the next one, and the last with the one before.

    Args:
        file: ONNX form of the model, or engine that `edgeattn build` made on this machine.
        images: image files, or folders of them.
        output: folder of the masks, which are named like the images.
        model: name of the model's declaration.
        plan: windows, flips and scales; whole images, resized where the graph's size is fixed, when None.
        plugins: plugin libraries that an engine needs.
        threads: ONNX Runtime's threads within an operation.
        progress: told about the images done.

    Raises:
        UserError: something given cannot be used, or the model labels whole images.
    """
    base = MODELS.get(model)
    if base.metric == TOP_1:
        raise UserError(f"{base.name} labels images as a whole, so it has no masks. Name a segmentation model.")
    opened = open_form(file, name=file.name, threads=threads, plugins=plugins)
    network = _Labeller(base, opened, plan)
    files = image_paths(images)
    if len(files) < len(base.inputs):
        raise UserError(f"{len(files)} image is given, but {base.name} takes {len(base.inputs)} at a time. Give more.")
    colours = np.asarray(palette(len(base.classes)), np.uint8)
    written, pixels = [], np.zeros(len(base.classes), np.int64)
    with opened.runner:
        for index, path in enumerate(files):
            image = read_at_own_size(path)
            others = [read_at_own_size(other) for other in _partners(files, index, len(base.inputs))]
            labels = network.labels(image, others)
            write_mask(output / f"{path.stem}.png", labels, colours)
            write_overlay(output / f"{path.stem}{OVERLAY}", image, colours[labels])
            written.append(output / f"{path.stem}.png")
            pixels += np.bincount(labels.ravel(), minlength=len(pixels))
            if progress:
                progress("segment", index + 1, len(files))
    return Masks(tuple(written), base.classes, tuple(int(count) for count in pixels), opened.measured)


class _Labeller:
    """Turns images into labels with an opened form, in windows or as a whole."""

    def __init__(self, base: ModelSpec, opened: OpenForm, plan: SlidingWindow | None) -> None:
        self.spec = Deployment.of_graph(opened.model).spec(base)
        self.opened, self.plan = opened, plan
        self._require_names()
        self.size = self.spec.image_size(input_shapes(opened.model).values())
        self.network = SegmentationNetwork(self.spec, self._run, self.size) if self._merges or plan else None

    @property
    def _merges(self) -> bool:
        """Whether the form gives the logits of one image, which are resized before the labels are read."""
        main = [output.meaning for output in self.spec.outputs if not output.auxiliary]
        return main == ["logits"] and len(self.spec.inputs) == 1

    def labels(self, image: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
        """Return the labels (height, width) of an image."""
        if self.network is not None:
            return np.asarray(self.network.predict(image, self.plan).argmax(axis=0))
        size = self.size or image.shape[:2]
        outputs = self._run(self.spec.network_inputs(Sample((image, *others), None).resized((size[0], size[1]))))
        tensors = {name: torch.from_numpy(np.asarray(outputs[name])) for name in self.spec.main_outputs}
        labels = self.spec.labels(tensors, (size[0], size[1]))[0, 0].numpy().astype(np.int32)
        height, width = image.shape[:2]
        return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))

    def _run(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        runner = self.opened.runner
        try:
            outputs: Mapping[str, np.ndarray] = runner.infer(runners.feed_for(runner, self.opened.facts, feed))
        except runners.RUNTIME_ERRORS as error:
            raise UserError(f"{self.opened.runtime} cannot run {self.opened.path} on the images: {error}.") from error
        return outputs

    def _require_names(self) -> None:
        """Refuse a file whose inputs or outputs are not those of the model."""
        graph = self.opened.model.graph
        given = [*input_shapes(self.opened.model), *(value.name for value in graph.output)]
        wanted = [*self.spec.inputs, *self.spec.main_outputs]
        if not set(wanted) <= set(given):
            raise UserError(
                f"{self.opened.path} takes and gives {', '.join(given)}, but {self.spec.name} {', '.join(wanted)}. "
                "Name the file's own model with --model."
            )


def _partners(files: Sequence[Path], index: int, count: int) -> list[Path]:
    """Return the images that one is shown to the network with: those after it, or before it at the end."""
    around = [*files[index + 1 :], *reversed(files[:index])]
    return around[: count - 1]


def image_paths(images: Sequence[Path]) -> list[Path]:
    """Return the image files of paths and folders.

    Raises:
        UserError: there is none, or two have one name, so that one mask would replace the other.
    """
    files = [file for path in images for file in (image_files(path) if path.is_dir() else [path])]
    stems = [file.stem for file in files]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"two images are called {repeated[0]!r}, and one mask would replace the other. Rename one.")
    return files


def read_at_own_size(path: Path) -> np.ndarray:
    """Return an image at its own size."""
    try:
        with Image.open(path) as image:
            size = image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} cannot be read: {error}. Remove or replace it.") from error
    return read_image(path, size)


def write_mask(path: Path, labels: np.ndarray, colours: np.ndarray) -> None:
    """Write labels (height, width) as a PNG whose palette is `colours` (classes, 3)."""
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(colours.tobytes())
    _save(mask, path)


def write_overlay(path: Path, image: np.ndarray, coloured: np.ndarray) -> None:
    """Write an image with its coloured labels, both (height, width, 3) uint8, half each."""
    _save(Image.blend(Image.fromarray(image), Image.fromarray(coloured), 0.5), path)


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
