"""The search for the cheapest assignment within a budget: knows nothing of models, data or targets.

Greedy with verification: single modules are measured alone, and those with the worst loss per saved second are taken
out first; whether the budget is kept is never predicted, but measured on each complete assignment. What was taken out
is put back where the budget allows it. The answer does not depend on how many trials run at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

PRECISIONS = ("int8", "fp16", "fp32")
"""From the cheapest to the most exact."""


@dataclass(frozen=True)
class Assignment:
    """A precision for each module.

    Attributes:
        precisions: by module.
        rest: of the nodes that belong to no module, and of what surrounds INT8 layers: "fp16" or "fp32".
    """

    precisions: Mapping[str, str]
    rest: str

    def changed(self, module: str, precision: str) -> Assignment:
        """Return the assignment with another precision for one module."""
        return Assignment({**self.precisions, module: precision}, self.rest)

    @property
    def key(self) -> str:
        """Equal for equal assignments."""
        return ";".join([f"rest={self.rest}", *(f"{name}={kind}" for name, kind in sorted(self.precisions.items()))])

    def count(self, precision: str) -> int:
        """Return how many modules have a precision."""
        return sum(kind == precision for kind in self.precisions.values())


@dataclass(frozen=True)
class Measured:
    """What is known of a complete assignment.

    Attributes:
        assignment: the assignment.
        loss: what it loses, in the unit of the budget.
        seconds: what it costs.
    """

    assignment: Assignment
    loss: float
    seconds: float


@dataclass(frozen=True)
class Change:
    """A change of one module's precision.

    Attributes:
        module: the module.
        precision: what it gets.
        damage: harm that the cheaper of the two precisions does alone, as numbers of which later ones break ties.
        seconds: what that precision saves.
    """

    module: str
    precision: str
    damage: tuple[float, ...]
    seconds: float

    @property
    def harm_per_second(self) -> tuple[float, ...]:
        """Damage for each saved second; infinite where nothing is saved."""
        return tuple(harm / self.seconds if self.seconds > 0 else math.inf for harm in self.damage)


Trials = Callable[[Sequence[Assignment]], Sequence[Measured]]
"""Measures complete assignments, at once where it can."""


@dataclass
class Search:
    """One search.

    Attributes:
        trials: measures assignments.
        allowance: the largest loss that keeps the budget.
        width: assignments measured at once.
        tried: everything that was measured, in order, each assignment once.
    """

    trials: Trials
    allowance: float
    width: int = 1
    tried: dict[str, Measured] = field(default_factory=dict)

    def measure(self, assignments: Sequence[Assignment]) -> list[Measured]:
        """Measure assignments, or remember them."""
        new = list({each.key: each for each in assignments if each.key not in self.tried}.values())
        for measured in self.trials(new) if new else ():
            self.tried[measured.assignment.key] = measured
        return [self.tried[each.key] for each in assignments]

    def keeps(self, measured: Measured) -> bool:
        """Whether the budget is kept; NaN does not keep it."""
        return measured.loss <= self.allowance

    def take_out(self, start: Assignment, changes: Sequence[Change]) -> Iterator[Measured]:
        """Yield the assignments within the budget among `start` with ever more changes, the worst first.

        Args:
            start: where to begin.
            changes: to more exact precisions, in any order.
        """
        stages = self.stages(start, changes)
        for place in range(0, len(stages), self.width):
            yield from (found for found in self.measure(stages[place : place + self.width]) if self.keeps(found))

    @staticmethod
    def stages(start: Assignment, changes: Sequence[Change]) -> list[Assignment]:
        """Return `start` with one, two, ... and all changes, the worst first."""
        found = [start]
        for change in sorted(changes, key=lambda each: each.harm_per_second, reverse=True):
            found.append(found[-1].changed(change.module, change.precision))
        return found[1:]

    def improve(self, base: Measured, changes: Sequence[Change]) -> Measured:
        """Return `base` with all changes that make it cheaper, one after the other, without leaving the budget.

        Args:
            base: within the budget.
            changes: expected to make it cheaper, in any order; those that do the least harm are tried first.
        """
        waiting = sorted(changes, key=lambda each: each.harm_per_second)
        while waiting:
            group = waiting[: self.width]
            found = self.measure([base.assignment.changed(each.module, each.precision) for each in group])
            accepted = next(
                (place for place, each in enumerate(found) if self.keeps(each) and each.seconds < base.seconds), None
            )
            if accepted is None:
                waiting = waiting[len(group) :]
            else:  # what stands behind it in the group has to be measured together with it
                base, waiting = found[accepted], waiting[accepted + 1 :]
        return base


def pareto(points: Sequence[Measured]) -> list[Measured]:
    """Return the points that no other one beats in both cost and loss, the cheapest first."""
    front: list[Measured] = []
    for point in sorted(points, key=lambda each: (each.seconds, each.loss)):
        if math.isfinite(point.loss) and (not front or point.loss < front[-1].loss):
            front.append(point)
    return front
