"""Plugin nodes expanded into one node per kernel launch, for TensorRT's Python plugins.

Those run one kernel each and have no workspace (see `edgeattn.plugins_trt.launch_plugins`), so the workspaces of an
operation become tensors between its launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgeattn.export.graph import export_graph, import_graph
from edgeattn.export.names import claim_name
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGIN_VERSION, spec_of
from edgeattn.plugins_trt.launch_plugins import LaunchPlugin, LaunchTensor, launch_plugins_of


@dataclass(frozen=True)
class ExpandedLaunches:
    """A model whose plugin nodes are launches.

    Attributes:
        model: the model, without the bodies of the operations that were expanded. It runs in TensorRT only.
        expanded: names of the nodes that were expanded.
        kept: operator by name of the nodes that stay as they are, because no kernel exists for them.
    """

    model: onnx.ModelProto
    expanded: tuple[str, ...]
    kept: Mapping[str, str]

    @property
    def notes(self) -> list[str]:
        """What a user should read about nodes that stay as they are."""
        return [f"{name} ({operator}) runs its body: no kernel exists for it" for name, operator in self.kept.items()]


def expand_launches(model: onnx.ModelProto) -> ExpandedLaunches:
    """Replace every plugin node by one node per launch of its operation.

    The new nodes carry the metadata of the one they replace, and `aot` = 1, by which TensorRT's parser asks for the
    ahead-of-time form of a Python plugin.

    Args:
        model: plugin form, with or without bodies; not modified.

    Raises:
        UserError: an unknown operation, or a node that the operation's kernels cannot stand for.
    """
    graph = import_graph(model)
    names = {node.name for node in graph.nodes}
    tensors = {tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    nodes: list[gs.Node] = []
    inherited: dict[str, tuple[str]] = {}
    expanded: list[str] = []
    kept: dict[str, str] = {}
    for node in graph.nodes:
        plugins = launch_plugins_of(spec_of(node.op, len(node.inputs))) if node.domain == DOMAIN else ()
        if not plugins:
            nodes.append(node)
            if node.domain == DOMAIN:
                kept[node.name] = node.op
            continue
        launches = _launch_nodes(node, plugins, names, tensors)
        inherited |= {launch.name: (node.name,) for launch in launches}
        nodes += launches
        expanded.append(node.name)
    graph.nodes = nodes
    result = export_graph(graph, model, inherited=inherited)
    _drop_unused_bodies(result, set(kept.values()))
    return ExpandedLaunches(result, tuple(expanded), kept)


def _launch_nodes(
    node: gs.Node, plugins: tuple[LaunchPlugin, ...], names: set[str], tensors: set[str]
) -> list[gs.Node]:
    """Return the nodes that stand for a plugin node, which loses its inputs and outputs.

    Args:
        node: the plugin node.
        plugins: the launches of its operation.
        names: node names in use; the new ones are added.
        tensors: tensor names in use; the new ones are added.
    """
    spec = plugins[0].spec
    values = dict(zip((tensor.name for tensor in spec.inputs), node.inputs, strict=True))
    if len(node.outputs) != len(spec.outputs):
        raise UserError(
            f"the node {node.name!r} ({node.op}) has {len(node.outputs)} outputs, and its kernels write "
            f"{len(spec.outputs)}. Name all of them, also those that nothing reads."
        )
    for output, value in zip(spec.outputs, node.outputs, strict=True):
        if not value.name:
            value.name = claim_name(f"{node.name}/{output.name}", tensors)
        values[output.name] = value
    sizes = _known_sizes(node, [tensor.shape for tensor in (*spec.inputs, *spec.outputs)])
    kind = next((value.dtype for value in (*node.inputs, *node.outputs) if value.dtype is not None), None)
    node.inputs.clear()
    node.outputs.clear()
    launches = []
    for plugin in plugins:
        for tensor in plugin.writes:
            if tensor.name not in values:
                name = claim_name(f"{node.name}/{tensor.name}", tensors)
                values[tensor.name] = _workspace(name, tensor, kind, sizes)
        launches.append(
            gs.Node(
                plugin.name,
                claim_name(f"{node.name}/{plugin.launch.name}", names),
                {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION, "aot": 1},
                [values[tensor.name] for tensor in plugin.reads],
                [values[tensor.name] for tensor in plugin.writes],
                domain=DOMAIN,
            )
        )
    return launches


def _workspace(name: str, tensor: LaunchTensor, kind: object, sizes: Mapping[str, object]) -> gs.Variable:
    """Return the tensor for a workspace. Axes that the tiling decides, which depends on the GPU, have no size."""
    dtype = kind if tensor.element == "data" else np.dtype(tensor.element)
    return gs.Variable(name, dtype, [sizes.get(axis) for axis in tensor.axes])


def _known_sizes(node: gs.Node, symbols: list[tuple[str, ...]]) -> dict[str, object]:
    """Return what the shapes of a node's tensors say about every size: an integer, or the name of a dynamic axis."""
    sizes: dict[str, object] = {}
    for axes, value in zip(symbols, [*node.inputs, *node.outputs], strict=True):
        for axis, extent in zip(axes, value.shape or (), strict=False):
            if extent is not None and extent != "":
                sizes.setdefault(axis, extent)
    return sizes


def _drop_unused_bodies(model: onnx.ModelProto, used: set[str]) -> None:
    """Remove the functions of domain `edgeattn` that no node calls any more."""
    kept = [function for function in model.functions if function.domain != DOMAIN or function.name in used]
    del model.functions[:]
    model.functions.extend(kept)
