"""First half of the tuning: compiles every tiling of the declared grid and checks its result."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpu.cases import Case, Record, Settings
from gpu.checks import verdict
from gpu.data import layouts_of, random_inputs, sizes_for, sm_of, wait
from gpu.operations import reference_of
from gpu.workloads import DRY_WORKLOADS, WORKLOADS, Workload

from edgeattn.plugins_trt import PLUGINS, PluginSpec
from edgeattn.plugins_trt.spec import Tiling
from edgeattn.plugins_trt.torch_host import run as run_kernels
from edgeattn.plugins_trt.variants import variants_of

GRID: Mapping[str, tuple[int, ...]] = {
    "QUERY_BLOCK": (32, 64, 128),
    "KEY_BLOCK": (16, 32, 64, 128),
    "HEAD_TILE": (32, 64, 128, 256),
    "CHANNEL_TILE": (64, 128, 256, 512),
    "SPLITS": (1, 2, 3, 4),
}
"""Values of the tilings' constants by name; a constant that is not here keeps its value."""

WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
LARGEST_TILE = 128 * 256
"""FP32 accumulators of a program (queries times channels) beyond this spill in any case."""

DRY_TRIES = 2


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return a case for each tiling: the present one first, then the grid in a random order.

    A random order makes what fits in the time a fair sample of the grid.
    """
    cases = []
    draw = random.Random(settings.seed)
    for workload, element, layout in tuned(settings):
        present = PLUGINS.get(workload.operation).tiling(sm_of(settings), element, layout)
        names = [name for name in GRID if name in present.constants]
        constants = [
            {**present.constants, **dict(zip(names, values, strict=True))}
            for values in itertools.product(*(GRID[name] for name in names))
        ]
        launches = present.warps
        tries = [
            _parameters(
                workload, element, layout, chosen, dict.fromkeys(launches, warps), dict.fromkeys(launches, stages)
            )
            for chosen in constants
            for warps in WARPS
            for stages in STAGES
            if chosen.get("QUERY_BLOCK", 1) * chosen.get("CHANNEL_TILE", 1) <= LARGEST_TILE
        ]
        draw.shuffle(tries)
        different: dict[str, dict[str, Any]] = {}
        for one in (_parameters(workload, element, layout, present.constants, launches, present.stages), *tries):
            # A tile beyond the channels is the same kernel as one that just holds them.
            different.setdefault(_compiled(one, settings), one)
        kept = list(different.values())[: DRY_TRIES if settings.dry else None]
        cases.append([Case(title(one), 40.0, one) for one in kept])
    # In turns, so that every operation gets its share of the time.
    return [case for turn in itertools.zip_longest(*cases) for case in turn if case is not None]


def tuned(settings: Settings) -> list[tuple[Workload, str, str]]:
    """Return what is tuned: the first workload of every chosen operation that has kernels, data types and layouts."""
    chosen: dict[str, Workload] = {}
    for workload in DRY_WORKLOADS if settings.dry else WORKLOADS:
        if PLUGINS.get(workload.operation).launches and (
            not settings.operations or workload.operation in settings.operations
        ):
            chosen.setdefault(workload.operation, workload)
    runs = [
        (workload, element, layout)
        for workload in chosen.values()
        for element in settings.elements
        for layout in layouts_of(PLUGINS.get(workload.operation))
    ]
    return runs[:1] if settings.dry else runs


def _parameters(
    workload: Workload,
    element: str,
    layout: str,
    constants: Mapping[str, int],
    warps: Mapping[str, int],
    stages: Mapping[str, int],
) -> dict[str, Any]:
    """Return what identifies a tiling at a workload."""
    return {
        "workload": workload.name,
        "element": element,
        "layout": layout,
        "constants": dict(constants),
        "warps": dict(warps),
        "stages": dict(stages),
    }


def title(chosen: Mapping[str, Any]) -> str:
    """Return the name of a tiling."""
    parts = [f"{name}={value}" for name, value in chosen["constants"].items()]
    parts += [f"{kind} {'/'.join(map(str, chosen[kind].values()))}" for kind in ("warps", "stages")]
    return f"{chosen['workload']}, {chosen['element']}, {chosen['layout']}: {', '.join(parts)}"


def _compiled(chosen: Mapping[str, Any], settings: Settings) -> str:
    """Return what tells the compiled kernels of a tiling apart."""
    spec, workload = spec_with(chosen, settings)
    variants = variants_of(spec, chosen["element"], chosen["layout"], sm_of(settings), workload.static)
    return repr([(variant.constants, variant.warps, variant.stages) for variant in variants])


def spec_with(chosen: Mapping[str, Any], settings: Settings) -> tuple[PluginSpec, Workload]:
    """Return the operation with one tiling in place of all others, and the workload."""
    workloads = DRY_WORKLOADS if settings.dry else WORKLOADS
    workload = next(workload for workload in workloads if workload.name == chosen["workload"])
    tiling = Tiling(constants=chosen["constants"], warps=chosen["warps"], stages=chosen["stages"])
    return replace(PLUGINS.get(workload.operation), tilings=(tiling,)), workload


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield the errors of a tiling, or why it does not run."""
    chosen = case.parameters
    spec, workload = spec_with(chosen, settings)
    element, layout = chosen["element"], chosen["layout"]
    sizes = sizes_for(spec, batch=workload.batch, static=workload.static, a=workload.a, b=workload.b)
    inputs = random_inputs(spec, sizes, element, layout, settings)
    try:
        outputs = run_kernels(spec, inputs, layout=layout, sm=sm_of(settings), poison=math.nan)
        wait(settings)
    except Exception as error:
        if "OutOfResources" not in type(error).__name__:
            raise
        yield {"status": "ok", "fits": False, "reason": str(error)[:200], **chosen}
        return
    yield {"fits": True, **verdict(outputs, reference_of(spec, inputs), element, repeatable=True), **chosen}
