"""The command bench: latency, throughput, memory, power, temperature and energy of one engine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .engines import Backend, Tell
from .golden import read_golden
from .sensors import Recorder, clocks
from .verify import open_session, typed
from .workspace import Workspace

PERCENTILES = (50.0, 90.0, 99.0, 99.9)


def bench(
    workspace: Workspace,
    precision: str | None,
    backend: Backend,
    tell: Tell,
    *,
    runs: int = 2000,
    warm_up: float = 2.0,
    seconds: float = 120.0,
) -> dict[str, Any]:
    """Time an engine on the first golden sample, host memory to host memory.

    Args:
        workspace: the checked bundle.
        precision: which engine.
        backend: what runs it.
        tell: told what is being done.
        runs: timed runs at most.
        warm_up: seconds before, which do not count: clocks rise and caches fill.
        seconds: no further run is begun after this time.

    Raises:
        DeviceError: the engine was not built, or does not run.
    """
    name, _ = workspace.manifest.precision(precision)
    golden = read_golden(workspace.bundle / workspace.manifest.content["golden"]["samples"][0]["file"])
    system = workspace.system
    with open_session(workspace, name, backend) as session:
        feed = typed(session, golden.inputs)
        batch = len(next(iter(feed.values())))
        tell(f"warming up for {warm_up:g} s")
        end = time.monotonic() + warm_up
        session.run(feed)
        while time.monotonic() < end:
            session.run(feed)
        tell(f"timing {runs} runs, {seconds:g} s at most")
        times: list[float] = []
        with Recorder(system) as recorder:
            begin = time.perf_counter()
            while not times or (len(times) < runs and time.perf_counter() - begin < seconds):
                start = time.perf_counter()
                session.run(feed)
                times.append(time.perf_counter() - start)
            elapsed = time.perf_counter() - begin
        frames = batch * len(times)
        return {
            "measured": backend.measured(),
            "scope": "one call after another, host memory to host memory, copies included",
            "batch": batch,
            "runs": len(times),
            "latency_ms": percentiles(times),
            "mean_ms": 1e3 * sum(times) / len(times),
            "frames_per_second": frames / elapsed,
            "memory_bytes": session.memory(),
            "power": recorder.record(frames),
            "clocks_mhz": clocks(system),
            "power_mode": system.output("nvpmodel", "-q"),
        }


def percentiles(times: list[float]) -> dict[str, float | None]:
    """Return latency percentiles in milliseconds; None where there are too few runs for one to lie beyond it."""
    return {
        f"p{level:g}": float(np.percentile(times, level)) * 1e3 if len(times) * (100 - level) >= 100 - 1e-6 else None
        for level in PERCENTILES
    }
