"""From what an activation held on the calibration data to the largest number that its INT8 form represents.

ONNX Runtime's calibrators give the same thresholds for "minmax" and "percentile" (the tests compare them), but the
latter hold every activation of every batch in memory. Its entropy calibrator has 128 bins for 128 levels, so that every
threshold fits; it has no least-squares method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeattn.foundation import Registry, UserError

BINS = 4096
"""Bins of a histogram; from half of them on to all of them lie below the largest number seen."""

LEVELS = 127
"""Steps of INT8 on either side of zero."""

PERCENTILE = 99.99
"""Share of the numbers, in percent, that the percentile method represents."""


class MagnitudeHistogram:
    """Counts magnitudes in equal bins, one batch after the other.

    The range starts at the first batch's peak and doubles, by merging neighbouring bins, until it holds every number.

    Attributes:
        peak: the largest magnitude.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self._zeros = 0
        self._range = 0.0
        self._counts = np.zeros(BINS, np.int64)

    def add(self, array: np.ndarray) -> None:
        """Count the numbers of one batch."""
        magnitudes = np.abs(array).reshape(-1)
        peak = float(magnitudes.max(initial=0.0))
        self.peak = max(self.peak, peak)
        if self.peak == 0.0:
            self._zeros += magnitudes.size
            return
        if self._range == 0.0:
            self._range = peak
            self._counts[0] = self._zeros
        while self._range < peak:
            self._range *= 2
            self._counts[: BINS // 2] = self._counts[0::2] + self._counts[1::2]
            self._counts[BINS // 2 :] = 0
        places = np.multiply(magnitudes, BINS / self._range, dtype=np.float32).astype(np.int32)
        np.minimum(places, BINS - 1, out=places)
        self._counts += np.bincount(places, minlength=BINS)

    @property
    def counts(self) -> np.ndarray:
        """Counts of the bins that reach up to the peak."""
        used = int(np.flatnonzero(self._counts)[-1]) + 1 if self._counts.any() else 1
        return self._counts[:used]

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self._range / BINS


@dataclass(frozen=True)
class CalibrationMethod:
    """A way to choose the largest number that an activation's INT8 form represents; larger ones are clipped to it.

    Attributes:
        name: unique name.
        summary: what it does and when to use it, in one sentence.
        threshold: from the magnitudes of an activation to that number; None for the largest number that was seen.
    """

    name: str
    summary: str
    threshold: Callable[[MagnitudeHistogram], float] | None


def _percentile(histogram: MagnitudeHistogram) -> float:
    counts = histogram.counts
    reached = np.searchsorted(np.cumsum(counts), counts.sum() * PERCENTILE / 100)
    return min(float((reached + 1) * histogram.width), histogram.peak)


def _least_squares(histogram: MagnitudeHistogram) -> float:
    counts = histogram.counts
    centres = (np.arange(counts.size) + 0.5) * histogram.width
    thresholds = histogram.peak * np.arange(16, 129) / 128
    steps = (thresholds / LEVELS)[:, None]
    rounded = np.minimum(np.round(centres / steps), LEVELS) * steps
    return float(thresholds[np.argmin(((rounded - centres) ** 2) @ counts)])


def _entropy(histogram: MagnitudeHistogram) -> float:
    """Return the threshold whose clipped and rounded distribution diverges least from the clipped one."""
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[min(1, counts.size - 1)]  # the zeros behind a ReLU say nothing about the range
    levels = LEVELS + 1
    if counts.size <= levels:
        return histogram.peak
    ends = np.unique([*range(levels, counts.size, 16), counts.size])
    divergences = [_divergence(counts, end, levels) for end in ends]
    return min(float(ends[int(np.argmin(divergences))] * histogram.width), histogram.peak)


def _divergence(counts: np.ndarray, end: int, levels: int) -> float:
    """Return the Kullback-Leibler divergence of the first `end` bins, rounded to levels, from those bins clipped."""
    inside = counts[:end]
    clipped = inside.copy()
    clipped[-1] += counts[end:].sum()
    level = np.arange(end) * levels // end
    filled = inside > 0
    shares = np.bincount(level, inside, levels) / np.maximum(np.bincount(level, filled, levels), 1)
    rounded = np.where(filled, shares[level], 0)
    present = clipped > 0
    if np.any(rounded[present] == 0):
        return np.inf
    wanted, given = clipped[present] / clipped.sum(), rounded[present] / rounded.sum()
    return float(np.sum(wanted * np.log(wanted / given)))


METHODS: Registry[CalibrationMethod] = Registry("calibration method")
"""Every known method."""

for _method in (
    CalibrationMethod("minmax", "represents every number that was seen; the default", None),
    CalibrationMethod("percentile", f"clips the largest {100 - PERCENTILE:.2g} % of the magnitudes", _percentile),
    CalibrationMethod("entropy", "keeps most of the information of the distribution", _entropy),
    CalibrationMethod("mse", "makes the mean squared error least", _least_squares),
):
    METHODS.add(_method)

DEFAULT_METHOD = "minmax"
"""The method that loses no peak."""


def method_named(name: str) -> CalibrationMethod:
    """Return a method.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        known = "; ".join(f"{method.name} ({method.summary})" for method in METHODS)
        raise UserError(f"unknown calibration method {name!r}. Give one of: {known}.")
    return METHODS.get(name)
