"""Runs an operation from a kernel library on torch tensors: through the driver, or through the C++ library itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpu.driver_api import Driver
from gpu.driver_cpp import CppLibrary
from gpu.operations import Tensors

from edgeattn.plugins_trt import PluginSpec
from edgeattn.plugins_trt.expressions import evaluate
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary

FORMS = ("cubin", "ptx")
"""What the C++ host loads: machine code, or else PTX that the driver compiles."""


def poisoned_outputs(
    spec: PluginSpec, sizes: Mapping[str, int], element: str, layout: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return every output by name, in the layout and full of NaN."""
    outputs = {}
    for output in spec.outputs:
        shape = spec.shape_of(output, sizes)
        outputs[output.name] = torch.empty(
            shape,
            dtype=getattr(torch, element),
            device=device,
            memory_format=(
                torch.channels_last if layout == "channels-last" and len(shape) == 4 else torch.contiguous_format
            ),
        ).fill_(math.nan)
    return outputs


class CompiledOperation:
    """The loaded kernels of one operation, data type, layout and set of static sizes, launched step for step as the
    C++ host does.

    Args:
        spec: the operation.
        kernels: its launches in order.
        library: where the files are.
        form: one of `FORMS`.
        driver: loads and launches.
    """

    def __init__(
        self, spec: PluginSpec, kernels: Sequence[CompiledKernel], library: KernelLibrary, form: str, driver: Driver
    ) -> None:
        self._spec, self._kernels, self._driver = spec, list(kernels), driver
        self._functions = []
        for kernel in self._kernels:
            code = (library.folder / getattr(kernel, form)).read_bytes()
            module = driver.load(code if form == "cubin" else code + b"\0")
            self._functions.append(driver.function(module, kernel.entry, kernel.shared))

    def run(self, inputs: Mapping[str, torch.Tensor], stream: int) -> Tensors:
        """Run all launches; outputs and workspaces hold NaN before.

        Args:
            inputs: every input by name, in the kernels' layout.
            stream: CUDA stream.
        """
        spec, first = self._spec, self._kernels[0]
        sizes = spec.sizes_of({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        device = next(iter(inputs.values())).device
        buffers = {**inputs, **poisoned_outputs(spec, sizes, first.element, first.layout, device)}
        for workspace in spec.workspaces:
            shape = tuple(evaluate(extent, {**sizes, **first.scope}) for extent in workspace.shape)
            element = first.element if workspace.element == "data" else workspace.element
            buffers[workspace.name] = torch.full(shape, math.nan, dtype=getattr(torch, element), device=device)
        for kernel, function in zip(self._kernels, self._functions, strict=True):
            self._launch(kernel, function, buffers, sizes, stream)
        return tuple(buffers[output.name] for output in spec.outputs)

    def _launch(
        self,
        kernel: CompiledKernel,
        function: int,
        buffers: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        stream: int,
    ) -> None:
        (launch,) = [launch for launch in self._spec.launches if launch.name == kernel.launch]
        scope = {**sizes, **kernel.scope}
        numbers = {f"scalar_{index}": evaluate(text, scope) for index, text in enumerate(launch.scalars)}
        arguments: list[tuple[str, Any]] = [
            (kind, buffers[name].data_ptr() if kind.startswith("*") else numbers[name])
            for name, kind in kernel.parameters
        ]
        grid = [evaluate(text, scope) for text in launch.grid]
        self._driver.launch(function, grid, 32 * kernel.warps, kernel.shared, stream, arguments)


class CppOperation:
    """An operation of the C++ library, for one data type and layout.

    Args:
        spec: the operation.
        element: data type.
        layout: layout of 4-D tensors.
        library: the library.

    Attributes:
        remark: "" when the latest run took machine code for this device, else what ran.
    """

    def __init__(self, spec: PluginSpec, element: str, layout: str, library: CppLibrary) -> None:
        self._spec, self._kind, self._library = spec, (spec.op_type, element, layout), library
        self.remark = ""

    def workspace_bytes(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """Return the size of the workspace."""
        return self._library.workspace_bytes(*self._kind, self._shapes(inputs))

    def run(self, inputs: Mapping[str, torch.Tensor], stream: int) -> Tensors:
        """Run the operation; outputs and workspace hold NaN before.

        Args:
            inputs: every input by name, in the layout.
            stream: CUDA stream.
        """
        spec = self._spec
        sizes = spec.sizes_of({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        device = next(iter(inputs.values())).device
        outputs = poisoned_outputs(spec, sizes, *self._kind[1:], device)
        # Bytes of 255 are NaN in every data type.
        workspace = torch.full((self.workspace_bytes(inputs),), 255, dtype=torch.uint8, device=device)
        self.remark = self._library.launch(
            *self._kind,
            self._shapes(inputs),
            inputs=[inputs[tensor.name].data_ptr() for tensor in spec.inputs],
            outputs=[tensor.data_ptr() for tensor in outputs.values()],
            workspace=workspace.data_ptr(),
            stream=stream,
        )
        return tuple(outputs.values())

    def _shapes(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, ...]]:
        return [tuple(inputs[tensor.name].shape) for tensor in self._spec.inputs]
