"""Which assignments a search tries, in which order: from the default quantisation to what keeps the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edgeattn.deploy.tuning.modules import Module
from edgeattn.deploy.tuning.search import Assignment, Change, Measured, Search

Harm = tuple[float, ...]

Alone = Callable[[str], Mapping[str, Harm]]
"""From a precision to the harm that each module does when it alone gets that precision."""

Savings = Callable[[Assignment, Assignment], Mapping[str, float]]
"""From an assignment and a more exact one to the seconds that each module saves by having the former's precision, all
others having it too."""


@dataclass
class Strategy:
    """Search for one model.

    Attributes:
        search: measures assignments on the part of the samples that the search may see.
        confirm: whether an assignment keeps the budget on the other part.
        alone: see `Alone`; asked only for precisions that the search needs.
        savings: see `Savings`.
        modules: the modules.
        noisy: modules that the default quantisation leaves in floating point.
        confirmations: assignments that the other part was asked about, with its answer.
    """

    search: Search
    confirm: Callable[[Assignment], bool]
    alone: Alone
    savings: Savings
    modules: Sequence[Module]
    noisy: frozenset[str]
    confirmations: dict[str, bool] = field(default_factory=dict)

    @property
    def exact(self) -> Assignment:
        """Everything FP32."""
        return Assignment(dict.fromkeys((module.name for module in self.modules), "fp32"), "fp32")

    @property
    def half(self) -> Assignment:
        """Everything FP16 that FP16 allows."""
        return Assignment(dict.fromkeys((module.name for module in self.modules), "fp16"), "fp16")

    @property
    def every(self) -> Assignment:
        """INT8 wherever there is an INT8 form, FP16 around it."""
        return self._quantised(self.half, [module.name for module in self.modules if module.layers])

    @property
    def start(self) -> Assignment:
        """INT8 where the default quantisation has it, FP16 around it."""
        quiet = [module.name for module in self.modules if module.layers and module.name not in self.noisy]
        return self._quantised(self.half, quiet)

    def run(self) -> Measured:
        """Return the cheapest assignment found that keeps the budget on both parts of the samples."""
        exact, half, *_ = self.search.measure([self.exact, self.half, self.start])
        floor = half if self.search.keeps(half) else self._within_fp16(half)
        if floor is None:
            return exact
        for option in self._options(floor):
            if self.confirm_once(option.assignment):
                return option
        return exact

    def trace(self, count: int) -> None:
        """Measure up to `count` assignments between the default quantisation and FP16, for the plot."""
        quantised = [name for name, kind in self.start.precisions.items() if kind == "int8"]
        stages = Search.stages(self.start, self._taken_out(quantised, self.half)) if count and quantised else []
        inner = stages[:-1]
        places = sorted({round((place + 1) * len(inner) / (count + 1)) for place in range(count)})
        self.search.measure([inner[place] for place in places if place < len(inner)])

    def confirm_once(self, assignment: Assignment) -> bool:
        """Ask the other part of the samples, or remember its answer."""
        if assignment.key not in self.confirmations:
            self.confirmations[assignment.key] = self.confirm(assignment)
        return self.confirmations[assignment.key]

    def _within_fp16(self, half: Measured) -> Measured | None:
        """Return FP16 with as many modules in FP32 as the budget needs."""
        harm, seconds = self.alone("fp16"), self.savings(half.assignment, self.exact)
        changes = [Change(module.name, "fp32", harm[module.name], seconds[module.name]) for module in self.modules]
        return next(self.search.take_out(half.assignment, changes), None)

    def _options(self, floor: Measured) -> Iterator[Measured]:
        """Yield what keeps the budget on the search's part: the cheapest first, then ever more exact ones."""
        levels = floor.assignment.precisions
        quantised = [name for name, kind in self.start.precisions.items() if kind == "int8" and levels[name] != "fp32"]
        begin = self.search.measure([self._quantised(floor.assignment, quantised)])[0]
        further = self._further(begin.assignment, quantised, floor.assignment)
        first = begin if self.search.keeps(begin) else next(further, floor)
        best = self.search.improve(first, self._improvements(first.assignment, floor.assignment))
        cheap = [best, first, *([floor] if floor.seconds < best.seconds else [])]
        yield from sorted(cheap, key=lambda option: (option.seconds, option.loss))
        yield from further
        yield floor

    def _further(self, begin: Assignment, quantised: Sequence[str], floor: Assignment) -> Iterator[Measured]:
        """Yield what keeps the budget while INT8 modules are taken out; nothing is measured before it is asked for."""
        if quantised:
            yield from self.search.take_out(begin, self._taken_out(quantised, floor))

    def _taken_out(self, quantised: Sequence[str], floor: Assignment) -> list[Change]:
        harm, seconds = self.alone("int8"), self.savings(self.every, self.half)
        return [Change(name, floor.precisions[name], harm[name], seconds[name]) for name in quantised]

    def _improvements(self, first: Assignment, floor: Assignment) -> list[Change]:
        """Return INT8 where it is missing and saves time, and what is better than INT8 where INT8 saves none."""
        names = [module.name for module in self.modules if module.layers]
        seconds = self.savings(self.every, self.half)
        idle = [name for name in names if first.precisions[name] == "int8" and seconds[name] < 0]
        left = [name for name in names if first.precisions[name] != "int8" and seconds[name] > 0]
        harm = self.alone("int8") if left else {}
        return [
            *(Change(name, floor.precisions[name], (-math.inf,), -seconds[name]) for name in idle),
            *(Change(name, "int8", harm[name], seconds[name]) for name in left),
        ]

    @staticmethod
    def _quantised(base: Assignment, names: Sequence[str]) -> Assignment:
        return Assignment({**base.precisions, **dict.fromkeys(names, "int8")}, base.rest)
