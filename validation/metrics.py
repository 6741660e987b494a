"""What is measured between a reference tensor and another form of it, and in task units.

Everything accumulates sample by sample, so that no output has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edgeattn.models.spec import MIOU, TOP_1

HISTOGRAM_EDGES = np.arange(-12.0, 4.5, 0.5)
"""Edges of the error histogram, log10 of the absolute error; half a decade each."""


@dataclass(frozen=True)
class TensorError:
    """Differences between all samples of one output and their reference.

    Infinities of the same sign, and NaNs in the same place, count as equal and stay out of every number below. A
    position where only one side is finite, or where two infinities differ, is mismatched: it stays out of the numbers
    too, and is counted, because no distance describes it.

    Attributes:
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative_l2: norm of the difference over the norm of the reference, pooled over all samples.
        worst_relative_l2: the largest relative L2 of a single sample.
        cosine: cosine of the angle between both, pooled over all samples.
        compared: number of positions where both sides are finite.
        mismatched: number of positions where only one side is finite, or two infinities or NaNs differ.
        histogram: counts of the absolute differences by `HISTOGRAM_EDGES`; what lies beyond falls into the end bins.
        exact: number of positions without any difference, which a logarithm cannot hold.
        reference_peak: largest absolute value of the reference.
        reference_rms: root mean square of the reference.
    """

    max_abs: float
    mean_abs: float
    relative_l2: float
    worst_relative_l2: float
    cosine: float
    compared: int
    mismatched: int
    histogram: tuple[int, ...]
    exact: int
    reference_peak: float
    reference_rms: float


@dataclass
class TensorComparison:
    """Accumulates `TensorError` over samples, in float64."""

    _max: float = 0.0
    _sum: float = 0.0
    _squares: float = 0.0
    _reference_squares: float = 0.0
    _actual_squares: float = 0.0
    _product: float = 0.0
    _worst: float = 0.0
    _peak: float = 0.0
    _compared: int = 0
    _mismatched: int = 0
    _exact: int = 0
    _histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64))

    def add(self, reference: np.ndarray, actual: np.ndarray) -> float:
        """Add one sample.

        Args:
            reference: the values to be matched, any shape.
            actual: the values under test, same shape.

        Returns:
            The relative L2 of this sample.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != actual.shape:
            raise ValueError(f"cannot compare shape {actual.shape} with the reference's {reference.shape}")
        finite_reference, finite_actual = np.isfinite(reference), np.isfinite(actual)
        both = finite_reference & finite_actual
        same = both | (reference == actual) | (np.isnan(reference) & np.isnan(actual))
        self._mismatched += int(same.size - np.count_nonzero(same))
        left, right = reference[both].astype(np.float64), actual[both].astype(np.float64)
        difference = np.abs(left - right)
        self._count(difference)
        squares, reference_squares = _dot(difference, difference), _dot(left, left)
        self._squares += squares
        self._reference_squares += reference_squares
        self._actual_squares += _dot(right, right)
        self._product += _dot(left, right)
        self._peak = max(self._peak, float(np.abs(left).max(initial=0.0)))
        relative = _ratio(squares, reference_squares)
        self._worst = max(self._worst, relative)
        return relative

    def _count(self, difference: np.ndarray) -> None:
        self._max = max(self._max, float(difference.max(initial=0.0)))
        self._sum += float(difference.sum())
        self._compared += difference.size
        positive = difference[difference > 0]
        self._exact += difference.size - positive.size
        logarithm = np.log10(positive).clip(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
        self._histogram += np.histogram(logarithm, HISTOGRAM_EDGES)[0]

    def result(self) -> TensorError:
        """Return the error over everything added so far."""
        norms = self._reference_squares * self._actual_squares
        equal_zeros = self._reference_squares == self._actual_squares == 0
        return TensorError(
            max_abs=self._max,
            mean_abs=self._sum / max(self._compared, 1),
            relative_l2=_ratio(self._squares, self._reference_squares),
            worst_relative_l2=self._worst,
            cosine=1.0 if equal_zeros else self._product / norms**0.5 if norms else 0.0,
            compared=self._compared,
            mismatched=self._mismatched,
            histogram=tuple(int(count) for count in self._histogram),
            exact=self._exact,
            reference_peak=self._peak,
            reference_rms=float((self._reference_squares / max(self._compared, 1)) ** 0.5),
        )


def _dot(left: np.ndarray, right: np.ndarray) -> float:
    # Not `left @ right`: the threads of BLAS would fight with those of torch and ONNX Runtime for the cores.
    return float((left * right).sum())


def _ratio(squares: float, reference_squares: float) -> float:
    """Return the relative L2 of two sums of squares; nothing over nothing is 0, something over nothing infinite."""
    if reference_squares == 0:
        return 0.0 if squares == 0 else float("inf")
    return float((squares / reference_squares) ** 0.5)


class Confusion:
    """Streaming confusion matrix of integer labels; rows are targets, columns predictions.

    Args:
        classes: number of classes; labels run from 0.
    """

    def __init__(self, classes: int) -> None:
        self.matrix = np.zeros((classes, classes), np.int64)

    def add(self, target: np.ndarray, prediction: np.ndarray) -> None:
        """Add label maps of equal shape.

        Raises:
            ValueError: the shapes differ, or a label is not one of the classes.
        """
        if target.shape != prediction.shape:
            raise ValueError(f"cannot compare labels of shape {prediction.shape} with targets of {target.shape}")
        classes = len(self.matrix)
        for kind, labels in (("target", target), ("predicted", prediction)):
            if labels.size and (labels.min() < 0 or labels.max() >= classes):
                raise ValueError(
                    f"{kind} labels run from {labels.min()} to {labels.max()}, but there are {classes} classes"
                )
        pairs = target.astype(np.int64).ravel() * classes + prediction.astype(np.int64).ravel()
        self.matrix += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)

    def class_iou(self) -> np.ndarray:
        """Return the intersection over union of each class; NaN where neither target nor prediction holds it."""
        intersection = np.diag(self.matrix)
        union = self.matrix.sum(0) + self.matrix.sum(1) - intersection
        return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)

    def mean_iou(self) -> float:
        """Return the mean of `class_iou` over the classes that occur (Everingham et al. 2015); NaN without any."""
        scores = self.class_iou()
        present = scores[~np.isnan(scores)]
        return float(present.mean()) if present.size else float("nan")

    def class_accuracy(self) -> np.ndarray:
        """Return the fraction of each class's targets that are predicted right; NaN where no target holds it."""
        targets = self.matrix.sum(1)
        return np.where(targets > 0, np.diag(self.matrix) / np.maximum(targets, 1), np.nan)

    def accuracy(self) -> float:
        """Return the fraction of all targets that are predicted right; NaN without any."""
        total = int(self.matrix.sum())
        return float(np.trace(self.matrix) / total) if total else float("nan")


@dataclass(frozen=True)
class TaskMetric:
    """How a confusion matrix becomes the score of a task.

    Attributes:
        name: as `ModelSpec.metric` has it.
        by_class: what the score of a single class is called.
        overall: the score, 0..1.
        classes: the score of each class, NaN where it does not occur.
    """

    name: str
    by_class: str
    overall: Callable[[Confusion], float]
    classes: Callable[[Confusion], np.ndarray]


METRICS = {
    metric.name: metric
    for metric in (
        TaskMetric(MIOU, "IoU", Confusion.mean_iou, Confusion.class_iou),
        TaskMetric(TOP_1, "accuracy", Confusion.accuracy, Confusion.class_accuracy),
    )
}
"""Task metrics by name."""


@dataclass
class Agreement:
    """Fraction of equal labels, of pixels or of whole images, accumulated over samples.

    Attributes:
        equal: equal labels.
        total: all labels.
    """

    equal: int = 0
    total: int = 0

    def add(self, reference: np.ndarray, labels: np.ndarray) -> float:
        """Add label maps of equal shape and return the fraction that agrees in them.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != labels.shape:
            raise ValueError(f"cannot compare labels of shape {labels.shape} with the reference's {reference.shape}")
        equal = int(np.count_nonzero(reference == labels))
        self.equal += equal
        self.total += labels.size
        return equal / max(labels.size, 1)

    @property
    def fraction(self) -> float:
        """Fraction 0..1 that agrees; NaN before anything was added."""
        return self.equal / self.total if self.total else float("nan")
