"""`Score`: how a form does on a set of samples, as sums that can be stored and added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgeattn.validation.metrics import METRICS, Agreement, Confusion, TensorComparison


@dataclass(frozen=True)
class Score:
    """Accuracy of a form, beside the FP32 original on the same samples.

    Attributes:
        confusion: labels by target (rows) and prediction; the original's labels stand in for the target where that is
            unknown.
        equal: labels that are the original's.
        labels: all labels.
        noise: sums of squares of (difference, original) for each output.
        mismatched: output values that are NaN or infinite on one side only.
        failure: why the form could not be run; None when it ran.
    """

    confusion: tuple[tuple[int, ...], ...] = ()
    equal: int = 0
    labels: int = 0
    noise: Mapping[str, tuple[float, float]] | None = None
    mismatched: int = 0
    failure: str | None = None

    def task(self, metric: str) -> float:
        """Return the score of the task, 0..1, by a metric of `edgeattn.validation.metrics.METRICS`."""
        counted = Confusion(len(self.confusion))
        counted.matrix += np.asarray(self.confusion, np.int64).reshape(counted.matrix.shape)
        return METRICS[metric].overall(counted)

    @property
    def agreement(self) -> float:
        """Fraction of the labels given as the original labels them."""
        return self.equal / self.labels if self.labels else math.nan

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of the outputs in dB, of the noisiest one; infinite without noise."""
        return -10 * math.log10(self.noise_share) if self.noise_share > 0 else math.inf

    @property
    def noise_share(self) -> float:
        """Power of the noise over that of the signal, of the noisiest output."""
        if self.failure or self.mismatched or not self.noise:
            return math.inf
        return max(_share(*sums) for sums in self.noise.values())

    def added(self, other: Score) -> Score:
        """Return the score on the samples of both."""
        mine, others = self.noise or {}, other.noise or {}
        matrices = [np.asarray(score.confusion, np.int64) for score in (self, other) if score.confusion]
        return Score(
            confusion=_rows(sum(matrices[1:], matrices[0])) if matrices else (),
            equal=self.equal + other.equal,
            labels=self.labels + other.labels,
            noise={
                name: (
                    mine.get(name, (0.0, 0.0))[0] + others.get(name, (0.0, 0.0))[0],
                    mine.get(name, (0.0, 0.0))[1] + others.get(name, (0.0, 0.0))[1],
                )
                for name in {**mine, **others}
            },
            mismatched=self.mismatched + other.mismatched,
            failure=self.failure or other.failure,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the sums as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Score:
        """Read what `as_dict` gave."""
        confusion = tuple(tuple(int(count) for count in row) for row in record["confusion"])
        noise = {name: (float(sums[0]), float(sums[1])) for name, sums in (record["noise"] or {}).items()}
        return cls(**{**record, "confusion": confusion, "noise": noise})


class Scorer:
    """Adds samples up to a `Score`.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self._confusion = Confusion(classes)
        self._agreement = Agreement()
        self._outputs: dict[str, TensorComparison] = {}

    def add(
        self,
        reference: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
        *,
        truth: np.ndarray,
        original: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        """Add one sample: outputs of the original and of the form, then true, original and found labels (K, H, W)."""
        for name, expected in reference.items():
            self._outputs.setdefault(name, TensorComparison()).add(expected, outputs[name])
        self._agreement.add(original, labels)
        self._confusion.add(truth, labels)

    def result(self) -> Score:
        """Return the score over everything added so far."""
        errors = {name: comparison.result() for name, comparison in self._outputs.items()}
        powers = {name: error.reference_rms**2 * error.compared for name, error in errors.items()}
        return Score(
            confusion=_rows(self._confusion.matrix),
            equal=self._agreement.equal,
            labels=self._agreement.total,
            noise={name: (error.relative_l2**2 * powers[name], powers[name]) for name, error in errors.items()},
            mismatched=sum(error.mismatched for error in errors.values()),
        )


def _rows(matrix: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(count) for count in row) for row in matrix)


def _share(noise: float, signal: float) -> float:
    """Return the ratio of two powers; no noise on no signal is none, and what is not a number counts as all noise."""
    if noise == 0:
        return 0.0
    share = noise / signal if signal > 0 else math.inf
    return math.inf if math.isnan(share) else share
