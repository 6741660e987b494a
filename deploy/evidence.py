"""What a comparison needs and leaves behind: the original with its weights, the images, the written evidence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from edgeattn.export.calibration import image_files, read_image
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, ModelSpec, Sample
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.published import load_published
from edgeattn.models.spec import TOP_1
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


def load_original(spec: ModelSpec, path: Path, layout: str | None = None) -> nn.Module:
    """Return the independent PyTorch original of a model with trained weights, in evaluation mode.

    Args:
        spec: the model.
        path: its weights.
        layout: their published layout; the one whose names fit when None.

    Raises:
        UserError: the weights cannot be read, or do not fit.
    """
    module, name = spec.original.split(":")
    original: nn.Module = getattr(importlib.import_module(module), name)(**spec.arguments)
    load_published(spec, original, read_checkpoint(path), layout)
    return original.eval()


def model_of_run(facts: Mapping[str, Any]) -> ModelSpec:
    """Return the declaration of the model that a run directory is about.

    Args:
        facts: what the run recorded about itself.

    Raises:
        UserError: the model is unknown, or declared otherwise than when it was exported.
    """
    spec = MODELS.get(facts["model"])
    if facts.get("declaration", spec.fingerprint) != spec.fingerprint:
        raise UserError(
            f"{spec.name} is declared otherwise than when the run was made: its classes, preprocessing or arguments "
            "changed. Export it again, or restore the declaration."
        )
    return spec


class EvaluationSamples:
    """What parity is judged on, made anew by every loop over it: one sample is in memory at a time.

    The images of a folder in the order of their names, without truth (for networks of two inputs an image and its
    successor form a pair), or the model's held-out samples. A classifier of single images also takes a folder of one
    folder for each class, which gives the truth: the first image of each class, then the second ones, and so on.

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
        if images is not None and (labelled := _labelled_images(images, spec)):
            chosen = labelled[:count]
            self._make = lambda: (Sample((read_image(file, size),), np.array([[[label]]])) for file, label in chosen)
            self._count = len(chosen)
            return
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


def _labelled_images(folder: Path, spec: ModelSpec) -> list[tuple[Path, int]]:
    """Return the images of a classifier's folder of folders with their labels; none where it has no folders.

    Raises:
        UserError: a folder is not named by a class or its number, and there are not as many folders as classes.
    """
    if spec.metric != TOP_1 or len(spec.inputs) != 1 or not folder.is_dir():
        return []
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    numbers = {name: label for label, name in enumerate(spec.classes)}
    numbers |= {str(label): label for label in range(len(spec.classes))}
    if unknown := [entry.name for entry in folders if entry.name not in numbers]:
        if len(folders) != len(spec.classes):
            raise UserError(
                f"the folder {folder} holds {unknown[0]!r}, which is no class of {spec.name}. Name the folders by "
                f"class or by number from 0, or give one for each of its {len(spec.classes)} classes, in their order."
            )
        numbers = {entry.name: label for label, entry in enumerate(folders)}
    found = [
        (position, numbers[entry.name], file) for entry in folders for position, file in enumerate(image_files(entry))
    ]
    return [(file, label) for _, label, file in sorted(found)]


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
