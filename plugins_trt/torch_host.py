"""Runs the Triton kernels of an operation on torch tensors: on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.spec import LARGEST_IMAGE, PluginSpec
from edgeattn.plugins_trt.variants import variants_of, workspace_shapes


@cache
def kernel_function(name: str) -> Any:
    """Import a Triton kernel by its `module:function` name.

    Raises:
        UserError: Triton is not installed.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UserError("the kernels need Triton, which is not installed. Run `pip install triton`.") from error


def _memory_format(rank: int, layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels-last" and rank == 4 else torch.contiguous_format


def run(
    spec: PluginSpec,
    inputs: Mapping[str, torch.Tensor],
    *,
    layout: str = "linear",
    sm: int | None = None,
    poison: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run an operation with its kernels.

    Args:
        spec: the operation.
        inputs: every input by name; brought into the layout when they are not in it.
        layout: "linear" (batch, channels, height, width) or "channels-last", for 4-D tensors.
        sm: CUDA architecture that decides the tiling; the device's own when None.
        poison: value that outputs and workspaces are filled with before the launches, to find what is not written.

    Returns:
        The outputs in the order of the declaration, in the layout.

    Raises:
        UserError: shapes that do not fit, mixed data types, too large an image, or no kernel for the combination.
    """
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in inputs.values()}
    if len(kinds) != 1:
        raise UserError(f"{spec.name}: the inputs have the types {', '.join(sorted(kinds))}. Give all the same.")
    (element,) = kinds
    sizes = spec.sizes_of({name: tuple(tensor.shape) for name, tensor in inputs.items()})
    device = next(iter(inputs.values())).device
    if sm is None:
        major, minor = torch.cuda.get_device_capability(device)
        sm = 10 * major + minor
    variants = variants_of(spec, element, layout, sm, sizes)
    buffers = {
        name: tensor.contiguous(memory_format=_memory_format(tensor.dim(), layout)) for name, tensor in inputs.items()
    }
    for name, tensor in buffers.items():
        if tensor[0].numel() > LARGEST_IMAGE:
            raise UserError(f"{spec.name}: one image of {name} has {tensor[0].numel()} elements, more than 2^31 - 1.")
    for output in spec.outputs:
        shape = spec.shape_of(output, sizes)
        buffers[output.name] = torch.empty(
            shape, dtype=getattr(torch, element), device=device, memory_format=_memory_format(len(shape), layout)
        )
    for name, (shape, kind) in workspace_shapes(spec, variants[0], sizes).items():
        buffers[name] = torch.empty(shape, dtype=getattr(torch, kind), device=device)
    if poison is not None:
        for name in buffers.keys() - inputs.keys():
            buffers[name].fill_(poison)
    for variant in variants:
        launch = variant.launch
        kernel_function(launch.kernel)[tuple(variant.grid(sizes))](
            *(buffers[name] for name in launch.reads),
            *variant.scalars(sizes),
            *(buffers[name] for name in launch.writes),
            **variant.constants,
            num_warps=variant.warps,
            num_stages=variant.stages,
            enable_fp_fusion=True,  # as the compiled kernels; newer releases of Triton turn it off by default
        )
    return tuple(buffers[output.name] for output in spec.outputs)
