"""What a target can do at best, and how much of it is expected."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from edgeattn.export.estimate.result import Band, Roof
from edgeattn.foundation import UserError
from edgeattn.targets import Target

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

NEEDED = ("memory_gib", "bandwidth_gb_s", "int8_tops", "fp16_tflops")
"""Figures of a target without which nothing can be estimated."""


@cache
def assumptions() -> dict[str, Any]:
    """Return the content of `assumptions.toml`."""
    return tomllib.loads(Path(__file__).with_name("assumptions.toml").read_text(encoding="utf-8"))


def roof_of(target: Target, *, tf32: bool = False) -> Roof:
    """Return the peaks of a target.

    Args:
        target: the target.
        tf32: FP32 products run on the matrix units, with inputs rounded to TF32.

    Raises:
        UserError: the target does not state a figure.
    """
    known = {name: getattr(target, name) for name in NEEDED}
    if missing := [name for name, value in known.items() if value is None]:
        raise UserError(
            f"the target {target.name} does not state {', '.join(missing)}: modules of the family differ, or nobody "
            "has filed it. Name a module with --target, such as jetpack-6.2-orin-nx-16 (`edgeattn list targets`), or "
            f'add the figure in ~/.config/edgeattn/targets.toml: [target.my-board] with base = "{target.name}" and '
            f"{missing[0]} = NUMBER, and use --target my-board."
        )
    data = assumptions()["fp32"]
    int8, fp16 = 1e12 * known["int8_tops"], 1e12 * known["fp16_tflops"]
    ratio = data["of_int8"].get(str(target.sm))
    if ratio is None:
        raise UserError(
            f"the FP32 rate of sm_{target.sm} is not declared. Add it to export/estimate/assumptions.toml, "
            "[fp32] of_int8."
        )
    vector = int8 * ratio
    notes = [
        f"FP32 rate {vector / 1e12:.3g} TFLOPS, derived: {ratio:g} of the INT8 rate on sm_{target.sm} "
        "(FP32 lanes over INT8 multiply-adds of a multiprocessor)",
        "FP32 products on the matrix units in TF32, at half of the FP16 rate"
        if tf32
        else "TF32 is off: FP32 products run on the FP32 units",
    ]
    if doubtful := [name for name in NEEDED if name in target.unverified]:
        notes.append(f"nobody has confirmed these figures of {target.name}: {', '.join(doubtful)}")
    tensor = {
        "int8": int8,
        "fp16": fp16,
        "bf16": fp16,
        "fp32": data["tf32_of_fp16"] * fp16 if tf32 else vector,
    }
    return Roof(1e9 * known["bandwidth_gb_s"], tensor, vector, tuple(notes))


def seconds(kind: str, work: float, rate: float, moved: float, bandwidth: float) -> tuple[Band, str]:
    """Return the time of a layer, and whether computing or memory decides it at typical efficiency.

    Args:
        kind: kind of layer.
        work: operations.
        rate: peak operations per second.
        moved: bytes read and written.
        bandwidth: peak bytes per second.
    """
    efficiency = assumptions()["efficiency"][kind]
    pairs = [
        (work / (rate * compute), moved / (bandwidth * memory))
        for compute, memory in zip(efficiency["compute"], efficiency["bandwidth"], strict=True)
    ]
    launch = assumptions()["launch"]["seconds"]
    low, typical, high = (start + max(pair) for start, pair in zip(launch, pairs, strict=True))
    return Band(low, typical, high), "compute" if pairs[1][0] >= pairs[1][1] else "memory"


def sentences(roof: Roof) -> tuple[str, ...]:
    """Return everything that is assumed, in sentences."""
    data = assumptions()
    parts = [*data["fusion"]["rules"], f"fusion rules: {data['fusion']['source']}"]
    for kind, entry in data["efficiency"].items():
        compute, bandwidth = (", ".join(f"{value:.0%}" for value in entry[key]) for key in ("compute", "bandwidth"))
        parts.append(
            f"{kind}: {compute} of the peak rate and {bandwidth} of the bandwidth (best, typical, worst), assumed: "
            f"{entry['reason']}"
        )
    launch = ", ".join(f"{1e6 * value:g}" for value in data["launch"]["seconds"])
    memory = data["memory"]
    return (
        *parts,
        f"each layer takes {launch} us more: {data['launch']['reason']}",
        *roof.notes,
        str(memory["arena"]),
        f"{memory['usable']:.0%} of the memory is usable: {memory['usable_reason']}",
        f"{memory['runtime_bytes'] / 1e6:.0f} MB for {memory['runtime_reason']}",
        f"{memory['engine_bytes_per_layer'] / 1e3:.0f} kB of engine for each layer besides weights: "
        f"{memory['engine_reason']}",
    )
