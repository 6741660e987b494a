"""Names for new nodes and tensors."""

from __future__ import annotations

from collections.abc import Iterable

import onnx


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


def unique_node_names(graph: onnx.GraphProto) -> list[str]:
    """Return a unique, non-empty name for each node, equal to the node's own name wherever that is unique already."""
    taken = {node.name for node in graph.node if node.name}
    names: list[str] = []
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{index}"
        if name in seen or (not node.name and name in taken):
            name = fresh_name(name, taken)
        taken.add(name)
        seen.add(name)
        names.append(name)
    return names
