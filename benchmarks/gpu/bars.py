"""Evaluates the bars from the records of the section "speed". Pure arithmetic: no torch, no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu.cases import Record
from gpu.workloads import BAR_ELEMENT, DRY_WORKLOADS, WORKLOADS

from edgeattn.plugins_trt.variants import Cost

PLUGIN = "plugin"
MACHINE = "machine"
ROOFLINE = "roofline"


def best_microseconds(record: Record) -> float:
    """Return the better median of a contestant with a cold L2: called one by one, or in a CUDA graph."""
    return min(record[form]["median"] for form in ("calls", "graph") if form in record)


def roofline_microseconds(record: Record, machine: Record) -> float:
    """Return the least time of an operation at the bandwidth and matrix rate that were measured in the same run."""
    rate = machine["flops_per_second"][record["element"]]
    return 1e6 * Cost(**record["cost"]).roofline_seconds(rate, machine["bytes_per_second"])


def timed(records: Iterable[Record], **having: Any) -> list[Record]:
    """Return the complete records that have the given values."""
    return [
        record
        for record in records
        if record["status"] in ("ok", "failed")
        and "calls" in record
        and all(record.get(name) == value for name, value in having.items())
    ]


def machine_of(records: Iterable[Record]) -> Record | None:
    """Return the record of the machine's ceilings, if it is there."""
    return next((record for record in records if record["case"] == MACHINE and record["status"] == "ok"), None)


def evaluate(records: Sequence[Record], *, dry: bool) -> list[dict[str, Any]]:
    """Return every bar, for each layout of ours, with what was measured.

    A contestant's time is its best over layouts, `torch.compile` modes and forms of launching. `met` is None where a
    figure is missing, and in a dry run.

    Args:
        records: of the section "speed".
        dry: whether the figures are of a dry run.
    """
    machine = machine_of(records)
    bars: list[dict[str, Any]] = []
    for workload in DRY_WORKLOADS if dry else WORKLOADS:
        for ours in timed(records, workload=workload.name, contestant=PLUGIN):
            shared = {"workload": workload.name, "element": ours["element"], "layout": ours["layout"]}
            for bar in workload.bars if ours["element"] == BAR_ELEMENT else ():
                theirs = [
                    best_microseconds(record)
                    for record in timed(
                        records, workload=workload.name, element=ours["element"], contestant=bar.contestant
                    )
                ]
                if bar.contestant == ROOFLINE and machine is not None:
                    theirs = [roofline_microseconds(ours, machine)]
                ratio = min(theirs) / best_microseconds(ours) if theirs else None
                bars.append(
                    {
                        **shared,
                        "bar": bar.text,
                        "ours_microseconds": best_microseconds(ours),
                        "other": bar.contestant,
                        "other_microseconds": min(theirs) if theirs else None,
                        "ratio": ratio,
                        "least_ratio": bar.at_least,
                        "met": None if dry or ratio is None else ratio >= bar.at_least,
                    }
                )
            bars.append({**shared, **memory_bar(ours, dry=dry)})
    return bars


def memory_bar(ours: Record, *, dry: bool) -> dict[str, Any]:
    """Return the bar on memory: outputs, and one partial result of the same size with its log-sum-exp in FP32."""
    allowed = 2 * ours["outputs_bytes"] + ours["lse_bytes"]
    taken = None if ours["extra_memory"] is None else ours["extra_memory"]["requested"]
    return {
        "bar": "peak extra memory at most outputs and one partial result",
        "extra_bytes": taken,
        "allowed_bytes": allowed,
        "met": None if dry or taken is None else taken <= allowed,
    }
