"""`OpenForm`: a file of a model, ONNX or engine, as something that a comparison can run, describe and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner

from edgeattn.export.engine import AGREES
from edgeattn.export.engine.machine import local_machine
from edgeattn.export.model_file import load_model
from edgeattn.validation import runners
from edgeattn.validation.engine_runner import EngineDescription, EngineRunner, describe_engine
from edgeattn.validation.runners import FormFacts, Latency

ENGINE_SUFFIX = ".engine"
"""Files with another suffix are read as ONNX."""


@dataclass(frozen=True)
class OpenForm:
    """A form's file.

    Attributes:
        path: the file.
        model: its graph; of an engine, the graph it was built from.
        facts: what the graph holds; the size is the file's.
        runner: computes the form's arithmetic; not active yet.
        engine: what is known of an engine; None for ONNX files.
        accumulation: terms after which the emulation of FP16 rounds running totals to FP16; None for FP32 sums.
    """

    path: Path
    model: onnx.ModelProto
    facts: FormFacts
    runner: BaseRunner
    engine: EngineDescription | None
    accumulation: int | None = None

    @property
    def measured(self) -> str:
        """Where and how the form's outputs are computed, for the record."""
        if self.engine:
            return self.engine.measured
        totals = f", running totals of FP16 sums rounded after every {self.accumulation} terms"
        return self.facts.measured + (totals if self.accumulation and self.facts.fp16 else "")

    @property
    def runtime(self) -> str:
        """What runs the form."""
        return "TensorRT" if self.engine else "ONNX Runtime"

    @property
    def broken_claims(self) -> tuple[str, ...]:
        """What is wrong with the file before anything is computed."""
        if self.engine is None or self.engine.verdict == AGREES:
            return ()
        return (f"the engine's types are not shown to be those of its graph: {self.engine.verdict}",)

    def latency(self, feed: Mapping[str, np.ndarray], *, runs: int, threads: int) -> Latency:
        """Time the file as its runtime runs it; an engine with the transfers to and from the GPU."""
        if self.engine is None:
            return runners.native_latency(self.path, feed, runs=runs, threads=threads)
        typed = runners.feed_for(self.runner, self.facts, feed)
        return runners.measure_latency(lambda: self.runner.infer(typed), runs=runs, threads=threads)


def open_form(
    path: Path, *, name: str, threads: int = 1, plugins: Sequence[Path] = (), accumulation: int | None = None
) -> OpenForm:
    """Open a file.

    Args:
        path: ONNX file, or engine that `edgeattn build` made on this machine (suffix `.engine`).
        name: name of the runner in Polygraphy's messages.
        threads: ONNX Runtime's threads within an operation.
        plugins: plugin libraries that an engine needs.
        accumulation: terms after which the emulation of FP16 rounds running totals to FP16; None for FP32 sums.

    Raises:
        UserError: the file is missing or neither, or an engine of another machine.
    """
    if path.suffix == ENGINE_SUFFIX:
        engine = describe_engine(path, local_machine())
        model = load_model(engine.graph)
        runner: BaseRunner = EngineRunner(path, plugins=plugins, name=name)
        return OpenForm(path, model, runners.facts_of(model, path), runner, engine)
    model = load_model(path)
    facts = runners.facts_of(model, path)
    runner = runners.onnx_runner(path, facts, threads=threads, name=name, accumulation=accumulation)
    return OpenForm(path, model, facts, runner, None, accumulation)
