"""Builds the C functions of the C++ library (`plugins_trt/cpp/c_api.h`) over a kernel library, with g++ alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from edgeattn.plugins_trt.cpp_table import CODE, SOURCES, TABLE, write_table
from edgeattn.plugins_trt.kernel_library import KernelLibrary

NAME = "libedgeattn_kernels.so"
HOST = ("c_api.cpp", "cuda_driver.cpp", "expression.cpp", "kernel_loader.cpp", "launcher.cpp", "plan.cpp")
"""The sources that need no headers of TensorRT; CMakeLists.txt names the same for edgeattn_kernels."""

OPTIONS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra")
BUILD_SECONDS = 100


class ToolMissingError(RuntimeError):
    """The library cannot be built on this machine; the message says what is missing."""


def build(library: KernelLibrary, objects: Path, *, optimise: bool) -> Path:
    """Write the kernel table of a library and build the shared object in the library's folder.

    Args:
        library: the compiled kernels.
        objects: folder for the compiled host, which all libraries share; several processes may build at once.
        optimise: whether the host is compiled for speed.

    Returns:
        The shared object.

    Raises:
        ToolMissingError: no g++ or no cuda.h.
        RuntimeError: the compiler failed.
        UserError: the kernels come from other declarations.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise ToolMissingError("there is no g++")
    host = _host(compiler, objects, optimise=optimise)
    write_table(library)
    output = library.folder / NAME
    table = [str(library.folder / name) for name in (TABLE, CODE)]
    exports = f"-Wl,--no-undefined,--version-script={SOURCES / 'exports.map'}"
    paths = [f"-I{SOURCES}", f"-I{library.folder}"]
    _run([compiler, *OPTIONS, *paths, "-shared", *map(str, host), *table, exports, "-ldl", "-o", str(output)])
    return output


def cuda_headers() -> Path:
    """Return the folder of cuda.h: the CUDA toolkit's, or else the one that comes with Triton.

    Raises:
        ToolMissingError: there is none.
    """
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for place in places:
        if (place / "cuda.h").exists():
            return place
    raise ToolMissingError(f"there is no cuda.h in {', '.join(map(str, places))}")


def _host(compiler: str, folder: Path, *, optimise: bool) -> list[Path]:
    """Return the compiled host, made by the first process that asks."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{Path(name).stem}.o" for name in HOST]
    options = [compiler, *OPTIONS, "-O2" if optimise else "-O0", "-isystem", str(cuda_headers()), f"-I{SOURCES}"]
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            commands = [
                [*options, "-c", str(SOURCES / name), "-o", str(output)]
                for name, output in zip(HOST, objects, strict=True)
            ]
            with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
                list(pool.map(_run, commands))
            done.touch()
    return objects


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    if done.returncode:
        raise RuntimeError(f"the compiler failed: {' '.join(command)}: {done.stderr.strip()[:2000]}")
