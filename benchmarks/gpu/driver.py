"""Kernels that are compiled ahead of time, loaded from a library through the driver API, against FP64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gpu.cases import Case, Record, Settings
from gpu.checks import verdict, with_kernels
from gpu.compiled_host import FORMS, CompiledOperation
from gpu.data import device_of, elements_of, layouts_of, random_inputs, sizes_for, sm_of, wait
from gpu.driver_api import CudaDriver, RecordingDriver
from gpu.operations import reference_of

from edgeattn.plugins_trt import PLUGINS
from edgeattn.plugins_trt.compiler import compile_variants
from edgeattn.plugins_trt.kernel_library import KernelLibrary
from edgeattn.plugins_trt.spec import LAYOUTS
from edgeattn.plugins_trt.variants import variants_of
from edgeattn.targets import SMS

CPP_LIBRARY = "C++ plugin library"

STATIC = {"head_channels": 20, "channels": 72}
"""Compiled beside the published sizes: not powers of two."""

MAPS = (((97, 97), (60, 60)), ((33, 1), (1, 129)), ((1, 1), (1, 1)))
DRY_STATIC = {"head_channels": 3, "channels": 5}
DRY_MAPS = (((2, 3), (3, 1)),)


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return the C++ library's case and one for each operation, data type and layout, published sizes first."""
    runs = [
        (spec, static, element, layout)
        for preset in ((True, False) if not settings.dry else (False,))
        for spec in (with_kernels() if not settings.dry else with_kernels()[:1])
        for static in (spec.presets if preset else (DRY_STATIC if settings.dry else STATIC,))
        for element in (elements_of(settings) if not settings.dry else ["float16"])
        for layout in (layouts_of(spec) if not settings.dry else LAYOUTS[:1])
    ]
    return [
        Case(CPP_LIBRARY),
        *(
            Case(
                f"{spec.name} {element} {layout} {' '.join(f'{name}={size}' for name, size in static.items())}",
                60.0,
                {"operation": spec.name, "static": dict(static), "element": element, "layout": layout},
            )
            for spec, static, element, layout in runs
        ),
    ]


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Compile the kernels of a case, write and read their library, and yield a record for each form and size."""
    if case.name == CPP_LIBRARY:
        yield cpp_library(settings)
        return
    chosen = case.parameters
    spec, element, layout = PLUGINS.get(chosen["operation"]), chosen["element"], chosen["layout"]
    sm = sm_of(settings)
    variants = variants_of(spec, element, layout, sm, chosen["static"])
    compiled, tools = compile_variants(variants, {sm: SMS[sm].minimum_ptx_isa}, jobs=1 if settings.dry else 2)
    folder = Path(settings.scratch) / "libraries" / case.name.replace(" ", "-")
    files = {item.kernel.cubin: item.cubin for item in compiled} | {item.kernel.ptx: item.ptx for item in compiled}
    KernelLibrary(folder, tuple(item.kernel for item in compiled), tools.triton).write(files)
    library = KernelLibrary.load(folder)
    # The driver has no context of its own: torch's becomes current with its first tensor.
    torch.zeros(1, device=device_of(settings))
    driver = RecordingDriver() if settings.dry else CudaDriver()
    for form in FORMS:
        operation = CompiledOperation(spec, library.kernels, library, form, driver)
        for a, b in DRY_MAPS if settings.dry else MAPS:
            sizes = sizes_for(spec, batch=2, static=chosen["static"], a=a, b=b)
            inputs = random_inputs(spec, sizes, element, layout, settings)
            stream = 0 if settings.dry else torch.cuda.current_stream().cuda_stream
            outputs = operation.run(inputs, stream)
            wait(settings)
            shared = {
                "operation": spec.name,
                "element": element,
                "layout": layout,
                "form": form,
                "sizes": sizes,
                "resources": {
                    kernel.launch: {
                        "registers": kernel.registers,
                        "shared": kernel.shared,
                        "stack": kernel.stack,
                        "spill_loads": kernel.spill_loads,
                    }
                    for kernel in library.kernels
                },
            }
            if isinstance(driver, RecordingDriver):
                yield {"status": "ok", "launches": driver.launches[-len(library.kernels) :], **shared}
                continue
            again = operation.run(inputs, stream)
            wait(settings)
            repeatable = all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
            yield {**verdict(outputs, reference_of(spec, inputs), element, repeatable=repeatable), **shared}


def cpp_library(settings: Settings) -> Record:
    """Load the C++ plugin library, if one is named, and count its plugins.

    Its kernels run only through TensorRT's interfaces, so launching them needs TensorRT and not this script.
    """
    if settings.cpp_library is None:
        return {"status": "skipped", "reason": "not run: no --cpp-library was given"}
    try:
        library = ctypes.CDLL(str(Path(settings.cpp_library).resolve()))
        library.getCreators.argtypes = [ctypes.POINTER(ctypes.c_int32)]
        library.getCreators.restype = ctypes.c_void_p
    except (OSError, AttributeError) as error:
        return {"status": "failed", "reason": f"{settings.cpp_library} cannot be loaded: {error}"}
    count = ctypes.c_int32()
    found = library.getCreators(ctypes.byref(count))
    return {
        "status": "ok" if found and count.value else "failed",
        "creators": count.value,
        "reason": "loaded without TensorRT; kernels not run: they are launched through TensorRT's interfaces only",
    }
