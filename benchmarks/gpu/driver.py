"""Kernels that are compiled ahead of time, against FP64: through the driver API, and through the C++ library itself.

Each case compiles one operation, data type and layout, writes and reads its kernel library, and runs it in three
forms: machine code and PTX launched by `driver_api`, and the C functions of the C++ library, which plan, choose and
launch with the code that TensorRT's enqueue runs. That library is built here without TensorRT where there is g++; one
that was brought along (`--cpp-library`) is checked for everything that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from gpu.cases import Case, Record, Settings
from gpu.checks import verdict, with_kernels
from gpu.compiled_host import FORMS, CompiledOperation, CppOperation
from gpu.data import device_of, elements_of, layouts_of, random_inputs, sizes_for, sm_of, wait
from gpu.driver_api import CudaDriver, RecordingDriver
from gpu.driver_build import ToolMissingError, build
from gpu.driver_cpp import Content, CppLibrary, CppLibraryError
from gpu.operations import Tensors, reference_of

from edgeattn.plugins_trt import PLUGINS, PluginSpec, spec_of
from edgeattn.plugins_trt.compiler import compile_variants
from edgeattn.plugins_trt.kernel_library import KernelLibrary
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS
from edgeattn.plugins_trt.variants import KernelVariant, variants_of, workspace_shapes
from edgeattn.targets import SMS

CPP_LIBRARY = "C++ plugin library"
CPP_FORM = "C++ library"
"""Beside `FORMS`."""

STATIC = {"head_channels": 20, "channels": 72}
"""Compiled beside the published sizes: not powers of two."""

MAPS = (((97, 97), (60, 60)), ((33, 1), (1, 129)), ((1, 1), (1, 1)))
DRY_STATIC = {"head_channels": 3, "channels": 5}
DRY_MAPS = (((2, 3), (3, 1)),)
WORKSPACE_ALIGNMENT = 256


class Host(Protocol):
    """What runs an operation on torch tensors."""

    def run(self, inputs: Mapping[str, torch.Tensor], stream: int) -> Tensors:
        """Return the outputs, which held NaN before."""
        ...


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return the cases of the given C++ library, then one for each operation, data type and layout, published first."""
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
        *_given_cases(settings),
        *(
            Case(
                _name(spec.name, static, element, layout),
                60.0,
                {"operation": spec.name, "static": dict(static), "element": element, "layout": layout},
            )
            for spec, static, element, layout in runs
        ),
    ]


def _name(operation: str, static: Mapping[str, int], element: str, layout: str) -> str:
    return f"{operation} {element} {layout} {' '.join(f'{name}={size}' for name, size in static.items())}"


def _given_cases(settings: Settings) -> list[Case]:
    """Return a case for each set of kernels in the given C++ library; its own case says what is wrong with it."""
    if settings.cpp_library is None:
        return []
    try:
        contents = CppLibrary(Path(settings.cpp_library)).contents()
    except CppLibraryError:
        return []
    cases = {}
    for item in contents:  # the same kernels for several architectures are one case
        name = f"{CPP_LIBRARY}: {_name(f'{item.op_type}/{item.input_count}', item.static, item.element, item.layout)}"
        cases[name] = Case(name, 60.0, {"content": item})
    return list(cases.values())


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield a record for each form and size of a case."""
    if case.name == CPP_LIBRARY:
        yield cpp_library(settings)
    elif "content" in case.parameters:
        yield from _given(case.parameters["content"], settings)
    else:
        yield from _compiled(case, settings)


def cpp_library(settings: Settings) -> Record:
    """Load the given C++ library, if there is one, and count what it holds."""
    if settings.cpp_library is None:
        return {"status": "skipped", "reason": "not run: no --cpp-library was given"}
    try:
        contents = CppLibrary(Path(settings.cpp_library)).contents()
    except CppLibraryError as error:
        return {"status": "failed", "reason": str(error)}
    return {
        "status": "ok" if contents else "failed",
        "kernel_sets": len(contents),
        "architectures": sorted({item.sm for item in contents}),
    }


def _given(content: Content, settings: Settings) -> Iterator[Record]:
    """Run an operation of the given C++ library."""
    if settings.dry:
        yield {"status": "skipped", "reason": "not run: a dry run has no GPU"}
        return
    spec = spec_of(content.op_type, content.input_count)
    library = CppLibrary(Path(str(settings.cpp_library)))
    host = CppOperation(spec, content.element, content.layout, library)
    for record in _results(host, spec, content.static, content.element, content.layout, settings):
        kind = {"operation": spec.name, "element": content.element, "layout": content.layout}
        yield {**record, **kind, "form": f"given {CPP_FORM}", "remark": host.remark}


def _compiled(case: Case, settings: Settings) -> Iterator[Record]:
    """Compile the kernels of a case, write and read their library, and run it in every form."""
    chosen = case.parameters
    spec, static = PLUGINS.get(chosen["operation"]), chosen["static"]
    element, layout = chosen["element"], chosen["layout"]
    sm = sm_of(settings)
    variants = variants_of(spec, element, layout, sm, static)
    compiled, tools = compile_variants(variants, {sm: SMS[sm].minimum_ptx_isa}, jobs=1 if settings.dry else 2)
    folder = Path(settings.scratch) / "libraries" / case.name.replace(" ", "-")
    files = {item.kernel.cubin: item.cubin for item in compiled} | {item.kernel.ptx: item.ptx for item in compiled}
    KernelLibrary(folder, tuple(item.kernel for item in compiled), tools.triton).write(files)
    library = KernelLibrary.load(folder)
    shared = {
        "operation": spec.name,
        "element": element,
        "layout": layout,
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
    # The driver has no context of its own: torch's becomes current with its first tensor.
    torch.zeros(1, device=device_of(settings))
    for form in FORMS:
        if settings.dry:
            records = _recorded(spec, library, form, static, settings)
        else:
            operation = CompiledOperation(spec, library.kernels, library, form, CudaDriver())
            records = _results(operation, spec, static, element, layout, settings)
        for record in records:
            yield {**record, **shared, "form": form}
    try:
        built = build(library, Path(settings.scratch) / "cpp-host", optimise=not settings.dry)
    except ToolMissingError as error:
        yield {"status": "skipped", "reason": f"not run: {error}", **shared, "form": CPP_FORM}
        return
    host = CppOperation(spec, element, layout, CppLibrary(built))
    if settings.dry:
        yield {**_planned(host, variants, settings), **shared, "form": CPP_FORM}
        return
    for record in _results(host, spec, static, element, layout, settings):
        yield {**record, **shared, "form": CPP_FORM, "remark": host.remark}


def _results(
    host: Host, spec: PluginSpec, static: Mapping[str, int], element: str, layout: str, settings: Settings
) -> Iterator[Record]:
    """Run an operation twice at every size and compare it with FP64."""
    for a, b in MAPS:
        sizes = sizes_for(spec, batch=2, static=static, a=a, b=b)
        inputs = random_inputs(spec, sizes, element, layout, settings)
        stream = torch.cuda.current_stream().cuda_stream
        outputs, again = (host.run(inputs, stream) for _ in range(2))
        wait(settings)
        repeatable = all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
        yield {
            **verdict(outputs, reference_of(spec, inputs), element, repeatable=repeatable),
            "sizes": sizes,
        }


def _recorded(
    spec: PluginSpec, library: KernelLibrary, form: str, static: Mapping[str, int], settings: Settings
) -> Iterator[Record]:
    """Return what the driver would be asked to launch."""
    driver = RecordingDriver()
    first = library.kernels[0]
    operation = CompiledOperation(spec, library.kernels, library, form, driver)
    for a, b in DRY_MAPS:
        sizes = sizes_for(spec, batch=2, static=static, a=a, b=b)
        operation.run(random_inputs(spec, sizes, first.element, first.layout, settings), 0)
        yield {"status": "ok", "launches": driver.launches[-len(library.kernels) :], "sizes": sizes}


def _planned(host: CppOperation, variants: Sequence[KernelVariant], settings: Settings) -> Record:
    """Compare the workspace that the C++ library asks for with the declaration's; nothing is launched."""
    first = variants[0]
    a, b = DRY_MAPS[0]
    sizes = sizes_for(first.spec, batch=2, static=first.static, a=a, b=b)
    asked = host.workspace_bytes(random_inputs(first.spec, sizes, first.element, first.layout, settings))
    buffers = [
        prod(shape) * ELEMENT_BYTES[element] for shape, element in workspace_shapes(first.spec, first, sizes).values()
    ]
    declared = sum(-(-size // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT for size in buffers)
    return {"status": "ok" if asked == declared else "failed", "workspace_bytes": asked, "declared_bytes": declared}
