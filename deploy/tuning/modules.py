"""The torch modules of a graph, as what gets a precision of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from edgeattn.export.emulation import EXACT_OPS
from edgeattn.export.int8_layers import plan_layers
from edgeattn.export.metadata import metadata_of, module_scopes
from edgeattn.export.precision_types import element_types, is_float, write_types
from edgeattn.foundation import UserError

GRANULARITIES = ("layer", "block")
"""Modules that hold no other module with nodes of its own, or everything below a module path of some depth."""

BLOCK_DEPTH = 2
"""Names in the path of a block: `layer3.0`, `head.cca`."""


@dataclass(frozen=True)
class Module:
    """A torch module, or a node that belongs to none below the network itself.

    Attributes:
        name: the module's path; of such a node its own name.
        nodes: names of its nodes that compute with floating-point numbers and round.
        layers: those of them that have an INT8 form.
    """

    name: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


def modules_of(
    model: onnx.ModelProto,
    *,
    granularity: str = "layer",
    depth: int | None = None,
    attention: bool = False,
    excluded: Collection[str] = (),
) -> tuple[Module, ...]:
    """Group the nodes of a graph by the torch module that they came from.

    Nodes that only move, select or compare numbers belong to no group: rounding them again changes nothing.

    Args:
        model: FP32 graph with unique node names and the exporter's metadata.
        granularity: "layer" for the innermost module of every node, "block" for the first names of its path.
        depth: how many names with "block"; `BLOCK_DEPTH` when None.
        attention: products of two activations that belong to an attention have an INT8 form too.
        excluded: names of nodes that are never INT8.

    Returns:
        The groups in the order of their first node.

    Raises:
        UserError: the granularity is unknown, a depth is given with "layer", or is less than 1.
    """
    if granularity not in GRANULARITIES:
        raise UserError(f"unknown granularity {granularity!r}. Choose {' or '.join(GRANULARITIES)}.")
    if depth is not None and (granularity != "block" or depth < 1):
        raise UserError(f"the depth {depth} needs the granularity block and a number from 1 on. Change or drop it.")
    limit = None if granularity == "layer" else depth or BLOCK_DEPTH
    working = ir.from_proto(model)
    plan = plan_layers(working.graph, excluded=excluded, attention=attention)
    quantisable = {layer.node for layer in plan.layers}
    rounding = _rounding_nodes(model)
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.name in rounding:
            groups.setdefault(_path(node, limit), []).append(node.name)
    return tuple(
        Module(name, tuple(nodes), tuple(node for node in nodes if node in quantisable))
        for name, nodes in groups.items()
    )


def _path(node: onnx.NodeProto, limit: int | None) -> str:
    path = next(reversed(module_scopes(metadata_of(node))), "")
    return ".".join(path.split(".")[:limit]) or node.name


def _rounding_nodes(model: onnx.ModelProto) -> Collection[str]:
    """Return the nodes with a floating-point result that is not simply one of their inputs' numbers."""
    working = ir.from_proto(model)
    write_types(working, element_types(model))
    return {
        str(node.name)
        for node in working.graph
        if (node.domain or node.op_type not in EXACT_OPS) and any(is_float(value) for value in node.outputs)
    }
