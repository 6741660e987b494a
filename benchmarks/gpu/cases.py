"""What all sections share: settings, cases and the sections themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
"""One result: JSON values only, with a `status` of "ok", "failed", "error", "crashed", "timeout" or "skipped"."""

LIMITS: Mapping[str, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest relative L2 error of a kernel against FP64, by data type."""

DRY_SM = 90
"""CUDA architecture that a dry run pretends to have."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for, as every worker sees it.

    Attributes:
        dry: tiny sizes on the CPU, in Triton's interpreter; nothing is a measurement.
        seed: seed of all random data.
        scratch: folder for files between cases.
        cpp_library: path of libedgeattn_plugins.so or libedgeattn_kernels.so, or None.
        operations: names of the operations to tune; all when empty.
        elements: data types to tune.
    """

    dry: bool
    seed: int
    scratch: str
    cpp_library: str | None = None
    operations: tuple[str, ...] = ()
    elements: tuple[str, ...] = ("float16",)


@dataclass(frozen=True)
class Case:
    """One piece of a section, run as a whole in one worker.

    Attributes:
        name: unique within the section.
        seconds: after this time the worker is ended and the case recorded as "timeout".
        parameters: what the section needs to run it.
    """

    name: str
    seconds: float = 60.0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Its module has `plan(settings, records) -> list[Case]`, where `records` are the results of the sections before, and
    `run(case, settings) -> Iterator[Record]`.

    Attributes:
        name: as on the command line.
        module: import name.
        seconds: time it may take unless the user says otherwise.
        workers: processes that share the GPU; 1 where times are measured.
        asked_for: runs only when the user asks for it.
    """

    name: str
    module: str
    seconds: float
    workers: int = 1
    asked_for: bool = False


SECTIONS: tuple[Section, ...] = (
    Section("checks", "gpu.checks", 150, workers=14),
    Section("speed", "gpu.speed", 240),
    Section("driver", "gpu.driver", 60, workers=7),
    Section("blocks", "gpu.blocks", 80, workers=10),
    Section("tuning-check", "gpu.tuning_check", 200, workers=14, asked_for=True),
    Section("tuning", "gpu.tuning", 200, asked_for=True),
)
"""In the order of importance, which is the order they run in."""

ENVIRONMENT = Section("environment", "gpu.environment", 60)
SELF_TEST = Section("self-test", "gpu.self_test", 20)
