"""Times one call: CUDA events around single calls, and around replays of a CUDA graph.

Calls rotate over copies of their inputs and keep their outputs, so that the L2 cache holds neither; one copy alone
gives the figure with a warm cache. A dry run goes the same way with the host's clock, and measures nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu.cases import Settings
from gpu.data import device_of, wait
from gpu.operations import Tensors

Call = Callable[..., Any]

RUNS = 60
"""Timed runs at least; the median counts."""

WARM_UP_SECONDS = 0.15
"""Time to run before the clock counts, for the GPU to leave its idle clock rate."""

MOST_COPIES = 48
WARM_CALLS_PER_GRAPH = 8
DRY_RUNS = 1


@dataclass(frozen=True)
class Timing:
    """Times of one call in microseconds.

    Attributes:
        median, least, ninth: median, least and ninth decile over the runs.
        runs: how many.
    """

    median: float
    least: float
    ninth: float
    runs: int

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Timing:
        """Return the summary of several runs."""
        ordered = sorted(microseconds)
        ninth = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)))]
        return cls(statistics.median(ordered), ordered[0], ninth, len(ordered))


def l2_bytes(settings: Settings) -> int:
    """Return the size of the L2 cache."""
    if settings.dry:
        return 0
    return int(torch.cuda.get_device_properties(device_of(settings)).L2_cache_size)


def copies_needed(one: int, cache: int) -> int:
    """Return how many copies of `one` bytes exceed twice the cache."""
    return max(2, min(MOST_COPIES, math.ceil(2 * cache / max(1, one)) + 1))


def copies_of(inputs: Tensors, outputs: int, settings: Settings) -> list[Tensors]:
    """Return copies of the inputs that, with outputs of a given size in bytes, exceed twice the L2 cache."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs) + outputs
    count = copies_needed(size, l2_bytes(settings))
    return [inputs, *(tuple(tensor.clone() for tensor in inputs) for _ in range(count - 1))]


def warm_up(call: Call, sets: Sequence[Tensors], settings: Settings) -> None:
    """Run for a while: module load, compilation and handles stay out of the times, and the clock rate rises."""
    started = time.perf_counter()
    call(*sets[0])
    wait(settings)
    while not settings.dry and time.perf_counter() - started < WARM_UP_SECONDS:
        for inputs in sets:
            call(*inputs)
        wait(settings)


def time_calls(
    call: Call, sets: Sequence[Tensors], settings: Settings, *, keep: bool = True, runs: int = RUNS
) -> Timing:
    """Time single calls, launches from Python included.

    Args:
        call: takes the tensors of a set.
        sets: copies of the inputs, taken in turns.
        settings: what the user asked for.
        keep: keep as many outputs as there are sets, so that their memory is not the last call's.
        runs: timed calls.
    """
    count = DRY_RUNS if settings.dry else runs
    kept: list[Any] = [None] * len(sets)
    taken = []
    if settings.dry:
        for index in range(count):
            started = time.perf_counter()
            kept[index % len(sets)] = call(*sets[index % len(sets)])
            taken.append(1e6 * (time.perf_counter() - started))
        return Timing.of(taken)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for index, (start, end) in enumerate(events):
        start.record()
        result = call(*sets[index % len(sets)])
        end.record()
        kept[index % len(sets)] = result if keep else None
    torch.cuda.synchronize()
    return Timing.of([1e3 * start.elapsed_time(end) for start, end in events])


def time_graph(
    call: Call, sets: Sequence[Tensors], settings: Settings, *, repeats: int = 1, runs: int = RUNS
) -> Timing:
    """Time calls inside a CUDA graph, where launching costs next to nothing.

    Args:
        call: takes the tensors of a set; has run before.
        sets: copies of the inputs; the graph calls once for each.
        settings: what the user asked for.
        repeats: how many times the graph goes over the sets.
        runs: timed replays.
    """
    if settings.dry:
        return time_calls(call, sets[:1], settings)
    order = [inputs for _ in range(repeats) for inputs in sets]
    kept: list[Any] = []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(*order[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.extend(call(*inputs) for inputs in order)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = Timing.of([1e3 * start.elapsed_time(end) / len(order) for start, end in events])
    del kept
    graph.reset()
    return times


def extra_memory(call: Call, inputs: Tensors, settings: Settings) -> dict[str, int] | None:
    """Return the peak memory that a call takes beside its inputs, outputs included; None in a dry run.

    Returns:
        `requested`: bytes that were asked for. `allocated`: what torch's allocator took for them, which is up to 1 MiB
        more for each buffer when it reuses a cached block.
    """
    if settings.dry:
        call(*inputs)
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    result = call(*inputs)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    del result
    return {
        kind: int(after[f"{kind}_bytes.all.peak"] - before[f"{kind}_bytes.all.current"])
        for kind in ("requested", "allocated")
    }
