"""What torch's exporter writes beside a node: the torch module that it came from."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import onnx

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of the torch module paths from the root inwards, a list literal that ends in the torch node's name:
`['', 'head', 'head.cca', 'softmax_1']`."""

CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"
"""Metadata key of the classes of those modules, a list literal that ends in the torch operation."""


def metadata_of(node: onnx.NodeProto) -> dict[str, str]:
    """Return a node's metadata by key."""
    return {entry.key: entry.value for entry in node.metadata_props}


def parsed_list(literal: str) -> list[str]:
    """Read a list literal that torch's exporter wrote; anything else counts as no path."""
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def module_scopes(metadata: Mapping[str, str]) -> list[str]:
    """Return the module paths from the root inwards; empty where the node does not say."""
    return parsed_list(metadata.get(NAME_SCOPES, "[]"))[:-1]
