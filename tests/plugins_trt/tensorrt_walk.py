"""Plays TensorRT to the Python plugins, in a process that has TensorRT's bindings but not its library.

The classes between the registered functions and TensorRT are NVIDIA's own (`tensorrt.plugin`), and they are called in
the order in which TensorRT calls them. Imitated are the plugin registry, symbolic sizes (integers that know whether
TensorRT would know them at build time), and the places that receive results.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy.typing  # noqa: F401
import tensorrt as trt
import tensorrt.plugin as trtp

_TENSOR = importlib.import_module("tensorrt_bindings.plugin._tensor")

_OPERATIONS = {
    "SUM": lambda left, right: left + right,
    "SUB": lambda left, right: left - right,
    "PROD": lambda left, right: left * right,
    "FLOOR_DIV": lambda left, right: left // right,
    "CEIL_DIV": lambda left, right: -(-left // right),
    "MAX": max,
    "MIN": min,
}


class Extent(int):
    """A symbolic size: its value at run time, and whether that is known at build time."""

    known: bool

    def __new__(cls, value: int, known: bool) -> Extent:
        extent = super().__new__(cls, value)
        extent.known = known
        return extent

    def is_constant(self) -> bool:
        return self.known

    def get_constant_value(self) -> int:
        assert self.known, "TensorRT does not know this size at build time"
        return int(self)


class Builder:
    """`trt.IExprBuilder`."""

    def constant(self, value: int) -> Extent:
        return value if isinstance(value, Extent) else Extent(value, True)

    def operation(self, operation: Any, left: Extent, right: Extent) -> Extent:
        value = _OPERATIONS[operation.name](int(left), int(right))
        return Extent(value, left.known and right.known)


class Registry:
    """`trt.IPluginRegistry`."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class Place:
    """`trt.IKernelLaunchParams` and `trt.ISymExprs`: take what they are given."""

    def __init__(self) -> None:
        self.scalars: dict[int, int] = {}

    def __setitem__(self, index: int, value: int) -> None:
        self.scalars[index] = value


def imitate() -> Registry:
    """Put the imitations in their places and return the registry."""
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.DimsExprs = lambda length: [None] * length
    _TENSOR.SymExprImpl = lambda expression: int(expression._expr)
    return registry


def _description(shape: list[int], known: list[bool], data_type: Any, format_: Any) -> Any:
    description = trt.DynamicPluginTensorDesc()
    description.desc.dims = trt.Dims([size if fixed else -1 for size, fixed in zip(shape, known, strict=True)])
    description.desc.type = data_type
    description.desc.format = format_
    description.min = trt.Dims([size if fixed else 1 for size, fixed in zip(shape, known, strict=True)])
    description.opt = description.max = trt.Dims(shape)
    return description


def walk(
    registry: Registry, name: str, shapes: list[list[int]], known: list[list[bool]], types: list[str], layout: str
) -> dict[str, Any]:
    """Take one plugin through an engine build.

    Args:
        registry: from `imitate`.
        name: of the plugin.
        shapes: of its inputs.
        known: for every axis, whether the network fixes it.
        types: `trt.DataType` members of its inputs.
        layout: the last of the supported combinations is used for "channels-last", the first for "linear".

    Returns:
        Types and shapes of the outputs, supported combinations, launch parameters, scalars, kernel name and PTX.
    """
    creator = registry.get_creator(name, "1", "edgeattn")
    plugin = creator.create_plugin(
        name,
        "edgeattn",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    data_types = [getattr(trt.DataType, kind) for kind in types]
    output_types = plugin.get_output_data_types(data_types, [len(shape) for shape in shapes])
    assert len(output_types) == plugin.get_num_outputs()
    extents = [
        [Extent(size, fixed) for size, fixed in zip(shape, fixed_axes, strict=True)]
        for shape, fixed_axes in zip(shapes, known, strict=True)
    ]
    output_shapes = plugin.get_output_shapes(extents, [], Builder())
    linear = trt.TensorFormat.LINEAR
    in_out = [
        _description([int(size) for size in shape], [size.known for size in shape], kind, linear)
        for shape, kind in zip([*extents, *output_shapes], [*data_types, *output_types], strict=True)
    ]
    count = len(shapes)
    flat = plugin.get_supported_format_combinations(in_out, count)
    combinations = [flat[start : start + len(in_out)] for start in range(0, len(flat), len(in_out))]
    chosen = combinations[-1 if layout == "channels-last" else 0]
    for description, choice in zip(in_out, chosen, strict=True):
        assert description.desc.type == choice.type
        description.desc.format = choice.format
    plugin.configure_plugin(in_out[:count], in_out[count:])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, scalars = Place(), Place()
    plugin.get_launch_params(None, in_out, count, launch, scalars, Builder())
    kernel, ptx = plugin.get_kernel([item.desc for item in in_out[:count]], [item.desc for item in in_out[count:]])
    assert scalars.nbSymExprs == len(scalars.scalars)
    return {
        "types": [kind.name for kind in output_types],
        "shapes": [[int(size) for size in shape] for shape in output_shapes],
        "combinations": [[f"{item.type.name} {item.format.name}" for item in items] for items in combinations],
        "grid": [launch.grid_x, launch.grid_y, launch.grid_z],
        "block": [launch.block_x, launch.block_y, launch.block_z],
        "shared": launch.shared_mem,
        "scalars": [scalars.scalars[index] for index in range(scalars.nbSymExprs)],
        "kernel": kernel,
        "ptx": ptx.decode(),
        "names": [definition for definition in dir(trtp.op.edgeattn) if definition == name],
    }
