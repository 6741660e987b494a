"""Compiles one Triton kernel in a process of its own (see `compiler`): `python -m edgeattn.plugins_trt.compile_worker`.

The process runs in an empty folder, reads a JSON request from the standard input and leaves `result.json` there, with
`kernel.ptx` and `kernel.cubin` beside it. LLVM ends the process when it cannot compile for an architecture.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version
from triton.compiler import ASTSource

from edgeattn.plugins_trt.ptx import RefusedKernelError, check_launch_needs, entry_of, strip_scratch_parameters

_ALIGNMENT = [["tt.divisibility", 16]]
"""Attribute of every pointer: buffers of TensorRT and torch begin at multiples of 16 bytes or more."""


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def describe(kernels: list[str], sms: list[int]) -> dict[str, Any]:
    """Return what the compiled code depends on besides the request.

    Args:
        kernels: names of Triton kernels, as `module:function`.
        sms: CUDA architectures.

    Returns:
        `triton`: its version. `code`: for each kernel a hash of its source and of all that it calls. `assemblers`: for
        each architecture the version of its assembler and the newest PTX ISA that this takes.
    """
    return {
        "triton": triton.__version__,
        "code": {name: _function(name).cache_key for name in kernels},
        "assemblers": {
            str(sm): {
                "version": subprocess.check_output([get_ptxas(sm).path, "--version"], text=True),
                "ptx_isa": ptx_get_version(get_ptxas(sm).version),
            }
            for sm in sms
        },
    }


def compile_kernel(
    kernel: str,
    code: str,
    parameters: list[str],
    constants: dict[str, int],
    sm: int,
    ptx_isa: int,
    warps: int,
    stages: int,
) -> dict[str, Any]:
    """Compile a kernel to `kernel.ptx` and `kernel.cubin` in the current folder.

    Triton runs all its stages; between the last two the PTX loses the parameters that Triton appended, so the machine
    code is assembled from the PTX that is kept.

    Args:
        kernel: the Triton kernel, as `module:function`.
        code: hash of its source, from `describe`.
        parameters: Triton type of every run-time parameter, in order.
        constants: the compile-time parameters.
        sm: CUDA architecture.
        ptx_isa: PTX ISA.
        warps: warps per program.
        stages: software pipeline stages.

    Returns:
        `entry`, `warps`, `shared`, `registers`, `stack`, `spill_stores`, `spill_loads` (see `CompiledKernel`).

    Raises:
        RefusedKernelError: the kernel needs what the hosts do not provide, or its source is not that of `code`.
    """
    function = _function(kernel)
    if function.cache_key != code:
        raise RefusedKernelError("its source was edited meanwhile; run the command again")
    names = [name for name in function.arg_names if name not in constants]
    if len(names) != len(parameters) or {*function.arg_names[len(names) :]} != {*constants}:
        raise RefusedKernelError(
            f"its parameters are {', '.join(function.arg_names)}, but its launch passes {len(parameters)} values and "
            f"the constants {', '.join(constants)}"
        )

    def add_stripping(backend: Any = None, stages: dict[str, Callable[..., str]] | None = None, *_: Any) -> Any:
        if stages is None:  # Triton asks for a key of its own cache
            return "", ""
        to_ptx = stages["ptx"]

        def to_stripped_ptx(source: Any, metadata: dict[str, Any]) -> str:
            ptx = to_ptx(source, metadata)
            check_launch_needs(ptx, metadata)
            return strip_scratch_parameters(ptx, parameters)

        stages["ptx"] = to_stripped_ptx
        return None

    knobs.runtime.add_stages_inspection_hook = add_stripping
    source = ASTSource(
        function,
        {**dict(zip(names, parameters, strict=True)), **dict.fromkeys(constants, "constexpr")},
        constants,
        {(index,): _ALIGNMENT for index, kind in enumerate(parameters) if kind.startswith("*")},
    )
    # Fused multiply-add is asked for by name, because Triton's default depends on its version.
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": ptx_isa, "enable_fp_fusion": True}
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    Path("kernel.ptx").write_text(ptx, encoding="utf-8")
    Path("kernel.cubin").write_bytes(cubin)
    _check_cubin(parameters)
    return {
        "entry": entry_of(ptx),
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        **_resources(log.getvalue()),
    }


def _resources(log: str) -> dict[str, int]:
    """Return what the assembler's report says, over the kernel and the functions it calls."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        raise RuntimeError(f"the assembler's report has an unknown form: {log!r}")
    return {
        "registers": max(map(int, registers)),
        "stack": max(int(stack) for stack, _, _ in frames),
        "spill_stores": sum(int(stores) for _, stores, _ in frames),
        "spill_loads": sum(int(loads) for _, _, loads in frames),
    }


def _check_cubin(parameters: list[str]) -> None:
    """Check that the machine code takes exactly our parameters, of 8 bytes for a pointer and 4 for a scalar."""
    dump = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-elf", "kernel.cubin"], text=True)
    found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*0x(\w+)", dump)
    sizes = [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in found)]
    expected = [8 if kind.startswith("*") else 4 for kind in parameters]
    if sizes != expected:
        raise RefusedKernelError(f"its machine code takes parameters of {sizes} bytes, but {expected} are passed")


_REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {"describe": describe, "compile": compile_kernel}


def main() -> None:
    """Serve one request. Errors of the kernel, and only they, are part of the result."""
    request = json.loads(sys.stdin.read())
    try:
        result = _REQUESTS[request.pop("request")](**request)
    except RefusedKernelError as error:
        result = {"error": str(error)}
    except triton.CompilationError as error:
        result = {"error": f"Triton's compiler refuses it: {error}"}
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
