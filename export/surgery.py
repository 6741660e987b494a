"""Passes that give a model the form its runtime needs: plugin nodes with or without bodies, or standard operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer

from edgeattn.export.graph import constant_value, export_graph, import_graph
from edgeattn.export.names import fresh_name, unique_node_names
from edgeattn.export.opsets import IR_VERSION, standard_opset
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGIN_VERSION, PLUGINS, PluginSpec, spec_of
from edgeattn.plugins_trt.onnx_form import local_function

MINIMUM_OPSET = 18
"""Oldest version of the standard operators that the bodies are written and tested for."""

_CALL_SITE = "edgeattn.call_site"  # temporary metadata key: the call an inlined node comes from


def default_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a model imports.

    Raises:
        UserError: older than the plugin bodies need, or not imported at all.
    """
    version = standard_opset(model)
    if version < MINIMUM_OPSET:
        raise UserError(
            f"the model uses opset {version}, and the attention operations need {MINIMUM_OPSET} or later. Export it "
            f"again with opset_version={MINIMUM_OPSET}, or convert it with onnx.version_converter.convert_version."
        )
    return version


def attach_plugins(model: onnx.ModelProto, *, fp32_island: bool = False) -> onnx.ModelProto:
    """Make every node of domain `edgeattn` runnable: as a TensorRT plugin, and by its body anywhere else.

    Each node gets the attributes `plugin_namespace` and `plugin_version`, by which TensorRT finds the plugin, and the
    model gets one local function of standard operators per operation, at the model's own opset. Calling it again
    changes nothing, except that the bodies follow `fp32_island`.

    Args:
        model: any model; not modified.
        fp32_island: whether the bodies keep queries, keys, energies and the softmax in FP32 (for FP16 models).

    Returns:
        The plugin form of the model.

    Raises:
        UserError: an unknown operation, an opset that is too old, a node inside a control-flow body, or one
            operation used with different numbers of inputs (TensorRT knows functions by name only).
    """
    graph = import_graph(model)
    specs = _operations(graph, model)
    for node in graph.nodes:
        if node.domain == DOMAIN:
            node.attrs.update(plugin_namespace=DOMAIN, plugin_version=PLUGIN_VERSION)
    result = _drop_bodies(export_graph(graph, model))
    if specs:
        opset = default_opset(model)
        result.functions.extend(local_function(spec, opset, fp32_island=fp32_island) for spec in specs)
    return result


def _operations(graph: gs.Graph, model: onnx.ModelProto) -> list[PluginSpec]:
    """Return the operations that a graph uses, in order, and refuse what TensorRT could not tell apart."""
    hidden = [node for node in _nested_nodes(model.graph) if node.domain == DOMAIN]
    if hidden:
        raise UserError(
            f"the node {hidden[0].name!r} ({hidden[0].op_type}) is inside the body of a control-flow node, where "
            "TensorRT runs no plugin. Export the model without data-dependent control flow around its attention."
        )
    users: dict[str, dict[str, str]] = defaultdict(dict)
    specs: dict[str, PluginSpec] = {}
    for node in graph.nodes:
        if node.domain == DOMAIN:
            spec = spec_of(node.op, len(node.inputs))
            users[node.op].setdefault(spec.name, node.name)
            specs.setdefault(spec.name, spec)
    for op_type, by_spec in users.items():
        if len(by_spec) > 1:
            listed = " and ".join(f"{len(specs[name].inputs)} inputs (node {node!r})" for name, node in by_spec.items())
            raise UserError(
                f"the model uses {op_type} with {listed}, but functions are found by name only, so one model can hold "
                "one of the two. Give every block of the model the same gate setting."
            )
    return list(specs.values())


def _nested_nodes(graph: onnx.GraphProto, *, inside: bool = False) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of control-flow bodies."""
    for node in graph.node:
        if inside:
            yield node
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nested_nodes(body, inside=True)


def strip_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the bodies of the plugin operations.

    TensorRT up to 10.6 runs a body that it finds even when the plugin is registered, so it has to be given none. The
    result no longer runs in ONNX Runtime; ONNX's checker takes it, as operators of an unknown domain.

    Args:
        model: plugin form; not modified.

    Returns:
        The same model without the functions of domain `edgeattn`.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return _drop_bodies(result)


def _drop_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the functions of domain `edgeattn` in place and return the model."""
    for index in reversed([place for place, item in enumerate(model.functions) if item.domain == DOMAIN]):
        del model.functions[index]
    return model


def inline_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn the plugin form into the plain form: standard operators only.

    The bodies replace the plugin nodes, each node of a body carries the metadata of its call and the name
    `<call>/<step>`, and what became constant is folded: in a model of fixed size the criss-cross mask is one boolean
    initializer. Quantisation nodes are never folded, and no large tensor is created or copied.

    Args:
        model: plugin form with bodies; not modified.

    Returns:
        The plain form, without anything of domain `edgeattn`.

    Raises:
        UserError: a plugin node has no body (it was stripped).
    """
    bodies = {(function.domain, function.name) for function in model.functions}
    missing = [node for node in model.graph.node if node.domain == DOMAIN and (DOMAIN, node.op_type) not in bodies]
    if missing:
        raise UserError(
            f"the node {missing[0].name!r} ({missing[0].op_type}) has no body to inline. Use the model from before "
            "the bodies were stripped, or attach them again with edgeattn.export.surgery.attach_plugins."
        )
    inlined = ir.from_proto(model)
    for node, name in zip(inlined.graph, unique_node_names(model.graph), strict=True):
        node.name = name
        if node.domain == DOMAIN:
            node.metadata_props[_CALL_SITE] = name
    steps = {
        function.name: [(node.name or "", [value.name or "" for value in node.outputs]) for node in function]
        for function in inlined.functions.values()
        if function.domain == DOMAIN
    }
    calls = {node.name or "": (node.op_type, [value.name for value in node.outputs]) for node in inlined.graph}
    ir_passes.InlinePass(criteria=lambda function: function.domain == DOMAIN)(inlined)
    _name_inlined(inlined, calls, steps)
    _fold(inlined)
    result = ir.to_proto(inlined)
    result.ir_version = max(result.ir_version, IR_VERSION)
    return result


def _name_inlined(
    model: ir.Model, calls: dict[str, tuple[str, list[str | None]]], steps: dict[str, list[tuple[str, list[str]]]]
) -> None:
    """Name inlined nodes and their results `<call>/<step>`, and drop the temporary mark of their call.

    Args:
        model: after inlining; the nodes of one call stand in the order of the body.
        calls: operator and output names of every node before inlining, by node name.
        steps: name and output names of the nodes of each body, by operator.
    """
    node_names = {node.name or "" for node in model.graph}
    value_names = {value.name or "" for node in model.graph for value in (*node.inputs, *node.outputs) if value}
    done: dict[str, int] = defaultdict(int)
    for node in model.graph:
        call = node.metadata_props.pop(_CALL_SITE, None)
        if call is None:
            continue
        operator, results = calls[call]
        step, outputs = steps[operator][done[call]]
        done[call] += 1
        prefix = spec_prefix(step)
        node.name = fresh_name(f"{call}/{step.removeprefix(prefix)}", node_names)
        node_names.add(node.name)
        for value, output in zip(node.outputs, outputs, strict=True):
            if value.name not in results:
                value.name = fresh_name(f"{call}/{output.removeprefix(prefix)}", value_names)
                value_names.add(value.name)


def spec_prefix(name: str) -> str:
    """Return the prefix that a tensor name inside a plugin body starts with, or an empty one."""
    return next((spec.prefix for spec in PLUGINS if name.startswith(spec.prefix)), "")


# One boolean mask of 1024 x 1024 is the largest constant that folding may create.
_LARGEST_CONSTANT = 1024 * 1024

_NEVER_FOLDED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConstantOfShape", "Expand", "Tile"}


def _fold(model: ir.Model) -> None:
    """Fold what is constant and remove what is unused, keeping names and metadata."""
    known = {
        value.name: (node.name, dict(node.metadata_props))
        for node in model.graph
        for value in node.outputs
        if value.name
    }
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        output_size_limit=_LARGEST_CONSTANT,
        should_fold=lambda node: False if node.op_type in _NEVER_FOLDED else None,
    )
    for clean in (
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
    ):
        clean(model)
    for node in model.graph:
        name, metadata = known.get(node.outputs[0].name or "", (node.name, {}))
        node.name = name
        if not node.metadata_props:
            node.metadata_props.update(metadata)
        for value in node.outputs:
            value.metadata_props.pop(optimizer.FOLDED_FROM_KEY, None)
    for value in model.graph.initializers.values():
        value.metadata_props.pop(optimizer.FOLDED_FROM_KEY, None)


def fold_conv_batchnorm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold every inference BatchNormalization into the convolution it follows, in FP64 arithmetic.

    A pair is folded when nothing else reads the convolution's result and all parameters are constants. Convolutions
    that share their weight and BatchNormalizations that share their parameters are folded each on its own, and equal
    pairs share the folded weight.

    Args:
        model: any model; not modified.

    Returns:
        The folded model. The convolution keeps its name and metadata and takes over the result's name.
    """
    graph = import_graph(model)
    outputs = {id(tensor) for tensor in graph.outputs}
    taken = {tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    folded: dict[tuple[object, ...], tuple[gs.Constant, gs.Constant]] = {}
    absorbed: set[int] = set()
    for norm in graph.nodes:
        convolution = _foldable(norm, outputs)
        if convolution is None:
            continue
        key = (
            *(tensor.name for tensor in (*convolution.inputs[1:], *norm.inputs[1:])),
            norm.attrs.get("epsilon", 1e-5),
        )
        if key not in folded:
            stem = convolution.inputs[1].name
            names = [fresh_name(f"{stem}.folded", taken), fresh_name(f"{stem}.folded_bias", taken)]
            taken.update(names)
            weight, bias = _folded(convolution, norm)
            folded[key] = gs.Constant(names[0], weight), gs.Constant(names[1], bias)
        convolution.inputs = [convolution.inputs[0], *folded[key]]
        result = norm.outputs[0]
        norm.outputs.clear()
        convolution.outputs = [result]
        absorbed.add(id(norm))
    graph.nodes = [node for node in graph.nodes if id(node) not in absorbed]
    _drop_unread_constants(graph)
    return export_graph(graph, model)


def _drop_unread_constants(graph: gs.Graph) -> None:
    """Remove Constant nodes that folding left without a reader."""
    outputs = {id(tensor) for tensor in graph.outputs}
    graph.nodes = [
        node
        for node in graph.nodes
        if node.op != "Constant" or node.outputs[0].outputs or id(node.outputs[0]) in outputs
    ]


def _foldable(norm: gs.Node, outputs: set[int]) -> gs.Node | None:
    """Return the convolution that a node can be folded into, if the node is such a BatchNormalization."""
    if norm.op != "BatchNormalization" or norm.domain or norm.attrs.get("training_mode", 0):
        return None
    source = norm.inputs[0]
    if any(tensor.name for tensor in norm.outputs[1:]) or len(source.outputs) != 1 or id(source) in outputs:
        return None
    convolution = source.inputs[0] if source.inputs else None
    if convolution is None or convolution.op != "Conv" or convolution.domain:
        return None
    parameters = (*convolution.inputs[1:], *norm.inputs[1:])
    return convolution if all(constant_value(tensor) is not None for tensor in parameters if tensor.name) else None


def _folded(convolution: gs.Node, norm: gs.Node) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of the convolution that does both."""
    weight, *given = [constant_value(tensor) for tensor in convolution.inputs[1:] if tensor.name]
    gain, shift, mean, variance = (np.float64(constant_value(tensor)) for tensor in norm.inputs[1:])
    assert weight is not None  # `_foldable` has checked
    bias = np.float64(given[0]) if given else np.float64(0)
    scale = gain / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    new_weight = np.float64(weight) * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return new_weight.astype(weight.dtype), ((bias - mean) * scale + shift).astype(weight.dtype)
