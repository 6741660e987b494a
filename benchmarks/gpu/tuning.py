"""Second half of the tuning: times the tilings that are right, alone on the GPU, and each of their launches.

`ranking` makes a table of the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from gpu import clock
from gpu.cases import Case, Record, Settings
from gpu.data import random_inputs, sizes_for, sm_of
from gpu.speed import plugin_call
from gpu.tuning_check import spec_with, title

from edgeattn.plugins_trt import PluginSpec
from edgeattn.plugins_trt.torch_host import run as run_kernels

RUNS = 30


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return the tilings that passed the check, in its order."""
    passed = [record for record in records if record.get("fits") and record["status"] == "ok"]
    names = ("workload", "element", "constants", "warps", "stages", "layout")
    chosen = [{name: record[name] for name in names} for record in passed]
    return [Case(title(one), 30.0, one) for one in chosen]


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield the time of all launches together and of each alone."""
    chosen = case.parameters
    spec, workload = spec_with(chosen, settings)
    sizes = sizes_for(spec, batch=workload.batch, static=workload.static, a=workload.a, b=workload.b)
    inputs = random_inputs(spec, sizes, chosen["element"], chosen["layout"], settings)
    outputs = sum(
        tensor.numel() * tensor.element_size()
        for tensor in run_kernels(spec, inputs, layout=chosen["layout"], sm=sm_of(settings))
    )
    sets = clock.copies_of(tuple(inputs.values()), outputs, settings)

    def timed(some: PluginSpec) -> dict[str, Any]:
        call = plugin_call(some, chosen["layout"], settings)
        clock.warm_up(call, sets[:1], settings)
        return asdict(clock.time_graph(call, sets, settings, runs=RUNS))

    whole = timed(spec)
    # A launch alone reads workspaces that hold anything; its time does not depend on their values.
    alone = {launch.name: timed(replace(spec, launches=(launch,)))["median"] for launch in spec.launches}
    yield {"status": "ok", **chosen, "operation": spec.name, "graph": whole, "launches": alone}
