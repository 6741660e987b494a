"""What a comparison needs and leaves behind: the original with its weights, the images, the written evidence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from edgeattn.export.calibration import image_files, read_image
from edgeattn.foundation import UserError
from edgeattn.models import ModelSpec, Sample
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint
from edgeattn.validation.parity import Parity, write_parity
from edgeattn.validation.report import write_report

BUNDLED = "bundled"
"""Stands for the weights that ship with a model, wherever a checkpoint is asked for."""


def checkpoint_path(spec: ModelSpec, checkpoint: str) -> Path:
    """Return the file that `checkpoint` means.

    Raises:
        UserError: bundled weights were asked for and the model has none.
    """
    if checkpoint != BUNDLED:
        return Path(checkpoint)
    if spec.checkpoint is None:
        raise UserError(f"no trained weights are bundled with {spec.name}. Give the path of a checkpoint.")
    return spec.checkpoint


def load_original(spec: ModelSpec, path: Path) -> nn.Module:
    """Return the independent PyTorch original of a model with trained weights, in evaluation mode."""
    module, name = spec.original.split(":")
    original: nn.Module = getattr(importlib.import_module(module), name)(**spec.arguments)
    load_checkpoint(original, read_checkpoint(path))
    return original.eval()


class EvaluationSamples:
    """What parity is judged on, made anew by every loop over it: one sample is in memory at a time.

    The images of a folder in the order of their names, without truth (for networks of two inputs an image and its
    successor form a pair), or the model's held-out samples.

    Args:
        spec: the model.
        images: folder of images; the held-out samples when None.
        size: (height, width) that all is resized to.
        count: samples at most.

    Raises:
        UserError: no folder is given and the model has no held-out samples, or the folder is missing or holds too few
            images. An image that cannot be read raises when it is reached.
    """

    def __init__(self, spec: ModelSpec, images: Path | None, size: tuple[int, int], count: int) -> None:
        self._make: Callable[[], Iterator[Sample]]
        if images is not None:
            files = _image_groups(images, len(spec.inputs))[:count]
            self._make = lambda: (Sample(tuple(read_image(file, size) for file in group), None) for group in files)
            self._count = len(files)
            return
        if spec.samples is None:
            raise UserError(
                f"no evaluation images are bundled with {spec.name}. Give a folder of typical images with --images."
            )
        held_out = spec.samples
        self._make = lambda: (sample.resized(size) for sample in held_out(count))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        return self._make()


def _image_groups(folder: Path, inputs: int) -> list[tuple[Path, ...]]:
    """Return overlapping runs of `inputs` consecutive image files."""
    files = image_files(folder)
    if len(files) < inputs:
        raise UserError(f"the folder {folder} holds {len(files)} image, but the network takes {inputs} at a time.")
    return [tuple(files[start : start + inputs]) for start in range(len(files) - inputs + 1)]


def write_evidence(parity: Parity, folder: Path, facts: Mapping[str, object]) -> None:
    """Write `parity.json` and `report.html` into a folder."""
    write_parity(parity, folder / "parity.json")
    write_report(parity, folder / "report.html", manifest=facts)
