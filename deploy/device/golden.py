"""Golden samples: inputs, outputs and labels of the PyTorch original, the truth; and what is measured on them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DeviceError

_FAR = 1e300
"""Relative error of something where nothing was expected; JSON has no infinity."""


@dataclass(frozen=True)
class Golden:
    """One golden sample.

    Attributes:
        inputs: network inputs by name, FP32.
        outputs: outputs of the PyTorch original by name, FP32.
        labels: integer labels (batch, K, H, W) of the original.
        target: true labels (K, H, W); None where the truth is not known.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    labels: np.ndarray
    target: np.ndarray | None


def read_golden(path: Path) -> Golden:
    """Read a golden sample. Nothing in it is executed: Python objects are refused.

    Raises:
        DeviceError: the file is no golden sample, or is compressed, so that its size would say nothing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise DeviceError(f"{path} is compressed, and golden samples are not. Make the bundle again.")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return Golden(
            {name[len("input/") :]: found[name] for name in found if name.startswith("input/")},
            {name[len("output/") :]: found[name] for name in found if name.startswith("output/")},
            found["labels"],
            found.get("target"),
        )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(f"{path} is no golden sample: {error}. Make the bundle again.") from error


def labels_of(
    outputs: Mapping[str, np.ndarray], meanings: Sequence[Mapping[str, Any]], size: Sequence[int]
) -> np.ndarray:
    """Return integer labels (batch, K, H, W) from a network's outputs.

    Args:
        outputs: by name.
        meanings: name and meaning of each output, as the manifest has them: the largest of "logits" resized to `size`,
            of "scores" or of "probabilities"; one map for each "probability" that exceeds a half; "labels" themselves.
        size: (height, width) of the input.

    Raises:
        DeviceError: an output has another meaning.
    """
    kinds = {entry["meaning"] for entry in meanings}
    first = outputs[meanings[0]["name"]]
    if kinds == {"logits"} and len(meanings) == 1:
        first = resized(first, size, aligned=bool(meanings[0].get("align_corners", True)))
    if kinds <= {"logits", "scores", "probabilities"} and len(meanings) == 1:
        labels: np.ndarray = first.argmax(axis=1)
        return labels[:, None] if labels.ndim == 3 else labels[:, None, None, None]
    if kinds == {"labels"}:
        return first.astype(np.int64)
    if kinds == {"probability"}:
        maps = np.concatenate([outputs[entry["name"]] for entry in meanings], axis=1)
        return (maps > 0.5).astype(np.int64)
    raise DeviceError(f"outputs that mean {', '.join(sorted(kinds))} have no labels. Use a newer edgeattn_device.")


def resized(maps: np.ndarray, size: Sequence[int], *, aligned: bool = True) -> np.ndarray:
    """Return (batch, channels, h, w) in FP32, resized bilinearly: with aligned corners, or aligned edges of pixels."""
    maps = maps.astype(np.float32, copy=False)
    for axis, length in ((2, size[0]), (3, size[1])):
        steps = maps.shape[axis] - 1
        position = np.arange(length, dtype=np.float32)
        if aligned:
            position = position * np.float32(steps / (length - 1) if length > 1 else 0)
        else:
            position = np.maximum((position + np.float32(0.5)) * np.float32((steps + 1) / length) - np.float32(0.5), 0)
        low = np.minimum(position.astype(np.int64), steps)  # positions are not negative, so this rounds down
        weight = (position - low).reshape([-1 if axis == other else 1 for other in range(4)])
        lower, upper = np.take(maps, low, axis), np.take(maps, np.minimum(low + 1, steps), axis)
        maps = lower * (1 - weight) + upper * weight
    return maps


@dataclass
class _OutputError:
    """Differences of one output, over all samples; the norms of error and reference for each of them."""

    worst_relative_l2: float = 0.0
    max_abs: float = 0.0
    mismatched: int = 0
    compared: int = 0
    error_norms: list[float] = field(default_factory=list)
    reference_norms: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, actual: np.ndarray) -> None:
        if reference.shape != actual.shape:
            raise DeviceError(f"an output has the shape {actual.shape} in place of {reference.shape}. Build it again.")
        reference, actual = reference.astype(np.float64), actual.astype(np.float64)
        both = np.isfinite(reference) & np.isfinite(actual)
        same = both | (reference == actual) | (np.isnan(reference) & np.isnan(actual))
        self.mismatched += int(same.size - np.count_nonzero(same))
        left, difference = reference[both], np.abs(reference[both] - actual[both])
        self.compared += difference.size
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        norm, wrong = float(np.sqrt((left**2).sum())), float(np.sqrt((difference**2).sum()))
        self.worst_relative_l2 = max(self.worst_relative_l2, _relative(wrong, norm))
        self.error_norms.append(wrong)
        self.reference_norms.append(norm)

    def excess(self, limit: float | None, largest: float | None, allowed: Sequence[float] | None) -> Iterator[str]:
        """Yield which limits are exceeded; comparisons are written so that NaN fails.

        Args:
            limit: of the relative L2 of any sample; None where it is not judged.
            largest: allowed absolute difference of any value; None where it is not judged.
            allowed: norm of the error that each sample may have, in place of `limit`; None where that counts.
        """
        if largest is not None and not self.max_abs <= largest:
            yield f"absolute difference {self.max_abs:.2e} exceeds {largest:.2e}"
        if limit is None:
            return
        if allowed is None:
            if not self.worst_relative_l2 <= limit:
                yield f"relative L2 {self.worst_relative_l2:.2e} exceeds {limit:.2e}"
            return
        samples = zip(self.error_norms, allowed, self.reference_norms, strict=True)
        if beyond := [sample for sample in samples if not sample[0] <= sample[1]]:
            wrong, most, norm = max(beyond, key=lambda sample: _relative(sample[0], sample[1]))
            yield f"relative L2 {_relative(wrong, norm):.2e} exceeds {_relative(most, norm):.2e}"


def _relative(error: float, norm: float) -> float:
    return error / norm if norm else _FAR * (error > 0)


@dataclass
class Comparison:
    """Accumulates what is judged, sample by sample.

    Attributes:
        classes: how many labels there are.
        size: (height, width) that labels are made at.
        meanings: see `labels_of`.
        metric: "mIoU", or "top-1" where an image as a whole has one label.
    """

    classes: int
    size: Sequence[int]
    meanings: Sequence[Mapping[str, Any]]
    metric: str = "mIoU"
    _errors: dict[str, _OutputError] = field(default_factory=dict)
    _equal: int = 0
    _labels: int = 0
    _confusions: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, golden: Golden, outputs: Mapping[str, np.ndarray]) -> None:
        """Add the outputs of one sample.

        Raises:
            DeviceError: an output is missing or has another shape.
        """
        for name, reference in golden.outputs.items():
            if name not in outputs:
                raise DeviceError(f"the engine has no output {name!r}, only {', '.join(outputs)}. Build it again.")
            if not any(entry["name"] == name and entry["meaning"] == "labels" for entry in self.meanings):
                self._errors.setdefault(name, _OutputError()).add(reference, outputs[name])
        labels = labels_of(outputs, self.meanings, self.size)
        self._equal += int(np.count_nonzero(labels == golden.labels))
        self._labels += labels.size
        truth = golden.labels if golden.target is None else golden.target.reshape(golden.labels.shape)
        for name, found in (("engine", labels), ("original", golden.labels)):
            pairs = truth.astype(np.int64).ravel() * self.classes + found.astype(np.int64).ravel()
            counts = np.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)
            self._confusions[name] = self._confusions.get(name, 0) + counts

    def judge(self, limits: Mapping[str, Any], allowed: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
        """Return the verdict with its figures. Comparisons are written so that NaN fails.

        Args:
            limits: the tolerance of the bundle, derived or set by its maker; None where a quantity is not judged.
            allowed: for outputs whose relative error says little, such as the probabilities of a Sigmoid, the norm of
                the error that each sample may have, in the order of the samples.
        """
        agreement = self._equal / self._labels
        scores = {name: _METRICS[self.metric](counts) for name, counts in self._confusions.items()}
        drop = scores["original"] - scores["engine"]
        return {
            "outputs": {name: vars(error) for name, error in self._errors.items()},
            "label_agreement": agreement,
            "metric": self.metric,
            "score": scores["engine"],
            "original_score": scores["original"],
            "task_drop": drop,
            "limits": dict(limits),
            "allowed_error": dict(allowed or {}),
            "reasons": (reasons := list(self._reasons(limits, allowed or {}, agreement, drop))),
            "verdict": "FAIL" if reasons else "PASS",
        }

    def _reasons(
        self, limits: Mapping[str, Any], allowed: Mapping[str, Sequence[float]], agreement: float, drop: float
    ) -> Iterator[str]:
        given = {entry["output"]: entry for entry in limits.get("outputs", ())}
        for name, error in self._errors.items():
            if error.mismatched:
                yield f"output {name}: {error.mismatched} values are NaN or infinite on one side only"
            if not error.compared:
                yield f"output {name}: no value is finite on both sides, so nothing could be compared"
            limit = given.get(name, {"relative_l2": limits["relative_l2"], "max_abs": None})
            for excess in error.excess(limit["relative_l2"], limit["max_abs"], allowed.get(name)):
                yield f"output {name}: {excess}"
        if limits["label_agreement"] is not None and not agreement >= limits["label_agreement"]:
            yield f"label agreement {agreement:.3%} is below {limits['label_agreement']:.3%}"
        if limits["task_drop"] is not None and not abs(drop) <= limits["task_drop"]:
            yield f"{self.metric} differs by {100 * drop:.2f} points, more than {100 * limits['task_drop']:.2f}"


def _mean_iou(counts: np.ndarray) -> float:
    intersection = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - intersection
    return float((intersection[union > 0] / union[union > 0]).mean())


def _accuracy(counts: np.ndarray) -> float:
    return float(np.trace(counts) / counts.sum())


_METRICS = {"mIoU": _mean_iou, "top-1": _accuracy}
