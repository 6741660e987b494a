"""What compiled kernels take of a GPU, and what of it is a problem."""

from __future__ import annotations

from edgeattn.plugins_trt.kernel_library import CompiledKernel
from edgeattn.targets import SMS

_REGISTERS_PER_SM = 65536
_REGISTERS_PER_ALLOCATION = 256
"""A warp's registers are given out in multiples of this."""

_RESERVED_SHARED = 1024
"""Bytes of shared memory that the driver takes for every block; an SM has as much more than one block may use."""


def problems(kernel: CompiledKernel, shared_limit: int | None = None) -> list[str]:
    """Return what is wrong with a kernel's resources, as sentences without the kernel's name; empty when all is well.

    Args:
        kernel: a compiled kernel.
        shared_limit: most shared memory one block may use, in bytes; that of the architecture when None.
    """
    limit = SMS[kernel.sm].shared_memory_bytes if shared_limit is None else shared_limit
    found = []
    if kernel.spill_stores or kernel.spill_loads:
        found.append(
            f"spills registers ({kernel.spill_stores} bytes stored, {kernel.spill_loads} loaded per thread), which is "
            "right but slower; smaller tiles or more warps in the declaration's tilings help"
        )
    elif kernel.stack:
        found.append(f"keeps {kernel.stack} bytes per thread on a stack; index nothing by a run-time value")
    if kernel.shared > limit:
        found.append(f"needs {kernel.shared} bytes of shared memory, and a block may use {limit}; choose smaller tiles")
    return found


def resident_programs(kernel: CompiledKernel) -> int:
    """Return how many programs one SM holds at a time as far as registers and shared memory decide."""
    warp = 32 * kernel.registers
    warp = -(-warp // _REGISTERS_PER_ALLOCATION) * _REGISTERS_PER_ALLOCATION
    by_registers = _REGISTERS_PER_SM // (warp * kernel.warps)
    by_shared = (SMS[kernel.sm].shared_memory_bytes + _RESERVED_SHARED) // (kernel.shared + _RESERVED_SHARED)
    return min(by_registers, by_shared)
