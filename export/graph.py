"""One way into onnx-graphsurgeon and back that loses nothing.

Graph-surgeon's own exporter drops the metadata of nodes, graph and model, the documentation strings and part of the
`value_info`. Here it is used for what it is good at, editing a graph of linked objects; on the way back every part
that the editing did not touch is taken from the source model, proto by proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush
from itertools import takewhile

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from edgeattn.export.metadata import NAME_SCOPES, metadata_of, module_scopes, parsed_list
from edgeattn.export.names import unique_node_names
from edgeattn.export.opsets import IR_VERSION

CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"
"""Metadata key of the classes along the module path, a list literal of the same length."""

NAMESPACE = "namespace"
"""Metadata key that holds both, as `scope: class` pairs joined by slashes."""


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Import a model's main graph into graph-surgeon, with unique node names.

    Args:
        model: the model; it is not modified, but the graph refers to its tensors, so it has to outlive the graph.

    Returns:
        The graph. Nodes are found again by name on the way back, so a pass must not rename them.
    """
    graph = OnnxImporter.import_graph(
        model.graph,
        opset=OnnxImporter.get_opset(model),
        import_domains=[onnx.OperatorSetIdProto.FromString(entry.SerializeToString()) for entry in model.opset_import],
        ir_version=max(model.ir_version, IR_VERSION),
    )
    for node, name in zip(graph.nodes, unique_node_names(model.graph), strict=True):
        node.name = name
    return graph


def export_graph(
    graph: gs.Graph, source: onnx.ModelProto, *, inherited: Mapping[str, Sequence[str]] | None = None
) -> onnx.ModelProto:
    """Turn an edited graph back into a model.

    Nodes are matched by name: one that the source has keeps its metadata, documentation string and subgraphs
    (control-flow bodies are carried over unread), and takes its connections and its other attributes from the graph.
    Functions, opset imports, and the metadata of model and graph come from the source.

    Args:
        graph: graph from `import_graph(source)`, edited.
        source: the model it came from.
        inherited: for new nodes, the names of the source nodes whose metadata they take over.

    Returns:
        A new model, topologically sorted (stably: a graph that is in order stays as it is).
    """
    originals = dict(zip(unique_node_names(source.graph), source.graph.node, strict=True))
    result = _without_graph(source)
    result.ir_version = max(source.ir_version, IR_VERSION)
    for node in stable_sort(graph.nodes):
        proto = _export_node(node, originals.get(node.name))
        ancestors = [originals[name] for name in (inherited or {}).get(node.name, ())]
        if ancestors and node.name not in originals:
            _inherit(proto, ancestors)
        result.graph.node.append(proto)
    _export_tensors(graph, source.graph, result.graph)
    known = {entry.domain for entry in result.opset_import}
    for domain in sorted({node.domain for node in result.graph.node} - known):
        result.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return result


def stable_sort(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """Sort topologically, keeping the given order wherever it is a valid one."""
    place = {id(node): index for index, node in enumerate(nodes)}
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for index, node in enumerate(nodes):
        reads = [tensor for tensor in node.inputs if tensor.inputs]
        captured = (name for subgraph in node.subgraphs(recursive=True) for name in _captured(subgraph))
        before = {place[id(tensor.inputs[0])] for tensor in (*reads, *captured) if id(tensor.inputs[0]) in place}
        sorter.add(index, *(before - {index}))
    sorter.prepare()
    ready, order = list(sorter.get_ready()), []
    heapify(ready)
    while ready:
        index = heappop(ready)
        order.append(nodes[index])
        sorter.done(index)
        for following in sorter.get_ready():
            heappush(ready, following)
    return order


def _captured(subgraph: gs.Graph) -> Iterator[gs.Tensor]:
    """Yield the produced tensors that the nodes of a control-flow body read."""
    for node in subgraph.nodes:
        yield from (tensor for tensor in node.inputs if tensor.inputs)


def _without_graph(source: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model except for the nodes and tensors of its graph."""
    result = onnx.ModelProto()
    _copy_fields(source, result, skip={"graph"})
    _copy_fields(source.graph, result.graph, skip={"node", "initializer", "sparse_initializer", "value_info"})
    return result


def _copy_fields(source: onnx.ModelProto | onnx.GraphProto, target: object, *, skip: set[str]) -> None:
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if field.is_repeated:
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _export_node(node: gs.Node, original: onnx.NodeProto | None) -> onnx.NodeProto:
    """Export one node, on top of its original where there is one."""
    if original is None:
        return OnnxExporter.export_node(node)
    proto = onnx.NodeProto()
    proto.CopyFrom(original)
    proto.name, proto.op_type = node.name, node.op
    if node.domain is not None:
        proto.domain = node.domain
    proto.input[:] = [tensor.name for tensor in node.inputs]
    proto.output[:] = [tensor.name for tensor in node.outputs]
    old = {attribute.name: attribute for attribute in original.attribute}
    del proto.attribute[:]
    kept = {name: old[name] for name, value in node.attrs.items() if name in old and not _edited(value, old[name])}
    # Attributes of types that graph-surgeon does not know are not in `attrs`; they pass through.
    kept.update({name: value for name, value in old.items() if name not in node.attrs and _unknown(value)})
    new = {name: value for name, value in node.attrs.items() if name not in kept}
    kept.update(zip(new, OnnxExporter.export_attributes(new), strict=True))
    proto.attribute.extend(kept[name] for name in [*old, *(name for name in new if name not in old)] if name in kept)
    return proto


_PLAIN = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.STRINGS: "strings",
}


def _edited(value: object, original: onnx.AttributeProto) -> bool:
    """Tell whether a plain attribute differs from the source; tensors and subgraphs are replaced whole or not."""
    if original.type not in _PLAIN or original.ref_attr_name:
        return not isinstance(value, (gs.Tensor, gs.Graph, gs.Node.AttributeRef))
    before = getattr(original, _PLAIN[original.type])
    if original.type == onnx.AttributeProto.STRING:
        return value != before.decode()
    if original.type == onnx.AttributeProto.STRINGS:
        return value != [item.decode() for item in before]
    return value != (before if original.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT) else list(before))


def _unknown(attribute: onnx.AttributeProto) -> bool:
    return attribute.type not in _PLAIN and attribute.type not in (
        onnx.AttributeProto.TENSOR,
        onnx.AttributeProto.GRAPH,
    )


def _names_in(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Yield every tensor name that nodes read, those inside their subgraphs included."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _names_in(subgraph.node)
                yield from (output.name for output in subgraph.output)


def _export_tensors(graph: gs.Graph, source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    """Fill inputs, outputs, initializers and value_info of `target`, from the source wherever it has them."""
    for field, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        known = {value.name: value for value in getattr(source, field)}
        del getattr(target, field)[:]
        getattr(target, field).extend(
            known.get(tensor.name) or OnnxExporter.export_value_info_proto(tensor, True) for tensor in tensors
        )
    constants = {
        tensor.name: tensor
        for node in graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and not tensor.inputs
    }
    read = {*_names_in(target.node), *(output.name for output in target.output)}
    # What nothing read in the source either is not ours to drop.
    keep = read | ({value.name for value in source.initializer} - {*_names_in(source.node)})
    before = {tensor.name for tensor in source.initializer}
    target.initializer.extend(
        tensor
        if not _replaced(constants.get(tensor.name), tensor)
        else OnnxExporter.export_tensor_proto(constants[tensor.name])
        for tensor in source.initializer
        if tensor.name in keep
    )
    sparse = {tensor.values.name for tensor in source.sparse_initializer}
    target.sparse_initializer.extend(tensor for tensor in source.sparse_initializer if tensor.values.name in keep)
    target.initializer.extend(
        OnnxExporter.export_tensor_proto(tensor)
        for name, tensor in constants.items()
        if name not in before and name not in sparse
    )
    boundary = {value.name for value in (*target.input, *target.output)}
    present = {name for node in target.node for name in node.output} | {tensor.name for tensor in target.initializer}
    described = {value.name for value in source.value_info}
    target.value_info.extend(value for value in source.value_info if value.name in present)
    target.value_info.extend(
        OnnxExporter.export_value_info_proto(tensor, True)
        for node in graph.nodes
        for tensor in node.outputs
        if tensor.name and tensor.dtype is not None and tensor.name not in described | boundary
    )


def _replaced(constant: gs.Constant | None, original: onnx.TensorProto) -> bool:
    """Tell whether a pass gave an initializer other values; one that was never read is still lazy, hence unchanged."""
    if constant is None or not isinstance(constant._values, np.ndarray):
        return False
    return not np.array_equal(constant.values, numpy_helper.to_array(original), equal_nan=constant.dtype.kind == "f")


def _inherit(node: onnx.NodeProto, ancestors: Sequence[onnx.NodeProto]) -> None:
    """Give a new node the metadata of the nodes it stands for.

    The module path is the deepest module that all of them belong to, with the new node as its leaf; what has no
    common part (torch node, stack trace) comes from the last of them.
    """
    last = metadata_of(ancestors[-1])
    if len(ancestors) > 1:
        every = [metadata_of(item) for item in ancestors]
        operator = f"{node.domain or 'onnx'}.{node.op_type}"
        leaves = {NAME_SCOPES: node.name, CLASS_HIERARCHY: operator}
        for key, leaf in leaves.items():
            if key in last:
                parents = [parsed_list(item.get(key, "[]"))[:-1] for item in every]
                last[key] = repr([*_common(parents), leaf])
        if NAMESPACE in last:
            parents = [item.get(NAMESPACE, "").split("/")[:-1] for item in every]
            last[NAMESPACE] = "/".join([*_common(parents), f"{node.name}: {operator}"])
    for key, value in last.items():
        node.metadata_props.add(key=key, value=value)


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the longest common prefix."""
    return [items[0] for items in takewhile(lambda items: len(set(items)) == 1, zip(*paths, strict=False))]


def module_path(*nodes: onnx.NodeProto) -> str:
    """Return the dotted path of the innermost torch module that all the nodes belong to, `""` where they do not say."""
    paths = [module_scopes(metadata_of(node)) for node in nodes]
    return next(iter(reversed(_common(paths))), "")


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    """Return the value of an initializer or Constant node, through Identity nodes, and None for anything else."""
    while tensor.inputs and tensor.inputs[0].op == "Identity":
        tensor = tensor.inputs[0].inputs[0]
    if isinstance(tensor, gs.Constant):
        return tensor.values
    if tensor.inputs and tensor.inputs[0].op == "Constant":
        value = tensor.inputs[0].attrs.get("value")
        return value.values if isinstance(value, gs.Constant) else None
    return None
