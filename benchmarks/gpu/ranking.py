"""Ranks the tilings that were timed. Pure arithmetic: no torch, no GPU.

Warps and stages belong to a launch, constants to the operation. So a set of constants is as fast as the sum of its
launches, each with its own best warps and stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gpu.cases import Record


def ranking(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return, for every workload, data type and layout, the sets of constants from the fastest on.

    Args:
        records: of this section.

    Returns:
        One entry for each set of constants: the sum of its launches' best times, with the warps and stages that gave
        them, ready to be copied into a `Tiling`, and the best time that was measured for all launches together.
    """
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            constants = ", ".join(f"{name}={value}" for name, value in record["constants"].items())
            groups[record["workload"], record["element"], record["layout"], constants].append(record)
    entries = []
    for (workload, element, layout, _), members in groups.items():
        best: Mapping[str, Record] = {
            launch: min(members, key=lambda record: record["launches"][launch]) for launch in members[0]["launches"]
        }
        entries.append(
            {
                "workload": workload,
                "element": element,
                "layout": layout,
                "constants": members[0]["constants"],
                "warps": {launch: record["warps"][launch] for launch, record in best.items()},
                "stages": {launch: record["stages"][launch] for launch, record in best.items()},
                "sum_of_launches": sum(record["launches"][launch] for launch, record in best.items()),
                "measured_together": min(record["graph"]["median"] for record in members),
            }
        )
    order = {key: index for index, key in enumerate(dict.fromkeys((e["workload"], e["element"]) for e in entries))}
    return sorted(entries, key=lambda e: (order[e["workload"], e["element"]], e["layout"], e["sum_of_launches"]))
