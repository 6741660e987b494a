"""`KernelLibrary`: a folder of compiled kernels with a manifest, which both hosts read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError, atomic_path, remove_leftovers, sha256_of, write_text
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS

MANIFEST = "manifest.json"
FORMAT = 1

_REBUILD = "Build it again with `edgeattn plugins build`."


@dataclass(frozen=True)
class CompiledKernel:
    """One launch of an operation, compiled for one GPU architecture, data type, layout and set of static sizes.

    Attributes:
        operation: name of the `PluginSpec`.
        op_type: operator name in ONNX and TensorRT.
        launch: name of the launch within the operation.
        kernel: the Triton kernel as `module:function`.
        element: data type of the operation's tensors.
        layout: layout of its 4-D tensors.
        static: values of the sizes that are compiled in.
        sm: CUDA architecture, such as 87.
        ptx_isa: PTX ISA of the PTX, such as 85 for 8.5.
        entry: symbol of the kernel in cubin and PTX.
        warps: warps to launch per program; a block has 32 times as many threads.
        shared: dynamic shared memory to launch with, in bytes.
        registers: registers per thread.
        stack: stack frame per thread, in bytes.
        spill_stores: bytes that registers spill to memory per thread.
        spill_loads: bytes that are loaded back.
        constants: the kernel's compile-time parameters.
        scope: every compile-time name that grid, scalar and workspace expressions may use.
        parameters: name and Triton type of every run-time parameter, in order.
        cubin: file name of the machine code.
        ptx: file name of the PTX, which newer drivers compile themselves.
        source_hash: SHA-256 over everything the code depends on.
    """

    operation: str
    op_type: str
    launch: str
    kernel: str
    element: str
    layout: str
    static: Mapping[str, int]
    sm: int
    ptx_isa: int
    entry: str
    warps: int
    shared: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    constants: Mapping[str, int]
    scope: Mapping[str, int]
    parameters: tuple[tuple[str, str], ...]
    cubin: str
    ptx: str
    source_hash: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _file_name(value: Any) -> str:
    if Path(_text(value)).name != value:
        raise ValueError
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _constants(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise ValueError
    return value


def _parameters(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(name), _text(kind)) for name, kind in value)


def _one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in known:
            raise ValueError
        return str(value)

    return read


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": _text,
    "int": _count,
    "Mapping[str, int]": _constants,
    "tuple[tuple[str, str], ...]": _parameters,
}
_FIELD_READERS: Mapping[str, Callable[[Any], Any]] = {
    **{field.name: _READERS[str(field.type)] for field in fields(CompiledKernel)},
    "element": _one_of(tuple(ELEMENT_BYTES)),
    "layout": _one_of(LAYOUTS),
    "cubin": _file_name,
    "ptx": _file_name,
}


@dataclass(frozen=True)
class KernelLibrary:
    """Compiled kernels in a folder.

    Attributes:
        folder: holds the manifest and every file that it names.
        kernels: the kernels; launches of an operation are in order.
        triton: version of Triton that compiled them.
    """

    folder: Path
    kernels: tuple[CompiledKernel, ...]
    triton: str

    @classmethod
    def load(cls, folder: str | Path) -> KernelLibrary:
        """Read a library and check that every file is the one that was written.

        Raises:
            UserError: no library, another format, or a file that is missing or changed; the message names it.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{folder} is not a kernel library: {MANIFEST} cannot be read ({error.strerror or error}). {_REBUILD}"
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}. {_REBUILD}") from error
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise UserError(f"{path} has the format {found!r}; this release reads format {FORMAT}. {_REBUILD}")
        try:
            kernels = tuple(_kernel(entry) for entry in manifest["kernels"])
            triton, sums = _text(manifest["triton"]), dict(manifest["files"])
            named = {name: sums[name] for kernel in kernels for name in (kernel.cubin, kernel.ptx)}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}. {_REBUILD}") from error
        for name, checksum in named.items():
            if not (folder / name).is_file():
                raise UserError(f"the kernel library {folder} lacks the file {name}. {_REBUILD}")
            if sha256_of(folder / name) != checksum:
                raise UserError(f"{folder / name} is not the file that was built: its SHA-256 differs. {_REBUILD}")
        return cls(folder, kernels, triton)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write the library to its folder, in place of one that is there.

        The manifest is written last, so an interrupted write leaves a folder that `load` refuses.

        Args:
            files: content of every cubin and PTX file that the kernels name.

        Raises:
            UserError: the folder cannot be written.
            ValueError: `files` are not those that the kernels name, or two kernels share a file.
        """
        named = [name for kernel in self.kernels for name in (kernel.cubin, kernel.ptx)]
        if sorted(named) != sorted(files):
            raise ValueError(f"the kernels name the files {sorted(named)}, but the contents are of {sorted(files)}")
        stale = _files_of(self.folder) - files.keys()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for name, content in files.items():
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(content)
        for name in stale:
            (self.folder / name).unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "triton": self.triton,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "files": {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)},
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        remove_leftovers(self.folder)


def _kernel(entry: Any) -> CompiledKernel:
    values = {}
    for name, read in _FIELD_READERS.items():
        if name not in entry:
            raise ValueError(f"a kernel has no field {name!r}")
        try:
            values[name] = read(entry[name])
        except (TypeError, ValueError):
            raise ValueError(f"a kernel's field {name!r} is {entry[name]!r}") from None
    if unknown := entry.keys() - _FIELD_READERS.keys():
        raise ValueError(f"a kernel has the unknown fields {', '.join(sorted(unknown))}")
    return CompiledKernel(**values)


def _files_of(folder: Path) -> set[str]:
    """Return the files that the manifest in a folder names, as far as it can be read."""
    try:
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {_file_name(name) for name in names}
    except (OSError, TypeError, ValueError, KeyError):
        return set()
