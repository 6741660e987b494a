"""Every kernel against FP64 on fresh random data: both layouts, all data types, ragged sizes, poisoned outputs.

Each case runs twice and has to give the same bits, because a result that moves is a race. Outputs and workspaces are
NaN before each launch, so what a kernel leaves out shows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from gpu.cases import LIMITS, Case, Record, Settings
from gpu.data import SPREAD, STEEP_SPREAD, elements_of, errors_of, layouts_of, random_inputs, sizes_for, sm_of, wait
from gpu.operations import Tensors, reference_of

from edgeattn.plugins_trt import PLUGINS, PluginSpec
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS
from edgeattn.plugins_trt.torch_host import run as run_kernels

Maps = tuple[tuple[int, int], tuple[int, int]]
"""Height and width of two maps; see `data.sizes_for`."""


@dataclass(frozen=True)
class Group:
    """Sizes that share compiled kernels.

    Attributes:
        name: unique.
        batch: images.
        maps: pairs of maps to run at.
        static: sizes that are compiled in; the first published ones when None.
        random_maps: how many further pairs are drawn from the seed.
        steep: whether scores beyond FP16's range are checked too, for 16-bit types.
        huge: whether tensors have more than 2^31 elements; then one data type and layout, and the last image only.
        seconds: time limit.
    """

    name: str
    batch: int
    maps: tuple[Maps, ...]
    static: Mapping[str, int] | None = None
    random_maps: int = 0
    steep: bool = False
    huge: bool = False
    seconds: float = 60.0


GROUPS = (
    # First, because it is one long case; the others go on beside it.
    Group(
        "beyond 2^31 elements",
        5,
        (((4096, 4096), (13, 29)),),
        {"head_channels": 16, "channels": 32},
        huge=True,
        seconds=120.0,
    ),
    Group("published", 1, (((97, 97), (60, 60)), ((64, 48), (320, 64)), ((33, 65), (17, 129))), steep=True),
    Group(
        "odd channels, batch 3",
        3,
        (((13, 29), (7, 31)), ((1, 37), (41, 1)), ((37, 1), (1, 1)), ((1, 1), (1, 1))),
        {"head_channels": 20, "channels": 72},
        random_maps=2,
    ),
    Group(
        "beyond 65504 positions",
        1,
        (((1, 70000), (1, 70000)), ((70000, 1), (3, 5)), ((257, 263), (13, 29))),
        {"head_channels": 16, "channels": 32},
        seconds=90.0,
    ),
    Group("few channels", 2, (((2, 3), (3, 2)), ((31, 33), (1, 5))), {"head_channels": 5, "channels": 3}),
)
DRY_GROUPS = (
    Group("dry", 1, (), {"head_channels": 5, "channels": 3}, random_maps=1, steep=True),
    Group("dry, last image", 2, (((1, 5), (3, 1)),), {"head_channels": 3, "channels": 5}, huge=True),
)


def with_kernels() -> list[PluginSpec]:
    """Return the operations that have kernels."""
    return [spec for spec in PLUGINS if spec.launches]


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return a case for each group, operation, data type and layout; huge maps take turns, to fit in memory."""
    cases = []
    for group in _groups(settings):
        runs = [
            (spec.name, element, layout)
            for spec in with_kernels()
            if group.static is not None or spec.presets
            for element in elements_of(settings)
            for layout in layouts_of(spec)
        ]
        if group.huge:
            runs = [(spec.name, "float16", LAYOUTS[0]) for spec in with_kernels()]
            cases.append(Case(group.name, group.seconds, {"group": group.name, "runs": runs}))
        else:
            cases += [
                Case(f"{' '.join(run)}: {group.name}", group.seconds, {"group": group.name, "runs": [run]})
                for run in runs
            ]
    return cases


def _groups(settings: Settings) -> tuple[Group, ...]:
    return DRY_GROUPS if settings.dry else GROUPS


def _maps(group: Group, settings: Settings) -> list[Maps]:
    """Return the group's maps, with those of this run's seed."""
    draw = random.Random(settings.seed)
    largest = 3 if settings.dry else 70

    def side() -> int:
        return draw.randint(1, largest)

    return [*group.maps, *(((side(), side()), (side(), side())) for _ in range(group.random_maps))]


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield one record for each size."""
    group = next(group for group in _groups(settings) if group.name == case.parameters["group"])
    for name, element, layout in case.parameters["runs"]:
        spec = PLUGINS.get(name)
        static = spec.presets[0] if group.static is None else group.static
        for index, (a, b) in enumerate(_maps(group, settings)):
            sizes = sizes_for(spec, batch=group.batch, static=static, a=a, b=b)
            yield check(spec, sizes, element, layout, settings, last_image=group.huge)
            if group.steep and index == 0 and ELEMENT_BYTES[element] == 2:
                yield check(spec, sizes, element, layout, settings, spread=STEEP_SPREAD)


def check(
    spec: PluginSpec,
    sizes: Mapping[str, int],
    element: str,
    layout: str,
    settings: Settings,
    *,
    spread: float = SPREAD,
    last_image: bool = False,
) -> Record:
    """Run an operation twice on poisoned memory and compare it with FP64.

    Args:
        spec: the operation.
        sizes: value of every size.
        element: data type.
        layout: layout of its maps.
        settings: what the user asked for.
        spread: standard deviation of the scores.
        last_image: compare the last image only, where all of them would not fit in FP64.
    """
    inputs = random_inputs(spec, sizes, element, layout, settings, spread=spread)
    outputs, again = (run_kernels(spec, inputs, layout=layout, sm=sm_of(settings), poison=math.nan) for _ in range(2))
    wait(settings)
    repeatable = all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
    del again
    if last_image:
        outputs = tuple(output[-1:] for output in outputs)
        inputs = {
            tensor.name: inputs[tensor.name][-1:] if tensor.shape[0] == "batch" else inputs[tensor.name]
            for tensor in spec.inputs
        }
    return {
        **verdict(outputs, reference_of(spec, inputs), element, repeatable=repeatable),
        "operation": spec.name,
        "element": element,
        "layout": layout,
        "sizes": dict(sizes),
        "score_spread": spread,
    }


def verdict(outputs: Tensors, expected: Tensors, element: str, *, repeatable: bool) -> Record:
    """Return status, errors and what is wrong, for outputs that were NaN before."""
    unwritten = sum(int(output.isnan().sum()) for output in outputs)
    errors = errors_of(outputs, expected)
    passed = max(errors) <= LIMITS[element] and not unwritten and repeatable
    return {
        "status": "ok" if passed else "failed",
        "relative_l2": errors,
        "limit": LIMITS[element],
        "not_a_number": unwritten,
        "repeatable": repeatable,
    }
