"""The plugin library as the device compiles it: the C++ host and the kernels for the target's architecture."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from edgeattn.deploy.pipeline import Progress
from edgeattn.foundation import UserError
from edgeattn.plugins_trt.kernel_library import MANIFEST, KernelLibrary
from edgeattn.plugins_trt.library_builder import build_library
from edgeattn.plugins_trt.model_operations import operations_of
from edgeattn.plugins_trt.selection import destinations, variants
from edgeattn.plugins_trt.variants import KernelVariant
from edgeattn.targets import Target

TABLE = ("kernel_table.cpp", "kernels.S")
"""What the C++ host is compiled with, beside the kernels themselves."""


def plugin_members(
    models: Sequence[Path], target: Target, kernels: Path | None, progress: Progress
) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """Return the files of the plugin library by their names in the bundle, and what its kernels are.

    Args:
        models: ONNX files with plugin nodes.
        target: what the kernels are for.
        kernels: a kernel library; compiled now when None.
        progress: told about compiled kernels.

    Raises:
        UserError: the library lacks kernels that the models need, or its PTX is too new for the target; or compiled
            kernels have problems.
    """
    wanted = variants([operation for model in models for operation in operations_of(model)], (target.sm,))
    if kernels is not None:
        return _members(_fitting(KernelLibrary.load(kernels), wanted, target))
    with tempfile.TemporaryDirectory(prefix="edgeattn-kernels-") as folder:
        library, found = build_library(folder, wanted, destinations([target.name]), progress=progress)
        if found:
            name, sentences = next(iter(found.items()))
            raise UserError(
                f"the kernel {name} does not suit {target.name}: {sentences[0]} Build kernels with `edgeattn plugins "
                "build --allow-problems`, and give their folder with --kernels if they will do."
            )
        return _members(library)


def _fitting(library: KernelLibrary, wanted: Sequence[KernelVariant], target: Target) -> KernelLibrary:
    """Return the library if it has every kernel that is needed and the target can load them."""
    advice = f"Build it with `edgeattn plugins build --target {target.name} --model MODEL.onnx`, or drop --kernels."
    have = {
        (kernel.operation, kernel.launch, kernel.element, kernel.layout, kernel.sm, *sorted(kernel.static.items()))
        for kernel in library.kernels
    }
    for variant in wanted:
        key = (variant.spec.name, variant.launch.name, variant.element, variant.layout, variant.sm)
        if (*key, *sorted(variant.static.items())) not in have:
            sizes = ", ".join(f"{name}={value}" for name, value in variant.static.items())
            kernel = f"{variant.spec.name}.{variant.launch.name}"
            raise UserError(
                f"the kernel library {library.folder} lacks {kernel} for sm_{target.sm}, "
                f"{variant.element}, {variant.layout}, {sizes}. {advice}"
            )
    newest = max(kernel.ptx_isa for kernel in library.kernels if kernel.sm == target.sm)
    if newest > target.ptx_isa:
        raise UserError(
            f"the kernel library {library.folder} has PTX {newest / 10:g}, and {target.name} takes "
            f"{target.ptx_isa / 10:g} at most. {advice}"
        )
    return library


def _members(library: KernelLibrary) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    files = [name for kernel in library.kernels for name in (kernel.cubin, kernel.ptx)]
    kernels = {name: library.folder / name for name in (*files, *TABLE, MANIFEST)}
    if lost := [name for name, path in kernels.items() if not path.is_file()]:
        raise UserError(f"the kernel library {library.folder} lacks {lost[0]}. Build it with `edgeattn plugins build`.")
    members = {f"plugins/kernels/{name}": path.read_bytes() for name, path in kernels.items()}
    for source in resources.files("edgeattn.plugins_trt").joinpath("cpp").iterdir():
        if source.is_file() and not source.name.startswith(".") and not source.name.endswith(".py"):
            members[f"plugins/cpp/{source.name}"] = source.read_bytes()
    facts: list[dict[str, object]] = [
        {"operation": kernel.operation, "launch": kernel.launch, "element": kernel.element, "layout": kernel.layout}
        | {"sm": kernel.sm, "ptx_isa": kernel.ptx_isa, "registers": kernel.registers, "spills": kernel.spill_stores}
        for kernel in library.kernels
    ]
    return members, facts
