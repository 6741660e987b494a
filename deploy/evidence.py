"""What a comparison needs and leaves behind: the original with its weights, the images, the written evidence."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import islice
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
    original: nn.Module = getattr(importlib.import_module(module), name)(**spec.original_arguments)
    load_checkpoint(original, read_checkpoint(path))
    return original.eval()


def evaluation_samples(spec: ModelSpec, images: Path | None, size: tuple[int, int], count: int) -> list[Sample]:
    """Return what parity is judged on: the images of a folder at `size`, or the model's held-out samples.

    Raises:
        UserError: no folder is given and the model has no held-out samples.
    """
    if images is not None:
        return list(islice(image_samples(images, len(spec.inputs), size), count))
    if spec.samples is None:
        raise UserError(
            f"no evaluation images are bundled with {spec.name}. Give a folder of typical images with --images."
        )
    return list(spec.samples(count))


def image_samples(folder: Path, inputs: int, size: tuple[int, int]) -> Iterator[Sample]:
    """Yield samples without truth from the images of a folder, in the order of their names.

    Args:
        folder: holds the images.
        inputs: image inputs of the network; with two, an image and its successor form a pair.
        size: (height, width) that the images are resized to.

    Raises:
        UserError: the folder is missing or holds too few images, or one cannot be read.
    """
    files = image_files(folder)
    if len(files) < inputs:
        raise UserError(f"the folder {folder} holds {len(files)} image, but the network takes {inputs} at a time.")
    for start in range(len(files) - inputs + 1):
        yield Sample(tuple(read_image(file, size) for file in files[start : start + inputs]), None)


def write_evidence(parity: Parity, folder: Path, facts: Mapping[str, object]) -> None:
    """Write `parity.json` and `report.html` into a folder."""
    write_parity(parity, folder / "parity.json")
    write_report(parity, folder / "report.html", manifest=facts)
