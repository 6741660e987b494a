"""The samples that assignments are judged on, with the original's outputs, kept in a folder for all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeattn.deploy.tuning.scores import Score, Scorer
from edgeattn.export.run_directory import versions
from edgeattn.foundation import UserError, atomic_path, write_text
from edgeattn.models import MODELS, ModelSpec, Sample
from edgeattn.validation.runners import TorchRunner

INDEX = "index.json"
SEARCH, CONFIRMATION, ALL, NONE = "search", "confirmation", "all", "none"
"""Parts of the samples: the first half, the second half, both, and none where only a cost is asked for. Halves in one
piece each: neighbouring images of a folder are often alike, and would say the same twice if they were dealt in turns.
"""


@dataclass(frozen=True)
class Judged:
    """One stored sample.

    Attributes:
        sample: images, and the target where it is known.
        labels: labels that the original gives (K, H, W).
        outputs: main outputs of the original.
    """

    sample: Sample
    labels: np.ndarray
    outputs: Mapping[str, np.ndarray]

    @property
    def truth(self) -> np.ndarray:
        """The target, or the original's labels where that is unknown."""
        return self.labels if self.sample.target is None else self.sample.target


@dataclass(frozen=True)
class JudgedSamples:
    """Stored samples of one model.

    Attributes:
        folder: where they lie.
        model: name of the model.
        count: how many they are.
        unlabelled: how many have no target.
        digest: of images, targets and the original's outputs.
    """

    folder: Path
    model: str
    count: int
    unlabelled: int
    digest: str

    def part(self, part: str) -> Iterator[Judged]:
        """Yield the samples of a part, one in memory at a time."""
        half = self.count // 2
        bounds = {SEARCH: (0, half), CONFIRMATION: (half, self.count), ALL: (0, self.count), NONE: (0, 0)}
        for index in range(*bounds[part]):
            with np.load(_file(self.folder, index)) as archive:
                arrays = dict(archive)
            images = tuple(arrays[f"image{place}"] for place in range(len(MODELS.get(self.model).inputs)))
            outputs = {name.removeprefix("output:"): arrays[name] for name in arrays if name.startswith("output:")}
            yield Judged(Sample(images, arrays.get("target")), arrays["labels"], outputs)

    def original(self, part: str) -> Score:
        """Return the score of the original itself."""
        scorer = Scorer(len(MODELS.get(self.model).classes))
        for judged in self.part(part):
            scorer.add(judged.outputs, judged.outputs, truth=judged.truth, original=judged.labels, labels=judged.labels)
        return scorer.result()


def labels_of(spec: ModelSpec, outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the labels (K, H, W) that the outputs of one sample mean."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(outputs[name])) for name in spec.main_outputs}
    return spec.labels(tensors, size)[0].numpy()


def store_samples(
    spec: ModelSpec,
    original: nn.Module,
    samples: Iterable[Sample],
    folder: Path,
    *,
    source: Mapping[str, object],
    progress: Any = None,
) -> JudgedSamples:
    """Run the original on every sample and store both, or find them stored already.

    Args:
        spec: the model.
        original: the PyTorch network with its trained weights.
        samples: what to judge on; one pass is made.
        folder: where to store.
        source: everything that the samples and outputs depend on, as JSON values; equal sources are stored once.
        progress: called with the number of samples done.

    Raises:
        UserError: there is no sample, or the folder cannot be written.
    """
    key = hashlib.sha256(json.dumps({**source, "versions": versions()}, sort_keys=True).encode()).hexdigest()
    stored = _stored(spec, folder, key)
    if stored is not None:
        return stored
    digest, unlabelled, count = hashlib.sha256(), 0, 0
    names = [output.name for output in spec.outputs]
    with TorchRunner(original, spec.inputs, names, input_type=spec.input_type) as runner:
        for sample in samples:
            outputs = runner.infer(spec.network_inputs(sample))
            kept = {name: np.asarray(outputs[name]) for name in spec.main_outputs}
            arrays = {f"image{place}": image for place, image in enumerate(sample.images)}
            arrays |= {f"output:{name}": array for name, array in kept.items()}
            arrays["labels"] = labels_of(spec, kept, sample.images[0].shape[:2])
            if sample.target is None:
                unlabelled += 1
            else:
                arrays["target"] = sample.target
            for name, array in sorted(arrays.items()):
                digest.update(f"{name}{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
            with atomic_path(_file(folder, count)) as temporary:
                np.savez(temporary, **arrays)  # type: ignore[arg-type]
            count += 1
            if progress:
                progress(count)
    if not count:
        raise UserError(f"there is no sample to judge {spec.name} on. Give at least one image.")
    index = {"key": key, "count": count, "unlabelled": unlabelled, "digest": digest.hexdigest()}
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return JudgedSamples(folder, spec.name, count, unlabelled, digest.hexdigest())


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _stored(spec: ModelSpec, folder: Path, key: str) -> JudgedSamples | None:
    """Return complete samples of the same source, or None."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = JudgedSamples(folder, spec.name, int(index["count"]), int(index["unlabelled"]), str(index["digest"]))
        same = index["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same and all(_file(folder, place).is_file() for place in range(found.count)) else None
