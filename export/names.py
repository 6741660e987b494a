"""Names for new nodes and tensors."""

from __future__ import annotations

from collections.abc import Iterable


def fresh_name(stem: str, taken: Iterable[str]) -> str:
    """Return `stem`, or `stem_2`, `stem_3`, ... if it is taken."""
    known = taken if isinstance(taken, (set, dict, frozenset)) else set(taken)
    name, count = stem, 1
    while name in known:
        count += 1
        name = f"{stem}_{count}"
    return name


def claim_name(stem: str, taken: set[str]) -> str:
    """Return a fresh name and add it to `taken`."""
    name = fresh_name(stem, taken)
    taken.add(name)
    return name
