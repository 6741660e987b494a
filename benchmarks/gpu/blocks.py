"""Every block of the registry on the GPU, in three data types, against its original in FP64.

FP16 and BF16 run the whole module in that type, without the FP32 islands that an export keeps, so an error there is the
reason for a precision policy and not a defect. FP32 runs with TF32 off.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu.cases import LIMITS, Case, Record, Settings
from gpu.data import device_of, relative_l2, wait
from gpu.operations import Tensors, as_tuple
from torch import nn

from edgeattn.blocks import BLOCKS, BlockSpec, Variant
from edgeattn.blocks.spec import Arguments, Sizes
from edgeattn.plugins_trt.spec import ELEMENT_BYTES
from edgeattn.validation.randomise import randomise

DRY_BLOCKS = 3
STATE_SEED = 3


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return a case for every variant at its test sizes, then one for every published configuration."""
    variants = [(spec, variant) for spec in BLOCKS for variant in spec.variants]
    if settings.dry:
        variants = variants[:DRY_BLOCKS]
    small = [_case(spec, variant, published=False) for spec, variant in variants]
    large = [_case(spec, variant, published=True) for spec, variant in variants if variant.published]
    return small + (large if not settings.dry else [])


def _case(spec: BlockSpec, variant: Variant, *, published: bool) -> Case:
    name = f"{spec.name}/{variant.name}{', published size' if published else ''}"
    return Case(name, 30.0, {"block": spec.name, "variant": variant.name, "published": published})


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield one record with the largest error of each data type over all sizes."""
    spec = BLOCKS.get(case.parameters["block"])
    variant = spec.variant(case.parameters["variant"])
    arguments, all_sizes = variant.arguments, spec.sizes_of(variant)
    if case.parameters["published"]:
        assert variant.published is not None
        arguments, all_sizes = variant.published.arguments, (variant.published.sizes,)
    if settings.dry:
        all_sizes = all_sizes[:1]
    yield compare(spec, variant, arguments, all_sizes, settings)


def compare(
    spec: BlockSpec, variant: Variant, arguments: Arguments, all_sizes: Sequence[Sizes], settings: Settings
) -> Record:
    """Return the record of one variant."""
    device = device_of(settings)
    block = randomise(spec.build(**arguments), seed=STATE_SEED)
    module, name = spec.original.split(":")
    original = getattr(importlib.import_module(module), name)(**arguments).eval()
    original.load_state_dict(block.state_dict(), strict=True)
    original.double()
    given = [
        spec.example_inputs(variant, sizes, arguments=arguments, seed=settings.seed + index)
        for index, sizes in enumerate(all_sizes)
    ]
    expected, place = _expected(original, variant, given, device)
    results = {}
    for element in ELEMENT_BYTES:
        dtype = getattr(torch, element)
        try:
            typed = copy.deepcopy(block).to(device=device, dtype=dtype)
            outputs = [call(typed, variant, as_type(inputs, device, dtype)) for inputs in given]
            results[element] = _summary(outputs, expected, all_sizes)
            del outputs
        except RuntimeError as error:  # an operator without a kernel for the type, or out of memory
            results[element] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            wait(settings)
    single = results["float32"]
    passed = "error" not in single and single["relative_l2"] is not None and single["relative_l2"] <= LIMITS["float32"]
    return {
        "status": "ok" if passed else "failed",
        "block": spec.name,
        "variant": variant.name,
        "sizes": [dict(sizes) for sizes in all_sizes],
        "original_on": place,
        "limit_float32": LIMITS["float32"],
        "elements": results,
    }


def _expected(
    original: nn.Module, variant: Variant, given: Sequence[Tensors], device: torch.device
) -> tuple[list[Tensors], str]:
    """Return the original's outputs in FP64, and where it ran: a literal original may make tensors on the CPU."""
    places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    for place in places:
        try:
            moved = original.to(place)
            outputs = [call(moved, variant, as_type(inputs, place, torch.float64)) for inputs in given]
            return [tuple(tensor.to(device) for tensor in one) for one in outputs], place.type
        except RuntimeError:
            if place == places[-1]:
                raise
    raise AssertionError


def call(module: nn.Module, variant: Variant, inputs: Tensors) -> Tensors:
    """Call the variant's method."""
    with torch.no_grad():
        return as_tuple(getattr(module, variant.method)(*inputs))


def as_type(inputs: Tensors, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Return inputs on a device, floating-point ones in a type; masks stay masks."""
    return tuple(tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device) for tensor in inputs)


def _summary(outputs: Sequence[Tensors], expected: Sequence[Tensors], all_sizes: Sequence[Sizes]) -> dict[str, Any]:
    """Return the largest error with the sizes it came at, and how many values are not finite."""
    errors = [
        (relative_l2(actual, wanted), dict(sizes))
        for some, other, sizes in zip(outputs, expected, all_sizes, strict=True)
        for actual, wanted in zip(some, other, strict=True)
    ]
    worst, sizes = max(errors, key=lambda entry: entry[0])
    return {
        "relative_l2": worst if math.isfinite(worst) else None,
        "worst_at": sizes,
        "not_finite": sum(int((~tensor.isfinite()).sum()) for some in outputs for tensor in some),
    }
