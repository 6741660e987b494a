"""Reads the PTX of one Triton kernel: its entry, what a plain launch cannot provide, parameters that nobody passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\((?P<parameters>.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(?P<kind>\w+)\b.*?(?P<name>[\w$]+)\s*$")

_PTX_KINDS = {"*": "u64", "i32": "u32"}
"""Kind of a PTX parameter by Triton type; every type that begins with "*" is a pointer."""

_SCRATCH_PARAMETERS = 2
"""Triton ends every kernel's parameters with pointers to global and to profiler scratch memory."""

_NEEDS: Mapping[str, str] = {
    "num_ctas": "programs of several thread blocks (num_ctas)",
    "global_scratch_size": "global scratch memory (as tensor descriptors that are made on the device do)",
    "profile_scratch_size": "profiler scratch memory",
    "tensordesc_meta": "tensor descriptors from the host (TMA)",
    "launch_cooperative_grid": "a cooperative launch",
    "launch_pdl": "programmatic dependent launch",
}
"""What a kernel's metadata may ask of the launch and the hosts do not provide."""

_NEEDED_BY_INSTRUCTION: Mapping[str, str] = {
    r"\.(reqnctapercluster|explicitcluster|maxclusterrank)\b": "thread block clusters",
    r"\bgriddepcontrol\b": "programmatic dependent launch",
    r"\b(cp\.async\.bulk\.(prefetch\.)?tensor|tensormap\.)": "tensor descriptors (TMA)",
}
"""The same by what the PTX holds."""


class RefusedKernelError(ValueError):
    """The kernel compiles, but needs something that the hosts do not provide."""


def entry_of(ptx: str) -> str:
    """Return the name of the one kernel in a PTX text."""
    return _entry(ptx)["name"]


def check_launch_needs(ptx: str, metadata: Mapping[str, Any]) -> None:
    """Check that a kernel can be launched with a grid, a block, dynamic shared memory and plain parameters.

    Args:
        ptx: the kernel.
        metadata: what Triton's compiler says about it.

    Raises:
        RefusedKernelError: it needs more; the message says what.
    """
    needs = [text for key, text in _NEEDS.items() if metadata.get(key) and (key, metadata[key]) != ("num_ctas", 1)]
    needs += [text for pattern, text in _NEEDED_BY_INSTRUCTION.items() if re.search(pattern, ptx)]
    if needs:
        raise RefusedKernelError(f"it needs {', '.join(needs)}, which TensorRT plugins cannot provide")


def strip_scratch_parameters(ptx: str, types: Sequence[str]) -> str:
    """Remove the parameters that Triton appends to a kernel's own.

    Args:
        ptx: the kernel, which needs no scratch memory.
        types: Triton type of each of the kernel's own parameters, in order.

    Raises:
        RefusedKernelError: the kernel reads an appended parameter, or its own parameters are not those of `types`.
    """
    entry = _entry(ptx)
    declared = [text.strip() for text in entry["parameters"].split(",") if text.strip()]
    kinds = [_parameter(text)["kind"] for text in declared]
    expected = [_PTX_KINDS[kind[0] if kind.startswith("*") else kind] for kind in types]
    appended = declared[len(expected) :]
    if kinds[: len(expected)] != expected or len(appended) > _SCRATCH_PARAMETERS:
        raise RefusedKernelError(f"its parameters are {', '.join(kinds)}, but {', '.join(expected)} are passed")
    for text in appended:
        name = _parameter(text)["name"]
        if len(re.findall(rf"(?<![\w$]){re.escape(name)}(?![\w$])", ptx)) != 1:
            raise RefusedKernelError(f"it reads the parameter {name}, which Triton appended and nobody passes")
    kept = ",\n".join(f"\t{text}" for text in declared[: len(expected)])
    return f"{ptx[: entry.start('parameters')]}\n{kept}\n{ptx[entry.end('parameters') :]}"


def _entry(ptx: str) -> re.Match[str]:
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise RefusedKernelError(f"its PTX holds {len(entries)} kernels instead of one")
    return entries[0]


def _parameter(text: str) -> re.Match[str]:
    if (match := _PARAMETER.match(text)) is None:
        raise RefusedKernelError(f"its PTX declares a parameter in an unknown form: {text!r}")
    return match
