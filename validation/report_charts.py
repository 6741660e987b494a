"""Charts as inline SVG: the picture stretches with the page, all text is HTML and keeps its size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_EDGE = 1.5
"""Percent of the width that stay free on both sides, so that marks at the ends are seen whole."""

_TICKS = 6
"""Labels on an axis at most: what fits a phone."""


@dataclass(frozen=True)
class Scale:
    """Where numbers lie on an axis, in percent of its length.

    Attributes:
        low: the number at the beginning; of a logarithmic axis its log10.
        high: the number at the end, likewise.
        logarithmic: equal steps are equal factors.
    """

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def linear(cls, values: Iterable[float]) -> Scale:
        """Return an axis from 0 to the largest finite number."""
        high = max((value for value in values if math.isfinite(value)), default=0.0)
        return cls(0.0, high if high > 0 else 1.0, logarithmic=False)

    @classmethod
    def decades(cls, values: Iterable[float]) -> Scale:
        """Return a logarithmic axis of whole decades that holds all positive finite numbers."""
        logarithms = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
        low, high = math.floor(min(logarithms)), math.ceil(max(logarithms))
        return cls(low, max(high, low + 1), logarithmic=True)

    def at(self, value: float) -> float:
        """Return the place of a number; what lies beyond the axis, or is NaN, goes to its nearer end."""
        place = value
        if self.logarithmic:
            place = math.log10(value) if 0 < value < math.inf else -math.inf if value <= 0 else math.inf
        place = min(max(place, self.low), self.high) if not math.isnan(place) else self.high
        return round(_EDGE + (100 - 2 * _EDGE) * (place - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Places and labels of the axis."""
        if self.logarithmic:
            step = max(1, math.ceil((self.high - self.low) / (_TICKS - 1)))
            exponents = range(int(self.low), int(self.high) + 1, step)
            return tuple((self.at(10.0**exponent), _power(exponent)) for exponent in exponents)
        width = _round_step((self.high - self.low) / (_TICKS - 1))
        count = int((self.high - self.low) / width + 1e-9)
        values = [self.low + width * index for index in range(count + 1)]
        return tuple((self.at(value), f"{value:g}") for value in values)


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Mark:
    """One drawn line.

    Attributes:
        kind: class that the page's style knows.
        path: SVG path; both axes run from 0 to 100.
    """

    kind: str
    path: str


@dataclass(frozen=True)
class Row:
    """A labelled row of a chart.

    Attributes:
        label: what it is about.
        note: its figures in words, so that nothing has to be read from the picture.
        marks: what is drawn, the later over the earlier.
        alarm: it needs the reader's attention.
    """

    label: str
    note: str
    marks: tuple[Mark, ...]
    alarm: bool = False


@dataclass(frozen=True)
class RowChart:
    """Rows over one common axis.

    Attributes:
        axis: what the axis shows.
        scale: the axis.
        rows: from top to bottom.
        limits: class and number of lines through all rows.
        legend: class and meaning of what is drawn.
    """

    axis: str
    scale: Scale
    rows: tuple[Row, ...]
    limits: tuple[tuple[str, float], ...] = ()
    legend: tuple[tuple[str, str], ...] = ()

    @property
    def lines(self) -> tuple[Mark, ...]:
        """The limits, drawn."""
        return tuple(Mark(kind, f"M{self.scale.at(value)} 0V100") for kind, value in self.limits)


@dataclass(frozen=True)
class CurveChart:
    """Curves over two axes.

    Attributes:
        title: what a reader who cannot see it is told.
        horizontal: what the horizontal axis shows.
        vertical: what the vertical axis shows.
        across: places and labels of the horizontal axis.
        up: the vertical axis.
        marks: the curves.
        legend: class and meaning of each.
    """

    title: str
    horizontal: str
    vertical: str
    across: tuple[tuple[float, str], ...]
    up: Scale
    marks: tuple[Mark, ...]
    legend: tuple[tuple[str, str], ...]


def bar(kind: str, scale: Scale, start: float, end: float, *, height: float = 50) -> Mark:
    """Return a thick line between two numbers of a row's axis."""
    return Mark(kind, f"M{scale.at(start)} {height:g}H{scale.at(end)}")


def dot(kind: str, across: float, up: float = 50) -> Mark:
    """Return a dot at a place, both in percent."""
    return Mark(kind, f"M{across:g} {up:g}h0")


def curve(kind: str, places: Sequence[tuple[float, float]]) -> Mark:
    """Return a line through places in percent, from the left and from the top."""
    return Mark(kind, "M" + "L".join(f"{across:g} {up:g}" for across, up in places))


def stairs(kind: str, places: Sequence[tuple[float, float]], end: float) -> Mark:
    """Return a line of level steps that begin at places in percent; the last one lasts until `end`."""
    steps = "".join(f"H{across:g}V{up:g}" for across, up in places)
    return Mark(kind, f"M{places[0][0]:g} 100{steps}H{end:g}V100")


def spread(labels: Iterable[tuple[float, str]], gap: float = 22.0) -> tuple[tuple[float, str], ...]:
    """Return the labels that are at least a gap, in percent, to the right of the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in labels:
        if not kept or place >= kept[-1][0] + gap:
            kept.append((place, text))
    return tuple(kept)
