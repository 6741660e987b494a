"""Kernel variants: one launch of an operation for one GPU architecture, data type, layout and set of static sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.expressions import FUNCTIONS, evaluate
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS, Launch, PluginSpec

_TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class KernelVariant:
    """What is compiled, and how it is launched.

    Attributes:
        spec: the operation.
        launch: which of its launches.
        element: data type of the operation's tensors.
        layout: layout of its 4-D tensors.
        sm: CUDA architecture.
        static: values of the sizes that are compiled in.
        constants: the kernel's compile-time parameters.
        scope: every compile-time name that expressions may use: static sizes, tiling and kernel constants.
        warps: warps per program.
        stages: software pipeline stages.
    """

    spec: PluginSpec
    launch: Launch
    element: str
    layout: str
    sm: int
    static: Mapping[str, int]
    constants: Mapping[str, int]
    scope: Mapping[str, int]
    warps: int
    stages: int

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Name and Triton type ("*fp16", "i32") of every run-time parameter of the kernel, in order.

        Scalars are called `scalar_0` and so on.
        """
        pointers = {tensor.name: self.element for tensor in (*self.spec.inputs, *self.spec.outputs)}
        pointers |= {
            buffer.name: self.element if buffer.element == "data" else buffer.element for buffer in self.spec.workspaces
        }
        return (
            *((name, f"*{_TRITON_TYPES[pointers[name]]}") for name in self.launch.reads),
            *((f"scalar_{index}", "i32") for index in range(len(self.launch.scalars))),
            *((name, f"*{_TRITON_TYPES[pointers[name]]}") for name in self.launch.writes),
        )

    def grid(self, sizes: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] = FUNCTIONS) -> list[Any]:
        """Return the number of programs along x, y and z for given sizes (see `expressions.evaluate`)."""
        return [evaluate(text, {**sizes, **self.scope}, functions) for text in self.launch.grid]

    def scalars(self, sizes: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]] = FUNCTIONS) -> list[Any]:
        """Return the scalar arguments for given sizes."""
        return [evaluate(text, {**sizes, **self.scope}, functions) for text in self.launch.scalars]


def variants_of(spec: PluginSpec, element: str, layout: str, sm: int, static: Mapping[str, int]) -> list[KernelVariant]:
    """Return the kernel variants of all launches of an operation, in order.

    Args:
        spec: the operation.
        element: data type of its tensors, one of `ELEMENT_BYTES`.
        layout: layout of its 4-D tensors, one of `LAYOUTS`.
        sm: CUDA architecture, such as 87.
        static: values of the sizes that are compiled in; other sizes are ignored.

    Raises:
        UserError: no kernel for the combination.
    """
    if element not in ELEMENT_BYTES or layout not in LAYOUTS:
        raise UserError(
            f"{spec.name} has no kernel for {element} in layout {layout}. Types: {', '.join(ELEMENT_BYTES)}; layouts: "
            f"{', '.join(LAYOUTS)}."
        )
    tiling = spec.tiling(sm, element, layout)
    fixed = {name: static[name] for name in spec.static}
    outer = {**fixed, **tiling.constants}
    variants = []
    for launch in spec.launches:
        constants = {name: evaluate(text, outer) for name, text in launch.constants.items()}
        variants.append(
            KernelVariant(
                spec=spec,
                launch=launch,
                element=element,
                layout=layout,
                sm=sm,
                static=fixed,
                constants={**constants, "CHANNELS_LAST": int(layout == "channels-last")},
                scope={**outer, **constants},
                warps=tiling.warps[launch.name],
                stages=tiling.stages[launch.name],
            )
        )
    return variants


def workspace_shapes(
    spec: PluginSpec, variant: KernelVariant, sizes: Mapping[str, int]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and data type of every workspace of an operation.

    Args:
        spec: the operation.
        variant: any of its variants; all share the tiling that the shapes depend on.
        sizes: value of every size.
    """
    scope = {**sizes, **variant.scope}
    return {
        buffer.name: (
            tuple(evaluate(extent, scope) for extent in buffer.shape),
            variant.element if buffer.element == "data" else buffer.element,
        )
        for buffer in spec.workspaces
    }


@dataclass(frozen=True)
class Cost:
    """What an operation costs at least.

    Attributes:
        flops: floating-point operations of the mathematics.
        bytes: inputs read once and outputs written once.
        workspace_bytes: memory beside inputs and outputs.
    """

    flops: int
    bytes: int
    workspace_bytes: int

    def roofline_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time on a machine with the given matrix rate and memory bandwidth."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def cost_of(spec: PluginSpec, element: str, sm: int, sizes: Mapping[str, int]) -> Cost:
    """Return the cost model of an operation.

    Args:
        spec: the operation.
        element: data type of its tensors.
        sm: CUDA architecture, which decides the tiling and with it the workspaces.
        sizes: value of every size.
    """
    tensors = sum(prod(spec.shape_of(tensor, sizes)) for tensor in (*spec.inputs, *spec.outputs))
    buffers = 0
    if spec.launches:
        variant = variants_of(spec, element, LAYOUTS[0], sm, sizes)[0]
        buffers = sum(
            prod(shape) * ELEMENT_BYTES[kind] for shape, kind in workspace_shapes(spec, variant, sizes).values()
        )
    return Cost(evaluate(spec.flops, sizes), tensors * ELEMENT_BYTES[element], buffers)
