"""Readable tables of the results, printed with nothing but `print`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpu.bars import best_microseconds, machine_of, roofline_microseconds, timed
from gpu.cases import Record
from gpu.ranking import ranking

MOST_ROWS = 25


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows under headers, columns as wide as their longest cell."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def statuses(records: Sequence[Record]) -> str:
    """Return how often each status came, such as "120 ok, 1 failed"."""
    return ", ".join(f"{count} {status}" for status, count in Counter(r["status"] for r in records).most_common())


def troubles(section: str, records: Sequence[Record]) -> str:
    """Return the records that are not fine, the first of many."""
    bad = [record for record in records if record["status"] not in ("ok", "skipped")]
    lines = [f"  {section}: {r['case']}: {r['status']}: {_why(r)}" for r in bad[:MOST_ROWS]]
    return "\n".join([*lines, *([f"  ... and {len(bad) - MOST_ROWS} more"] if len(bad) > MOST_ROWS else [])])


def _why(record: Record) -> str:
    if "reason" in record:
        return str(record["reason"])
    if "elements" in record:
        return f"FP32 {record['elements']['float32']}"
    return ", ".join(
        f"{name} {record[name]}" for name in ("sizes", "relative_l2", "not_a_number", "repeatable") if name in record
    )


def checks(records: Sequence[Record]) -> str:
    """Return the largest error of every operation, data type and layout."""
    return _largest_errors(records, ("operation", "element", "layout"))


def driver(records: Sequence[Record]) -> str:
    """Return the same for kernels that were loaded through the driver."""
    return _largest_errors(records, ("operation", "element", "layout", "form"))


def _largest_errors(records: Sequence[Record], names: tuple[str, ...]) -> str:
    groups: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        if "relative_l2" in record:
            groups.setdefault(tuple(record[name] for name in names), []).append(_finite(max(record["relative_l2"])))
    rows = [[*key, len(errors), f"{max(errors):.1e}"] for key, errors in groups.items()]
    return table([*names, "cases", "largest relative L2"], rows)


def _finite(error: float | None) -> float:
    return float("inf") if error is None else error


def speed(records: Sequence[Record]) -> str:
    """Return the times of all contestants, in microseconds, and the roofline of each workload."""
    rows = []
    machine = machine_of(records)
    for record in sorted(timed(records), key=lambda r: (r["workload"], r["element"], best_microseconds(r))):
        memory = record["extra_memory"]
        rows.append(
            [
                record["workload"],
                record["element"],
                f"{record['contestant']} {record['mode'] or ''}".strip(),
                record["layout"],
                *(_median(record, form) for form in ("graph", "graph_warm_l2", "calls", "calls_warm_l2")),
                "" if machine is None else f"{roofline_microseconds(record, machine):.1f}",
                "" if memory is None else f"{memory['requested'] / 2**20:.1f}",
                f"{max(_finite(error) for error in record['relative_l2']):.1e}",
                f"{record['compile_seconds']:.0f}" if "compile_seconds" in record else "",
            ]
        )
    headers = ["workload", "type", "contestant", "layout", "graph", "graph, warm L2", "calls", "calls, warm L2"]
    text = table([*headers, "roofline", "extra MiB", "relative L2", "compile s"], rows)
    if machine is not None:
        rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in machine["flops_per_second"].items())
        text += f"\nMeasured here: {machine['bytes_per_second'] / 1e12:.2f} TB/s (copy, read and written); {rates}."
    return text


def _median(record: Record, form: str) -> str:
    return f"{record[form]['median']:.1f}" if form in record else ""


def blocks(records: Sequence[Record]) -> str:
    """Return the blocks with the largest FP32 errors and those that are not finite in 16 bits."""
    compared = [record for record in records if "elements" in record]

    def error(record: Record, element: str) -> float:
        return _finite(record["elements"][element].get("relative_l2"))

    def cell(record: Record, element: str) -> str:
        result = record["elements"][element]
        if "error" in result:
            return "error"
        return "not finite" if result["relative_l2"] is None else f"{result['relative_l2']:.1e}"

    worst = sorted(compared, key=lambda record: -error(record, "float32"))[:MOST_ROWS]
    elements = ("float32", "float16", "bfloat16")
    rows = [[record["case"], *(cell(record, element) for element in elements)] for record in worst]
    overflowing = {
        element: sum(bool(record["elements"][element].get("not_finite")) for record in compared) for element in elements
    }
    counts = ", ".join(f"{count} in {element}" for element, count in overflowing.items())
    return f"{table(['largest FP32 errors', *elements], rows)}\nBlocks with values that are not finite: {counts}."


def tuning(records: Sequence[Record]) -> str:
    """Return the fastest tilings of every workload, ready to be copied into a spec."""
    rows = []
    shown: dict[tuple[str, ...], int] = {}
    for entry in ranking(records):
        key = (entry["workload"], entry["element"], entry["layout"])
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= 6:
            times = [f"{entry['sum_of_launches']:.1f}", f"{entry['measured_together']:.1f}"]
            rows.append([*key, *times, entry["constants"], entry["warps"], entry["stages"]])
    headers = ["workload", "type", "layout", "sum of launches", "together", "constants", "warps", "stages"]
    return table(headers, rows)


def bars(entries: Sequence[dict[str, Any]]) -> str:
    """Return what was asked and what was measured."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    rows = []
    for entry in entries:
        if "ratio" in entry:
            measured = "" if entry["ratio"] is None else f"{entry['ratio']:.2f} (asked {entry['least_ratio']:.2f})"
        else:
            taken = "?" if entry["extra_bytes"] is None else f"{entry['extra_bytes'] / 2**20:.1f}"
            measured = f"{taken} MiB (asked {entry['allowed_bytes'] / 2**20:.1f})"
        rows.append([entry["workload"], entry["element"], entry["layout"], entry["bar"], measured, words[entry["met"]]])
    return table(["workload", "type", "layout", "bar", "other / ours, or memory", "verdict"], rows)


BY_SECTION = {"checks": checks, "speed": speed, "driver": driver, "blocks": blocks, "tuning": tuning}
"""The table of each section that has one."""
