"""`KernelChoice`: which compiled kernel a launch takes in the Python host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.compiler import cache_folder, compile_variants
from edgeattn.plugins_trt.expressions import names_in
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.launch_plugins import LaunchPlugin
from edgeattn.plugins_trt.spec import LAYOUTS
from edgeattn.plugins_trt.variants import variants_of
from edgeattn.targets import SMS


class KernelChoice:
    """The kernels of one GPU architecture: those of a library, or compiled when they are first asked for.

    Args:
        library: compiled kernels; None to compile.
        sm: CUDA architecture.

    Attributes:
        origin: where the kernels come from, in words.
    """

    def __init__(self, library: KernelLibrary | None, sm: int) -> None:
        self.sm = sm
        self._kernels: list[CompiledKernel] = []
        self._ptx: dict[str, bytes] = {}
        self._compiles = library is None
        self.origin = f"kernels that are compiled on demand for sm_{sm}"
        if library is not None:
            self.origin = f"the kernels of {library.folder} for sm_{sm}"
            self._kernels = [kernel for kernel in library.kernels if kernel.sm == sm]
            self._ptx = {kernel.ptx: (library.folder / kernel.ptx).read_bytes() for kernel in self._kernels}

    @classmethod
    def of(cls, library: KernelLibrary | str | Path | None, sm: int | None) -> KernelChoice:
        """Open a library and choose the architecture.

        Args:
            library: compiled kernels, or their folder; None to compile on demand.
            sm: CUDA architecture; None for the library's only one, or else the GPU's own.

        Raises:
            UserError: the library cannot be read or has no kernels for the architecture, which may be unknown.
        """
        if isinstance(library, (str, Path)):
            library = KernelLibrary.load(library)
        known = sorted(SMS if library is None else {kernel.sm for kernel in library.kernels})
        if sm is None:
            sm = known[0] if len(known) == 1 else _own_sm(known)
        if sm not in known:
            place = "the table of architectures" if library is None else str(library.folder)
            raise UserError(
                f"{place} has nothing for sm_{sm}, only for {', '.join(f'sm_{item}' for item in known) or 'none'}. "
                "Build kernels for it with `edgeattn plugins build`, or name another sm."
            )
        return cls(library, sm)

    def kernel(self, plugin: LaunchPlugin, element: str, layout: str, static: Mapping[str, int]) -> CompiledKernel:
        """Return the kernel of a launch.

        Args:
            plugin: the launch.
            element: data type of the operation's tensors.
            layout: layout of its 4-D tensors.
            static: the sizes that are compiled in, as far as the launch can see them.

        Raises:
            UserError: there is none, or several that differ in sizes that the launch cannot see.
        """
        found = self.find(plugin, element, layout, static)
        if found is None and self._compiles and static.keys() == set(plugin.spec.static):
            self._compile(plugin, element, static)
            found = self.find(plugin, element, layout, static)
        if found is None:
            there = sorted(
                {
                    f"{kernel.element} {kernel.layout} {_listed(kernel.static)}"
                    for kernel in self._kernels
                    if kernel.operation == plugin.spec.name
                }
            )
            raise UserError(
                f"{plugin.name} has no kernel for {element} {layout} {_listed(static)} in {self.origin}. There are: "
                f"{'; '.join(there) or 'none'}. Build it with `edgeattn plugins build`."
            )
        return found

    def find(self, plugin: LaunchPlugin, element: str, layout: str, static: Mapping[str, int]) -> CompiledKernel | None:
        """Return the kernel of a launch as `kernel` does, but None where it is not there yet."""
        wanted = (plugin.spec.name, plugin.launch.name, element, layout)
        candidates = [
            kernel
            for kernel in self._kernels
            if (kernel.operation, kernel.launch, kernel.element, kernel.layout) == wanted
            and all(kernel.static.get(name) == size for name, size in static.items())
        ]
        used = {name for text in _expressions(plugin) for name in names_in(text)}
        kinds = {
            (kernel.source_hash, *(kernel.scope.get(name) for name in sorted(used - static.keys())))
            for kernel in candidates
        }
        if len(kinds) > 1:
            raise UserError(
                f"{plugin.name}: {self.origin} include several for {element} {layout} {_listed(static)}: "
                f"{'; '.join(_listed(kernel.static) for kernel in candidates)}. Build a library for one of them."
            )
        return candidates[0] if candidates else None

    def ptx(self, kernel: CompiledKernel) -> bytes:
        """Return the PTX of a kernel that `kernel` gave."""
        return self._ptx[kernel.ptx]

    def _compile(self, plugin: LaunchPlugin, element: str, static: Mapping[str, int]) -> None:
        """Compile all launches of an operation in every layout, at the oldest PTX ISA that names the architecture.

        Every driver that runs the GPU takes that one. Launches that cannot see all fixed sizes find their kernels
        afterwards, because TensorRT asks about the first launch of an operation first.
        """
        layouts = LAYOUTS if plugin.spec.has_maps else LAYOUTS[:1]
        variants = [
            variant for layout in layouts for variant in variants_of(plugin.spec, element, layout, self.sm, static)
        ]
        compiled, _ = compile_variants(variants, {self.sm: SMS[self.sm].minimum_ptx_isa}, cache=cache_folder())
        self._kernels += [item.kernel for item in compiled]
        self._ptx |= {item.kernel.ptx: item.ptx for item in compiled}


def _expressions(plugin: LaunchPlugin) -> list[str]:
    """Return what is evaluated with a kernel's compile-time names."""
    axes = (axis for tensor in plugin.writes for axis in tensor.axes)
    return [*plugin.launch.grid, *plugin.launch.scalars, *axes]


def _listed(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _own_sm(known: list[int]) -> int:
    """Return the architecture of the GPU."""
    import torch  # takes seconds, and is needed here only

    if not torch.cuda.is_available():
        raise UserError(
            "no GPU is found whose architecture could be used. Name one as sm=: "
            f"{', '.join(map(str, known))}; 87 is Jetson Orin."
        )
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
