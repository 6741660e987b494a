"""A model with every size known: inputs pinned, functions inlined, constants told apart from what runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx_ir.passes import common as ir_passes

from edgeattn.export.metadata import metadata_of, module_scopes
from edgeattn.export.names import unique_node_names
from edgeattn.export.rewrite.sizes import Sizes
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGINS

_KEPT_VALUES = 1024
"""Elements up to which the values of an initializer are kept; of larger ones, the weights, only the size counts."""

_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


@dataclass(frozen=True)
class Tensor:
    """Element type (`TensorProto.DataType`) and shape of a tensor."""

    element: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Node:
    """A node that runs.

    Attributes:
        name: unique name.
        op_type: operator.
        domain: its domain, "" for the standard one.
        inputs: tensor names, "" for one that is left out.
        outputs: likewise.
        attributes: plain attributes by name.
        module: path of the torch module it came from, or "".
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module: str


@dataclass(frozen=True)
class SizedGraph:
    """A model's main graph for one choice of input sizes.

    Attributes:
        nodes: nodes that run, in execution order; what depends on constants alone is not among them.
        tensors: every tensor whose type and shape are known.
        inputs: names of the inputs.
        outputs: names of the outputs.
        constants: names of initializers and of everything that depends on them alone.
        stored_as: for constants behind a DequantizeLinear, the constant that is stored.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]
    stored_as: Mapping[str, str]


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the values of large initializers, so that nothing that follows copies them."""
    result = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(result, field.name).extend(value)
        elif field.message_type is not None:
            getattr(result, field.name).CopyFrom(value)
        else:
            setattr(result, field.name, value)
    graph = result.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        graph.initializer.append(_light(tensor))
    for sparse in model.graph.sparse_initializer:
        dense = TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)
        graph.initializer.append(_without_values(dense))
    return result


def _light(tensor: TensorProto) -> TensorProto:
    external = tensor.data_location == TensorProto.EXTERNAL
    if math.prod(tensor.dims) <= _KEPT_VALUES and not external:
        return tensor
    return _without_values(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))


def _without_values(tensor: TensorProto) -> TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="values-are-not-read")
    return tensor


def free_axes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Return the shape of every input; a free axis is its name, or "?" for one without a name.

    Raises:
        UserError: an input is no tensor of known rank.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        if not kind.elem_type or not kind.HasField("shape"):
            raise UserError(
                f"the input {value.name!r} is no tensor of known rank, so nothing can be estimated. Export the model "
                "with tensor inputs."
            )
        shapes[value.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim
        )
    return shapes


def image_sizes(
    model: onnx.ModelProto, *, size: tuple[int, int] | None = None, batch: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of inputs whose free axes are batch (axis 0), height and width (axes 2 and 3 of images).

    Args:
        model: any model.
        size: (height, width) of images.
        batch: size of a free axis 0.

    Returns:
        Shapes of the inputs that have free axes, as `estimate` takes them, as far as the arguments decide them. A free
        axis that they leave open is missing there, and `estimate` asks for it.

    Raises:
        UserError: a size or batch is given, and no input has such a free axis, or its size is fixed to another one.
    """
    found: dict[str, tuple[int, ...]] = {}
    used = {"--size": size is None, "--batch": batch is None}
    for name, shape in free_axes(model).items():
        wanted: dict[int, tuple[str, int]] = {}
        if batch is not None:
            wanted[0] = "--batch", batch
        if size is not None and len(shape) == 4:
            wanted |= {2: ("--size", size[0]), 3: ("--size", size[1])}
        for axis, (option, extent) in wanted.items():
            if axis < len(shape) and (isinstance(shape[axis], str) or shape[axis] == extent):
                used[option] = True
            elif axis < len(shape) and option == "--size":
                raise UserError(
                    f"the input {name!r} has the fixed shape {_text(shape)}, which is not the given size. Leave "
                    f"{option} out, or export the model with --dynamic or at that size."
                )
        full = [wanted[axis][1] if axis in wanted and isinstance(e, str) else e for axis, e in enumerate(shape)]
        if any(isinstance(extent, str) for extent in shape) and not any(isinstance(extent, str) for extent in full):
            found[name] = tuple(int(extent) for extent in full)
    if unused := [option for option, done in used.items() if not done]:
        shapes = ", ".join(f"{name} {_text(shape)}" for name, shape in free_axes(model).items())
        raise UserError(
            f"{' and '.join(unused)} has nothing to set: the inputs are {shapes}. Leave it out, or name whole shapes: "
            "--input NAME=1x128x64."
        )
    return found


def _text(shape: tuple[int | str, ...]) -> str:
    return "x".join(str(extent) for extent in shape) or "scalar"


def pin_inputs(model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Write the sizes of inputs into a model, in place, and return the shape of every input.

    Raises:
        UserError: an unknown input, a shape that does not fit, or a free axis without a size.
    """
    declared = free_axes(model)
    if unknown := [name for name in sizes if name not in declared]:
        raise UserError(f"the model has no input {unknown[0]!r}. Its inputs are {', '.join(declared) or 'none'}.")
    result: dict[str, tuple[int, ...]] = {}
    named: dict[str, tuple[str, int]] = {}
    for name, shape in declared.items():
        given = sizes.get(name, shape)
        if len(given) != len(shape):
            raise UserError(
                f"the input {name!r} is {_text(shape)}, but {_text(given)} was given. Give {len(shape)} axes."
            )
        for axis, (extent, wanted) in enumerate(zip(shape, given, strict=True)):
            if isinstance(wanted, str):
                raise UserError(
                    f"axis {axis} ({wanted}) of the input {name!r} ({_text(shape)}) is free, and an estimate needs its "
                    "size. Give --size HEIGHTxWIDTH and --batch N for images, or --input "
                    f"{name}={'x'.join(str(e) if isinstance(e, int) else '1' for e in shape)} with the sizes you use."
                )
            if wanted < 1 or (isinstance(extent, int) and extent != wanted):
                raise UserError(
                    f"axis {axis} of the input {name!r} ({_text(shape)}) cannot be {wanted}. Give the size it has, or "
                    "export the model with that axis free."
                )
            if isinstance(extent, str) and extent != "?" and named.setdefault(extent, (name, wanted))[1] != wanted:
                other, size = named[extent]
                raise UserError(
                    f"{extent} is {size} in the input {other!r} and {wanted} in {name!r}. Give both the same size."
                )
        result[name] = tuple(int(extent) for extent in given)
    for value in model.graph.input:
        for dim, extent in zip(value.type.tensor_type.shape.dim, result.get(value.name, ()), strict=False):
            dim.dim_value = extent
    return result


def inlined(model: onnx.ModelProto, *, plugins: bool) -> onnx.ModelProto:
    """Return a model with its local functions in place of their calls.

    Args:
        model: any model without large values, see `without_weights`.
        plugins: also those of the plugin operations; otherwise plugin nodes stay, and their bodies are dropped.
    """
    kept = [function for function in model.functions if function.domain != DOMAIN or plugins]
    if not kept:
        result = onnx.ModelProto()
        result.CopyFrom(model)
        del result.functions[:]
        return result
    inner = ir.from_proto(model)
    for identifier in [key for key, function in inner.functions.items() if function.domain == DOMAIN and not plugins]:
        del inner.functions[identifier]
    ir_passes.InlinePass()(inner)
    return ir.to_proto(inner)


def sized(model: onnx.ModelProto) -> SizedGraph:
    """Return the graph of a model whose inputs are pinned and whose functions are inlined.

    Raises:
        UserError: control flow, an unknown plugin operation, or a tensor whose size cannot be inferred.
    """
    graph = model.graph
    known_plugins = {spec.op_type for spec in PLUGINS}
    for node in graph.node:
        if node.op_type in _CONTROL_FLOW and not node.domain:
            raise UserError(
                f"the node {node.name or node.output[0]!r} is {node.op_type}: how often its body runs depends on data, "
                "so nothing can be estimated. Export the model without data-dependent control flow."
            )
        if node.domain == DOMAIN and node.op_type not in known_plugins:
            raise UserError(
                f"the node {node.name or node.output[0]!r} ({node.op_type}) is one launch of a plugin operation. "
                "Estimate the plugin form from before the launches were expanded."
            )
    sizes = Sizes(model, height=1, width=1)
    tensors = {
        name: Tensor(sizes.element_types[name], shape)
        for name, shape in sizes.shapes.items()
        if name in sizes.element_types
    }
    initializers = frozenset(tensor.name for tensor in graph.initializer)
    constants = {*initializers, *(name for name in sizes.values)}
    stored_as: dict[str, str] = {}
    nodes: list[Node] = []
    for node, name in zip(graph.node, unique_node_names(graph), strict=True):
        produced = [output for output in node.output if output]
        if all(not value or value in constants for value in node.input) or all(o in constants for o in produced):
            constants.update(produced)
            if node.op_type == "DequantizeLinear":
                stored_as[produced[0]] = stored_as.get(node.input[0], node.input[0])
            continue
        nodes.append(
            Node(
                name,
                node.op_type,
                "" if node.domain == "ai.onnx" else node.domain,
                tuple(node.input),
                tuple(node.output),
                {entry.name: _plain(entry) for entry in node.attribute if entry.type != onnx.AttributeProto.GRAPH},
                next(iter(reversed(module_scopes(metadata_of(node)))), ""),
            )
        )
        if unsized := [output for output in produced if output not in tensors]:
            raise UserError(
                f"the size of {unsized[0]!r}, a result of the node {name!r} ({node.op_type}), cannot be inferred. Give "
                "a model of fixed size, or one whose sizes do not depend on data."
            )
    outputs = tuple(value.name for value in graph.output)
    inputs = tuple(value.name for value in graph.input if value.name not in initializers)
    return SizedGraph(tuple(nodes), tensors, inputs, outputs, frozenset(constants), stored_as)


def _plain(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def element_bytes(element: int) -> float:
    """Return the size of one element; half a byte for four-bit types."""
    if element in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return 0.5
    return float(np.dtype(helper.tensor_dtype_to_np_dtype(element)).itemsize)


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without the values of its weights.

    Raises:
        UserError: it does not exist or is no ONNX model.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read the model {path}: {error.strerror or error}. Check the path.") from error
    except Exception as error:  # protobuf's DecodeError has no stable home across protobuf releases
        raise UserError(f"{path} is not an ONNX model: {error}. Export it again.") from error
    if not model.graph.node:
        raise UserError(f"{path} is not an ONNX model: it has no nodes. Give a .onnx file.")
    return model
