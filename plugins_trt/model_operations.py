"""Which plugin operations an ONNX model holds, with the sizes and data types that their kernels are compiled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.registry import spec_of
from edgeattn.plugins_trt.selection import Operation, chosen_specs
from edgeattn.plugins_trt.spec import DOMAIN, PluginSpec

_ELEMENTS: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}

_Known = tuple[int, tuple[int | None, ...]]
"""Data type and shape of a tensor; a size is None where it varies or is unknown."""


def operations_of(path: str | Path, names: Sequence[str] = ()) -> list[Operation]:
    """Return the plugin operations of a model, each combination of sizes and data type once, in order.

    Args:
        path: ONNX file with nodes of domain `edgeattn`, with or without their bodies.
        names: names of operations, or of operators, to leave out the others; all when empty.

    Raises:
        UserError: the file is not a model, holds no such node, or a size that is compiled in cannot be inferred; an
            operation has no kernels.
    """
    chosen = chosen_specs(names)
    kernels_for = ", ".join(spec.name for spec in chosen)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read the model {path}: {error.strerror or error}. Check the path.") from error
    except Exception as error:  # protobuf has several exception types for bytes that are no message
        raise UserError(f"{path} is not an ONNX model: {error}. Give a .onnx file.") from error
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        raise UserError(
            f"{path} has no plugin nodes (domain {DOMAIN}). Give a model that `edgeattn export --plugins` wrote."
        )
    found: dict[tuple[object, ...], Operation] = {}
    known = _shapes(model, nodes)
    for node in nodes:
        spec = spec_of(node.op_type, len(node.input))
        if spec not in chosen and names:
            continue
        if spec not in chosen:
            raise UserError(
                f"{path}: the node {node.name or node.output[0]!r} is {spec.name}, which has no kernels. Leave it to "
                f"its body by naming the others: --operation {kernels_for}."
            )
        operation = _operation(node, spec, known, path)
        found.setdefault((operation.spec.name, *operation.static.items(), operation.elements), operation)
    if not found:
        raise UserError(f"{path} holds none of the chosen operations: {kernels_for}. Choose others with --operation.")
    return list(found.values())


def _shapes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> dict[str, _Known]:
    """Return type and shape of all tensors as far as they can be inferred, plugin nodes without bodies included."""
    while True:
        graph = _inferred(model).graph
        known: dict[str, _Known] = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            if kind.elem_type and kind.HasField("shape"):
                shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
                known[value.name] = kind.elem_type, shape
        added = [
            helper.make_tensor_value_info(name, element, shape)
            for node in nodes
            for name, (element, shape) in _output_shapes(node, known).items()
            if name and name not in known
        ]
        if not added:
            return known
        model.graph.value_info.extend(added)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise UserError(f"the model's shapes contradict each other: {error}. Check it with onnx.checker.") from error


def _output_shapes(node: onnx.NodeProto, known: dict[str, _Known]) -> dict[str, _Known]:
    """Return type and shape of a plugin node's outputs; nothing where those of an input are unknown."""
    spec = spec_of(node.op_type, len(node.input))
    if any(name not in known for name in node.input):
        return {}
    sizes: dict[str, int | None] = {"1": 1}
    for tensor, name in zip(spec.inputs, node.input, strict=True):
        for symbol, size in zip(tensor.shape, known[name][1], strict=False):
            sizes[symbol] = size if sizes.get(symbol) is None else sizes[symbol]
    element = known[node.input[0]][0]
    return {
        name: (element, tuple(sizes.get(symbol) for symbol in tensor.shape))
        for tensor, name in zip(spec.outputs, node.output, strict=False)
    }


def _operation(node: onnx.NodeProto, spec: PluginSpec, known: dict[str, _Known], path: str | Path) -> Operation:
    place = f"{path}: the node {node.name or node.output[0]!r} ({node.op_type})"
    sizes: dict[str, int] = {}
    elements = set()
    for tensor, name in zip(spec.inputs, node.input, strict=True):
        if name not in known:
            continue
        element, shape = known[name]
        elements.add(element)
        if len(shape) != len(tensor.shape):
            raise UserError(
                f"{place}: its input {tensor.name} ({name!r}) has the shape {_text(shape)}, but needs "
                f"{len(tensor.shape)} axes: {', '.join(tensor.shape)}. Export the model again."
            )
        for symbol, size in zip(tensor.shape, shape, strict=True):
            if size is not None and sizes.setdefault(symbol, size) != size:
                raise UserError(
                    f"{place}: {symbol} is {size} in its input {tensor.name}, but {sizes[symbol]} in an earlier one. "
                    "Export the model again."
                )
    if unknown := [name for name in spec.static if name not in sizes]:
        raise UserError(
            f"{place}: {', '.join(unknown)} cannot be inferred, and kernels are compiled for it. Export the model with "
            f"known channels, or name the sizes: --operation {spec.name} --size {_example(spec)}."
        )
    if not elements:
        raise UserError(f"{place}: the type of its inputs cannot be inferred. Export the model again.")
    if len(elements) > 1 or elements.isdisjoint(_ELEMENTS):
        names = ", ".join(sorted(helper.tensor_dtype_to_string(element) for element in elements))
        raise UserError(
            f"{place}: its inputs have the types {names}; kernels take one of {', '.join(_ELEMENTS.values())}."
        )
    return Operation(spec, {name: sizes[name] for name in spec.static}, (_ELEMENTS[elements.pop()],))


def _text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _example(spec: PluginSpec) -> str:
    return ",".join(f"{name}=64" for name in spec.static)
