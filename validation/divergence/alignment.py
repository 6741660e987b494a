"""Which tensors of two forms are the same tensor of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from edgeattn.validation.divergence.forms import Outline
from edgeattn.validation.divergence.scopes import Place, ScopedGraph

_PREFERRED = ("out", "tensor", "in", "network")
"""Of several places with one tensor the first kind counts: what a module makes says more than what another reads."""


@dataclass(frozen=True)
class Alignment:
    """Tensors of the form that is taken apart, and the places of the other form that hold the same.

    Attributes:
        places: place of the other form, by tensor.
        order: position of the other form's places in its order of computation.
        inputs: what modules of the other form read where the form taken apart has them read a tensor that another
            place stands for: that tensor, and the module. Both hold the same numbers unless something between is lost.
        missing: calls of modules of the other form that have no counterpart, by the position of their result.
        unaligned: modules of the form taken apart none of whose tensors has a counterpart.
    """

    places: Mapping[str, Place]
    order: Mapping[Place, int]
    inputs: Mapping[Place, tuple[str, str]]
    missing: Mapping[int, Place]
    unaligned: tuple[str, ...]

    def missing_between(self, starts: Iterable[str], end: str) -> list[Place]:
        """Return the results of modules without counterpart that the other form computes between some tensors."""
        first = max((self.order[self.places[name]] for name in starts if name in self.places), default=-1)
        last = self.order[self.places[end]] if end in self.places else len(self.order)
        return [place for position, place in sorted(self.missing.items()) if first < position < last]


def align(
    outline: Outline, dissected: Mapping[Place, str], graph: ScopedGraph, shapes: Mapping[str, tuple[int, ...]]
) -> Alignment:
    """Align two forms.

    Args:
        outline: what the one form can give.
        dissected: tensors of the other form, the one that is taken apart, by place.
        graph: the graph of the latter.
        shapes: of its tensors, 0 where a size is not known.
    """
    order = {place: index for index, place in enumerate(outline.places)}
    theirs, ours = calls_in(outline.places), calls_in(dissected)
    their_counts, our_counts = _counts(outline.places), _counts(dissected)
    ordered = _same_shapes(outline, dissected, shapes, theirs, ours)
    chosen: dict[str, Place] = {}
    inputs: dict[Place, tuple[str, str]] = {}
    ranked = sorted(dissected, key=lambda place: (_PREFERRED.index(place.side), -place.path.count(".")))
    for place in ranked:
        other = _counterpart(place, theirs.get(place.path, 0), ours[place.path])
        if other is not None:
            other = outline.stand_ins.get(other, other)
        if other not in order:
            continue
        # Several inputs come in no order that both forms share; several outputs do, where their shapes agree.
        count = their_counts[_key(other)]
        if count == our_counts[_key(place)] and (count == 1 or _key(other) in ordered):
            known = chosen.setdefault(dissected[place], other)
            if known != other and place.side == "in":
                inputs[other] = (dissected[place], place.path)
    reached = {place.path for place, tensor in dissected.items() if tensor in chosen}
    missing = {
        order[place]: place
        for place in order
        if place.side == "out" and place.index == 0 and _is_missing(place, outline, theirs, graph)
    }
    return Alignment(chosen, order, inputs, missing, tuple(path for path in graph.paths if path not in reached))


def common_module(paths: Sequence[str]) -> str:
    """Return the innermost module that holds all of some modules."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def calls_in(places: Iterable[Place]) -> dict[str, int]:
    """Return the number of calls of each module."""
    calls: dict[str, int] = defaultdict(int)
    for place in places:
        calls[place.path] = max(calls[place.path], place.call + 1)
    return calls


def _counts(places: Iterable[Place]) -> dict[tuple[str, int, str], int]:
    """Return the number of tensors on each side of each call."""
    counts: dict[tuple[str, int, str], int] = defaultdict(int)
    for place in places:
        counts[_key(place)] += 1
    return counts


def _key(place: Place) -> tuple[str, int, str]:
    return place.path, place.call, place.side


def _counterpart(place: Place, theirs: int, ours: int) -> Place | None:
    """Return the same place of the other form; where this form shows inner steps as calls, the outer ones of them."""
    if theirs == 0:
        return place
    if ours % theirs:
        return None
    steps = ours // theirs
    call, rest = divmod(place.call, steps)
    if rest != (steps - 1 if place.side == "out" else 0):
        return None
    return Place(place.path, call, place.side, place.index)


def _same_shapes(
    outline: Outline,
    dissected: Mapping[Place, str],
    shapes: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, int],
    ours: Mapping[str, int],
) -> set[tuple[str, int, str]]:
    """Return the calls of the other form all of whose results have the shapes of their counterparts, one by one."""
    fits: dict[tuple[str, int, str], bool] = {}
    for place, tensor in dissected.items():
        other = _counterpart(place, theirs.get(place.path, 0), ours[place.path])
        if other is None or place.side == "in":
            continue
        known, found = outline.places.get(other), shapes.get(tensor)
        same = not (known and found) or (
            len(known) == len(found) and all(b in (0, a) for a, b in zip(known, found, strict=True))
        )
        fits[_key(other)] = fits.get(_key(other), True) and same
    return {key for key, same in fits.items() if same}


def _is_missing(place: Place, outline: Outline, theirs: Mapping[str, int], graph: ScopedGraph) -> bool:
    """Tell whether what a call of a module makes may not be made in the graph."""
    calls = graph.calls.get(place.path)
    if calls is None:
        return place.path in outline.leaves
    if place.path in graph.silent:
        return True
    return place.path in outline.leaves and calls < theirs[place.path]
