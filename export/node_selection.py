"""Choosing nodes by their own name or by the torch module that they came from."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

import onnx

from edgeattn.export.metadata import module_scopes
from edgeattn.export.names import unique_node_names
from edgeattn.foundation import UserError


def selected_names(
    nodes: Iterable[tuple[str, Mapping[str, str]]], selectors: Collection[str], option: str
) -> frozenset[str]:
    """Return the names of the nodes that a user's list chooses.

    Args:
        nodes: name and metadata of every node of the graph.
        selectors: node names, or torch module paths that stand for everything inside the module (`"head.cca"` also
            means `"head.cca.query_conv"`).
        option: name of the list, for the message.

    Raises:
        UserError: an entry matches no node; the message suggests the nearest names.
    """
    if isinstance(selectors, str):
        raise UserError(f"{option} is the text {selectors!r}. Give a list of node names or module paths.")
    chosen: set[str] = set()
    unmatched, known = set(selectors), set()
    for name, metadata in nodes:
        paths = {scope for scope in module_scopes(metadata) if scope}
        known |= {name, *paths}
        hits = {entry for entry in selectors if entry and (entry == name or _covers(entry, paths))}
        unmatched -= hits
        if hits:
            chosen.add(name)
    if unmatched:
        entry = min(unmatched)
        near = difflib.get_close_matches(entry, sorted(known), n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{option} names {entry!r}, but the graph has no such node or torch module.{hint}")
    return frozenset(chosen)


def _covers(entry: str, paths: Collection[str]) -> bool:
    return any(path == entry or path.startswith(entry + ".") for path in paths)


def with_node_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node of the main graph has a unique name; names that are unique already stay."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node, name in zip(copy.graph.node, unique_node_names(model.graph), strict=True):
        node.name = name
    return copy
