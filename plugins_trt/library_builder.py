"""Builds a kernel library: compiles, checks resources, and writes the folder that both hosts read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeattn.plugins_trt.compiler import Progress, cache_folder, compile_variants
from edgeattn.plugins_trt.cpp_table import write_table
from edgeattn.plugins_trt.kernel_library import KernelLibrary
from edgeattn.plugins_trt.resources import problems
from edgeattn.plugins_trt.selection import Destination
from edgeattn.plugins_trt.variants import KernelVariant


def build_library(
    folder: str | Path,
    variants: Sequence[KernelVariant],
    targets: Mapping[int, Destination],
    *,
    jobs: int | None = None,
    allow_problems: bool = False,
    progress: Progress | None = None,
) -> tuple[KernelLibrary, dict[str, list[str]]]:
    """Compile kernels and write them to a folder, with the table that the C++ host is compiled from.

    Args:
        folder: the library's folder, created when missing; a library in it is replaced.
        variants: the kernels.
        targets: what to compile for, by CUDA architecture.
        jobs: processes at a time; one for each CPU when None.
        allow_problems: write the library even if a kernel has problems.
        progress: told about every compiled kernel.

    Returns:
        The library, and the problems by the name of the kernel's cubin. Nothing was written when there are problems
        that are not allowed.

    Raises:
        UserError: see `compiler.compile_variants`; the folder cannot be written.
    """
    isas = {sm: target.ptx_isa for sm, target in targets.items()}
    compiled, tools = compile_variants(variants, isas, jobs=jobs, cache=cache_folder(), progress=progress)
    library = KernelLibrary(Path(folder), tuple(result.kernel for result in compiled), tools.triton)
    found = {
        kernel.cubin: sentences
        for kernel in library.kernels
        if (sentences := problems(kernel, targets[kernel.sm].shared_memory))
    }
    if not found or allow_problems:
        library.write(
            {
                name: content
                for result in compiled
                for name, content in ((result.kernel.cubin, result.cubin), (result.kernel.ptx, result.ptx))
            }
        )
        write_table(library)
    return library, found
