"""The operations as Python ahead-of-time plugins of TensorRT 10.15 and later.

`register_plugins` registers one plugin per kernel launch, because such a plugin runs one kernel and has no workspace;
`edgeattn.export.plugin_launches` gives a model the nodes that call them. Kernels are handed over as PTX. A built engine
holds them and needs neither Python nor this package.

TensorRT checks the functions that it is given against their signatures. Here they are closures that take any number of
tensors; the signature that `inspect.signature` reports, made of classes and not of their names, is in `__signature__`.

Not proved without a GPU: that TensorRT grants these kernels more than 48 KiB of dynamic shared memory.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from math import prod
from pathlib import Path
from types import GenericAlias
from typing import Any, NamedTuple, TypeVar

import numpy.typing  # noqa: F401  (TensorRT 11.4 uses it without importing it)

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.expressions import FUNCTIONS, evaluate
from edgeattn.plugins_trt.kernel_choice import KernelChoice
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.launch_plugins import LaunchPlugin, LaunchTensor, launch_plugins
from edgeattn.plugins_trt.spec import DOMAIN, LARGEST_IMAGE, LAYOUTS

MINIMUM_TENSORRT = (10, 15)
"""Oldest TensorRT whose Python plugins are used: 10.9 has them, and 10.14 breaks them."""

_INSTEAD = "Use the C++ plugin library, which TensorRT 10.0 and later load."


class _Type(NamedTuple):
    """How TensorRT calls a data type.

    Attributes:
        data_type: member of `trt.DataType`.
        combination: name in `AutoTuneCombination`.
        channels_last: member of `trt.TensorFormat` that is dense with channels last.
        channel_multiple: channels have to be a multiple of it, or the format pads them.
    """

    data_type: str
    combination: str
    channels_last: str
    channel_multiple: int


_TYPES = {
    "float16": _Type("HALF", "FP16", "HWC8", 8),
    "bfloat16": _Type("BF16", "BF16", "HWC8", 8),
    "float32": _Type("FLOAT", "FP32", "HWC", 1),
}

Extent = TypeVar("Extent")

_registered: KernelChoice | None = None


def register_plugins(
    library: KernelLibrary | str | Path | None = None, *, sm: int | None = None, lazy: bool = False
) -> tuple[str, ...]:
    """Register every launch of every operation as a plugin of namespace `edgeattn`.

    The ONNX parser finds them afterwards, in this process. Registering again from the same library changes nothing.

    Args:
        library: compiled kernels, or their folder (`edgeattn plugins build`); None compiles each kernel when TensorRT
            first asks for it, which takes Triton.
        sm: CUDA architecture whose kernels are used; None takes the only one of the library, or else the GPU's own.
        lazy: register with TensorRT only when a network adds a plugin by hand. The ONNX parser finds no lazy plugins.

    Returns:
        The operator names.

    Raises:
        UserError: TensorRT is missing or too old, the library cannot be used, or the plugins are registered already
            from another one.
    """
    global _registered
    trt, trtp = _tensorrt()
    choice = KernelChoice.of(library, sm)
    plugins = list(launch_plugins())
    names = tuple(plugin.name for plugin in plugins)
    if _registered is not None:
        if _registered.origin != choice.origin:
            raise UserError(
                f"the Python plugins are registered in this process already, with {_registered.origin}. Start a new "
                f"process to use {choice.origin}."
            )
        return names
    for plugin in plugins:
        _register(_Host(plugin, choice, trt, trtp), lazy=lazy)
    _registered = choice
    return names


def _tensorrt() -> tuple[Any, Any]:
    """Import TensorRT and its plugin module."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise UserError(
            f"Python plugins need TensorRT, which cannot be imported ({error}). Run `pip install tensorrt` on a "
            "machine with an NVIDIA GPU."
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if version < MINIMUM_TENSORRT:
        minimum = ".".join(map(str, MINIMUM_TENSORRT))
        raise UserError(
            f"TensorRT is {trt.__version__}, and Python plugins need {minimum} or later (10.14 breaks them). {_INSTEAD}"
        )
    return trt, importlib.import_module("tensorrt.plugin")


def _register(host: _Host, *, lazy: bool) -> None:
    """Register the three functions of a plugin."""
    trtp, plugin = host.trtp, host.plugin
    identity = f"{DOMAIN}::{plugin.name}"
    inputs = {tensor.name: trtp.TensorDesc for tensor in plugin.reads}
    outputs = GenericAlias(tuple, (trtp.TensorDesc,) * len(plugin.writes))
    lists = GenericAlias(list, (trtp.AutoTuneCombination,))
    kernels = GenericAlias(tuple, (str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
    shapes = _signed(host.output_descriptions, inputs, outputs)
    combinations = _signed(host.combinations, {**inputs, "outputs": outputs}, lists)
    kernel = _signed(host.kernel, {**inputs, "outputs": outputs, "tactic": int}, kernels)
    trtp.register(identity, lazy_register=lazy)(shapes)
    trtp.autotune(identity)(combinations)
    trtp.aot_impl(identity)(kernel)


def _signed(method: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> Callable[..., Any]:
    """Return a function that calls `method`, with the given signature in place of its own."""

    def function(*arguments: Any) -> Any:
        return method(*arguments)

    signature = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in parameters.items()],
        return_annotation=result,
    )
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


class _Host:
    """What TensorRT asks about one plugin.

    Args:
        plugin: the launch.
        choice: finds its compiled kernel.
        trt: module `tensorrt`.
        trtp: module `tensorrt.plugin`.
    """

    def __init__(self, plugin: LaunchPlugin, choice: KernelChoice, trt: Any, trtp: Any) -> None:
        self.plugin = plugin
        self.choice = choice
        self.trt = trt
        self.trtp = trtp
        self.data_types = {element: getattr(trt.DataType, kind.data_type) for element, kind in _TYPES.items()}

    def output_descriptions(self, *inputs: Any) -> Any:
        """Describe the outputs: types, and shapes as expressions over those of the inputs."""
        element = self._element(inputs)
        types = [
            self.data_types[element if tensor.element == "data" else tensor.element] for tensor in self.plugin.writes
        ]
        if any(extent.is_fake for description in inputs for extent in description.shape_expr):
            # TensorRT asks for the types first, when no size is known.
            shapes = [tuple(self.trtp.ShapeExpr() for _ in tensor.axes) for tensor in self.plugin.writes]
        else:
            scope = self._scope(inputs, self.choice.kernel(self.plugin, element, LAYOUTS[0], self._static(inputs)))
            shapes = [tuple(self._evaluate(axis, scope) for axis in tensor.axes) for tensor in self.plugin.writes]
        return tuple(self.trtp.from_shape_expr(shape, kind) for shape, kind in zip(shapes, types, strict=True))

    def combinations(self, *arguments: Any) -> Any:
        """Return the types and formats that the kernel takes.

        The type is that of the network, which is strongly typed. Another one could come with another tiling, and the
        shapes between the launches of an operation depend on it.
        """
        *inputs, outputs = arguments
        element = self._element(inputs)
        kind = _TYPES[element]
        types = ", ".join(
            kind.combination if tensor.element == "data" else _TYPES[tensor.element].combination
            for tensor in self._tensors
        )
        formats = ["LINEAR"]
        if self._takes_channels_last(element, inputs, outputs):
            formats.append(kind.channels_last)
        return [
            self.trtp.AutoTuneCombination(
                types, ", ".join(name if tensor.follows_layout else "LINEAR" for tensor in self._tensors)
            )
            for name in formats
        ]

    def kernel(self, *arguments: Any) -> Any:
        """Return the kernel for the types, formats and fixed sizes of the arguments, and how to launch it."""
        *inputs, outputs, _ = arguments
        self._refuse_large_images([*inputs, *outputs])
        layout = "linear"
        for tensor, description in zip(self._tensors, [*inputs, *outputs], strict=True):
            if tensor.follows_layout and description.format != self.trt.TensorFormat.LINEAR:
                layout = "channels-last"
        kernel = self.choice.kernel(self.plugin, self._element(inputs), layout, self._static(inputs))
        scope = self._scope(inputs, kernel)
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (self._evaluate(text, scope) for text in self.plugin.launch.grid)
        launch.block_x = 32 * kernel.warps
        launch.shared_mem = kernel.shared
        scalars = self.trtp.SymIntExprs(len(self.plugin.launch.scalars))
        for index, text in enumerate(self.plugin.launch.scalars):
            scalars[index] = self.trtp.SymInt32(self._evaluate(text, scope))
        return kernel.entry, self.choice.ptx(kernel), launch, scalars

    @property
    def _tensors(self) -> Sequence[LaunchTensor]:
        return (*self.plugin.reads, *self.plugin.writes)

    def _element(self, inputs: Sequence[Any]) -> str:
        """Return the data type of the operation's tensors."""
        found = next(
            description.dtype
            for tensor, description in zip(self.plugin.reads, inputs, strict=True)
            if tensor.element == "data"
        )
        for element, data_type in self.data_types.items():
            if found == data_type:
                return element
        raise UserError(
            f"{self.plugin.name} has no kernel for the type {found}. Its types are {', '.join(_TYPES)}; give the "
            "network one of them, strongly typed."
        )

    def _takes_channels_last(self, element: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
        """Whether there is a channels-last kernel that fits the shapes, which follow the linear kernel."""
        if not self.plugin.follows_layout:
            return False
        for tensor, description in zip(self._tensors, [*inputs, *outputs], strict=True):
            if tensor.follows_layout and (_known(description)[1] or 1) % _TYPES[element].channel_multiple:
                return False
        static = self._static(inputs)
        linear, other = (self.choice.find(self.plugin, element, layout, static) for layout in LAYOUTS)
        return (
            linear is not None
            and other is not None
            and all(linear.scope[name] == other.scope[name] for name in self.plugin.shape_constants)
        )

    def _static(self, inputs: Sequence[Any]) -> dict[str, int]:
        """Return the sizes that are compiled into the kernel, as far as the inputs show them."""
        sizes = self.plugin.sizes(self._by_name(inputs, _known))
        static = {}
        for name in self.plugin.spec.static:
            if name in sizes:
                size = sizes[name]
                if size is None:
                    raise UserError(
                        f"{self.plugin.name}: {name} varies, but it is compiled into the kernel. Export the model "
                        f"with a fixed {name}."
                    )
                static[name] = size
        return static

    def _scope(self, inputs: Sequence[Any], kernel: CompiledKernel) -> dict[str, Any]:
        """Return every name of expressions as a symbolic size: TensorRT takes plain integers on the right only."""
        sizes = self.plugin.sizes(self._by_name(inputs, lambda description: list(description.shape_expr)))
        return {**sizes, **{name: self.trtp.ShapeExpr(value) for name, value in kernel.scope.items()}}

    def _by_name(self, inputs: Sequence[Any], shape: Callable[[Any], list[Extent]]) -> dict[str, list[Extent]]:
        return {tensor.name: shape(description) for tensor, description in zip(self.plugin.reads, inputs, strict=True)}

    def _evaluate(self, text: str, scope: Mapping[str, Any]) -> Any:
        trtp = self.trtp
        functions = {
            "cdiv": trtp.cdiv,
            "max": trtp.max,
            "min": trtp.min,
            "pow2": lambda amount: trtp.ShapeExpr(FUNCTIONS["pow2"](amount.constant_value())),
        }
        return evaluate(text, scope, functions)

    def _refuse_large_images(self, descriptions: Sequence[Any]) -> None:
        """Raise where an image has more elements than a kernel's 32-bit indices reach."""
        workspaces = {buffer.name for buffer in self.plugin.spec.workspaces}
        for tensor, description in zip(self._tensors, descriptions, strict=True):
            if tensor.name in workspaces:
                continue  # indexed with 64 bits
            shape = description.shape.max if description.shape.is_dynamic else description.shape
            image = prod(int(extent) for extent in list(shape)[1:])
            if image > LARGEST_IMAGE:
                raise UserError(
                    f"{self.plugin.name}: one image of {tensor.name} has up to {image} elements, more than 2^31 - 1. "
                    "Lower the largest size of the optimisation profile."
                )


def _known(description: Any) -> list[int | None]:
    """Return the shape of a tensor, with None for what varies."""
    if description.has_shape:
        return [None if extent < 0 else int(extent) for extent in description.shape]
    return [int(extent.constant_value()) if extent.is_constant else None for extent in description.shape_expr]
