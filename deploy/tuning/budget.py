"""How much accuracy a tuned model may lose, as a user writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from edgeattn.deploy.tuning.scores import Score
from edgeattn.foundation import Registry, UserError
from edgeattn.models.spec import MIOU, TOP_1


@dataclass(frozen=True)
class Measure:
    """A kind of budget.

    Attributes:
        name: how it is called on the command line.
        summary: an example, and what it means.
        unit: of what is lost.
        allowance: from the number of the budget to the largest loss that keeps it; raises ValueError where it means
            nothing.
        loss: from a form's score and the original's to what was lost, in the unit.
        metric: the task metric that it measures, against ground truth; None where it needs none.
    """

    name: str
    summary: str
    unit: str
    allowance: Callable[[float], float]
    loss: Callable[[Score, Score], float]
    metric: str | None = None

    @property
    def key(self) -> str:
        """The name without its case."""
        return self.name.lower()


def _points(number: float) -> float:
    if not -100 <= number <= 0:
        raise ValueError("a change lies between -100 and 0 points")
    return -number


def _labels(number: float) -> float:
    if not 0 < number <= 100:
        raise ValueError("equal labels lie above 0 and up to 100 percent")
    return 100 - number


def _decibels(number: float) -> float:
    if not -20 <= number <= 200:
        raise ValueError("a useful signal-to-noise ratio lies between -20 and 200 dB")
    return -number


def _task(name: str, metric: str, example: str) -> Measure:
    """Return the measure of a task metric."""
    return Measure(
        name,
        f"'{name} -0.3': at most 0.3 points of {metric} below the FP32 original, {example}",
        f"points of {metric}",
        _points,
        lambda score, original: 100 * (original.task(metric) - score.task(metric)),
        metric,
    )


MEASURES: Registry[Measure] = Registry("measure")
MEASURES.add(_task("mIoU", MIOU, "against ground truth"))
MEASURES.add(_task("top1", TOP_1, "the same for classifiers"))
MEASURES.add(
    Measure(
        "labels",
        "'labels 99.5': at least 99.5 percent of the labels equal to the original's",
        "percent of the labels",
        _labels,
        lambda score, original: 100 * (1 - score.agreement),
    )
)
MEASURES.add(
    Measure(
        "snr",
        "'snr 20': outputs with at least 20 dB of signal to noise",
        "dB of noise over signal",
        _decibels,
        lambda score, original: -score.snr,
    )
)


@dataclass(frozen=True)
class Budget:
    """A measure and what may be lost of it.

    Attributes:
        text: as the user wrote it.
        measure: what is measured.
        allowance: the largest loss that keeps the budget, in the measure's unit.
    """

    text: str
    measure: Measure
    allowance: float

    def loss(self, score: Score, original: Score) -> float:
        """Return what a form lost, in the measure's unit; infinite where it did not run or cannot be measured."""
        loss = math.inf if score.failure else self.measure.loss(score, original)
        return math.inf if math.isnan(loss) else loss

    def keeps(self, score: Score, original: Score) -> bool:
        """Whether a form's score stays within the budget."""
        return self.loss(score, original) <= self.allowance


def parse_budget(text: str) -> Budget:
    """Read a budget such as "mIoU -0.3", "labels 99.5" or "snr 20".

    Raises:
        UserError: another form, an unknown measure, or a number that means nothing.
    """
    forms = "; ".join(measure.summary for measure in MEASURES)
    match = re.fullmatch(r"\s*([A-Za-z]+1?)\s*([-+]?\d+(?:\.\d*)?|[-+]?\.\d+)\s*(?:%|points?|dB)?\s*", text)
    if match is None:
        raise UserError(f"the budget {text!r} is not a measure and a number. Write {forms}.")
    measure = next((entry for entry in MEASURES if entry.key == match[1].lower()), None)
    if measure is None:
        raise UserError(f"the budget {text!r} names the unknown measure {match[1]!r}. Write {forms}.")
    try:
        allowance = measure.allowance(float(match[2]))
    except ValueError as error:
        raise UserError(f"the budget {text!r} cannot be kept or broken: {error}. Write {measure.summary}.") from error
    return Budget(text.strip(), measure, allowance)
