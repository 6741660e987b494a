"""Devices, random inputs and errors: what every section that runs kernels needs."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping

import torch
from gpu.cases import DRY_SM, Settings
from gpu.operations import Tensors

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PluginSpec
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS

SPREAD = 4.0
"""Standard deviation of the scores of random inputs: peaked, as in trained networks, with several keys that count."""

STEEP_SPREAD = 2.0e4
"""The same for scores that exceed what FP16 can hold."""


@functools.cache
def device_of(settings: Settings) -> torch.device:
    """Return where this process computes, with TF32 off.

    Raises:
        UserError: no GPU, and no dry run.
    """
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if settings.dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU. Run this on a machine with one, or try `--dry-run`.")
    return torch.device("cuda", torch.cuda.current_device())


def sm_of(settings: Settings) -> int:
    """Return the CUDA architecture, such as 90."""
    if settings.dry:
        return DRY_SM
    major, minor = torch.cuda.get_device_capability(device_of(settings))
    return 10 * major + minor


def wait(settings: Settings) -> None:
    """Wait until the GPU is done; raises what a kernel did wrong."""
    if not settings.dry:
        torch.cuda.synchronize()


def elements_of(settings: Settings) -> tuple[str, ...]:
    """Return the data types of kernels. Triton's interpreter multiplies the bit patterns of BF16, not its values."""
    return tuple(element for element in ELEMENT_BYTES if not settings.dry or element != "bfloat16")


def layouts_of(spec: PluginSpec) -> tuple[str, ...]:
    """Return the layouts that an operation's tensors can have."""
    return LAYOUTS if spec.has_maps else LAYOUTS[:1]


def sizes_for(
    spec: PluginSpec, *, batch: int, static: Mapping[str, int], a: tuple[int, int], b: tuple[int, int]
) -> dict[str, int]:
    """Return the sizes of an operation from two maps: its only map or its queries are `a`, its keys `b`."""
    known = {
        **{"batch": batch, "height": a[0], "width": a[1], "queries": math.prod(a), "keys": math.prod(b)},
        **{"height_a": a[0], "width_a": a[1], "height_b": b[0], "width_b": b[1]},
        **static,
    }
    symbols = {symbol for tensor in spec.inputs for symbol in tensor.shape if symbol != "1"}
    return {symbol: known.get(symbol, 17) for symbol in sorted(symbols)}


def random_inputs(
    spec: PluginSpec,
    sizes: Mapping[str, int],
    element: str,
    layout: str,
    settings: Settings,
    *,
    spread: float = SPREAD,
) -> dict[str, torch.Tensor]:
    """Return normally distributed inputs in a layout; the first one is scaled so that scores have the given spread."""
    device = device_of(settings)
    described = f"{spec.name} {sorted(sizes.items())} {element} {layout} {spread}"
    generator = torch.Generator(device).manual_seed(settings.seed + zlib.crc32(described.encode()))
    inputs = {}
    for index, tensor in enumerate(spec.inputs):
        shape = spec.shape_of(tensor, sizes)
        values = torch.randn(shape, generator=generator, device=device)
        if index == 0:
            values *= spread / math.sqrt(shape[1])
        values = values.to(getattr(torch, element))
        memory_format = torch.channels_last if layout == "channels-last" and len(shape) == 4 else None
        inputs[tensor.name] = values.contiguous(memory_format=memory_format) if memory_format else values
    return inputs


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of the expected values; infinite where a value is not finite."""
    difference = actual.double() - expected
    error = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected).clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def errors_of(actual: Tensors, expected: Tensors) -> list[float]:
    """Return the relative L2 error of every output."""
    return [relative_l2(one, other) for one, other in zip(actual, expected, strict=True)]
