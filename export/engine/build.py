"""`build_engine`: from an ONNX file to an engine with its record, or to the trtexec line that builds it elsewhere."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from edgeattn.export.engine import graph as graphs
from edgeattn.export.engine import machine as machines
from edgeattn.export.engine.builder import build_serialized, read_engine
from edgeattn.export.engine.configuration import Configuration
from edgeattn.export.engine.graph import PrecisionOptions
from edgeattn.export.engine.monitor import PhaseLog, Progress
from edgeattn.export.engine.precisions import check_precisions, graph_precisions, layers_of
from edgeattn.export.engine.profiles import Profile, ProfileOptions, input_axes, make_profiles
from edgeattn.export.engine.record import (
    engine_key,
    graph_path,
    layers_path,
    read_record,
    record_path,
    stale_reasons,
    write_record,
)
from edgeattn.export.engine.timing_cache import cache_path, default_folder
from edgeattn.export.engine.trtexec import trtexec_line
from edgeattn.export.model_file import load_model
from edgeattn.export.precision_types import element_types
from edgeattn.foundation import UserError, atomic_path, sha256_of, write_text
from edgeattn.targets import Target


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: ONNX file.
        output: the engine; its record, layer information and, where the graph is changed, its graph lie beside it.
        target: deployment target; this machine when None.
        configuration: how to build.
        precision: types to write into the graph first.
        timing_cache: folder of timing caches; `default_folder` when None.
        force: build even when the engine is up to date.
    """

    model: Path
    output: Path
    target: Target | None = None
    configuration: Configuration = field(default_factory=Configuration)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    timing_cache: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.output.is_dir():
            raise UserError(f"the output {self.output} is a folder. Give a file name with -o.")
        written = (self.output, record_path(self.output), layers_path(self.output), graph_path(self.output))
        if self.model.resolve() in {path.resolve() for path in written}:
            raise UserError(
                f"building {self.output} would overwrite the model {self.model}. Give another name with -o."
            )


@dataclass(frozen=True)
class BuildResult:
    """An engine.

    Attributes:
        engine: the file.
        record: content of the JSON file beside it.
        reasons: why it was built; empty when it was up to date.
    """

    engine: Path
    record: dict[str, Any]
    reasons: tuple[str, ...]


def profiles_of(model: Path, options: ProfileOptions) -> tuple[Profile, ...]:
    """Return the optimisation profiles of an ONNX file, see `make_profiles`.

    Raises:
        UserError: the file is no ONNX model, or the ranges do not fit it.
    """
    return make_profiles(input_axes(load_model(model)), options)


def build_engine(request: BuildRequest, progress: Progress | None = None) -> BuildResult:
    """Build an engine on this machine, unless the one that is there is up to date.

    Args:
        request: what to build.
        progress: told about the phases.

    Raises:
        UserError: it cannot be built here; the message says why, and how it can be.
        BuildCancelled: the user cancelled; the engine is as it was, and the measurements so far are kept.
    """
    model = load_model(request.model)
    machine = _machine_for(request, model)
    request.configuration.require(machine.tensorrt_release)
    key = engine_key(request.model, machine, request.configuration, request.precision)
    known = read_record(request.output)
    reasons = ("it was asked for.",) if request.force else stale_reasons(request.output, known, key)
    if known is not None and not reasons:
        return BuildResult(request.output, known, ())
    tell = progress or (lambda phase, done, total: None)
    path, prepared = _prepare(request, model, machine.tensorrt_release, tell)
    types = graph_precisions(element_types(prepared.model))
    log = PhaseLog(tell)
    start = time.monotonic()
    cache = cache_path(request.timing_cache or default_folder(), machine)
    built = build_serialized(path, prepared.plugin_nodes, request.configuration, cache, log)
    seconds = time.monotonic() - start
    facts = read_engine(built.data)
    check = check_precisions(types, built.network_types, facts.bindings, layers_of(facts.information))
    with atomic_path(request.output) as temporary:
        temporary.write_bytes(built.data)
    write_text(layers_path(request.output), facts.information)
    record = {
        "key": key,
        "graph": {"file": os.path.relpath(path, request.output.parent), "sha256": sha256_of(path)},
        "gpu": machine.gpu.name,
        "tf32": request.configuration.tf32,
        "precision": check.as_dict(),
        "notes": list(prepared.notes),
        "seconds": {"build": round(seconds, 3), **{phase: round(value, 3) for phase, value in log.seconds.items()}},
    }
    write_record(request.output, record)
    return BuildResult(request.output, read_record(request.output) or record, reasons)


def print_line(request: BuildRequest, progress: Progress | None = None) -> tuple[str, tuple[str, ...]]:
    """Return the trtexec line that builds the same engine on the target, and notes on the graph that it builds from.

    Where the graph has to be changed for it, that graph is written beside the output.

    Raises:
        UserError: no target is given and there is no TensorRT here whose version could be asked.
    """
    model = load_model(request.model)
    if request.target is None:
        try:
            release = machines.release_of(str(machines.import_tensorrt().__version__))
        except UserError as error:
            raise UserError(f"{error} {_ONE_VERSION}") from error
    else:
        release = request.target.tensorrt
    line = _line(request, model, release)
    _, prepared = _prepare(request, model, release, progress or (lambda phase, done, total: None))
    return line, prepared.notes


_ONE_VERSION = "Such a line is for one TensorRT version: name the device with --target (see `edgeattn list targets`)."


def _machine_for(request: BuildRequest, model: onnx.ModelProto) -> machines.Machine:
    """Return this machine if it is the one to build on.

    Raises:
        UserError: it is not, or cannot build; with the line that builds on the target.
    """
    target = request.target
    try:
        machine = machines.local_machine(target)
    except UserError as error:
        advice = _advice(request, model, target) if target else f"--print-trtexec prints a line for it. {_ONE_VERSION}"
        raise UserError(f"{error} {advice}") from error
    if target is not None and (machine.tensorrt_release, machine.gpu.sm) != (target.tensorrt, target.sm):
        raise UserError(
            f"engines are built on the device they are for: {target.name} has TensorRT {_dotted(target.tensorrt)} on "
            f"sm_{target.sm}, this machine TensorRT {machine.tensorrt} on sm_{machine.gpu.sm}. "
            f"{_advice(request, model, target)}"
        )
    return machine


def _advice(request: BuildRequest, model: onnx.ModelProto, target: Target) -> str:
    line = _line(request, model, target.tensorrt)
    changed = graphs.changes(
        model, request.precision, plugins=bool(request.configuration.plugins), release=target.tensorrt
    )
    reads = f" (it reads {graph_path(request.output)}, which --print-trtexec writes)" if changed else ""
    return f"On the device, this line builds the same engine{reads}:\n{line}"


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _line(request: BuildRequest, model: onnx.ModelProto, release: tuple[int, int]) -> str:
    changed = graphs.changes(model, request.precision, plugins=bool(request.configuration.plugins), release=release)
    source = graph_path(request.output) if changed else request.model
    return trtexec_line(source, request.output, layers_path(request.output), request.configuration, release)


def _prepare(
    request: BuildRequest, model: onnx.ModelProto, release: tuple[int, int], progress: Progress
) -> tuple[Path, graphs.PreparedGraph]:
    """Return the graph and its file: the user's own where nothing changes, so that weights outside it stay in reach."""
    plugins = bool(request.configuration.plugins)
    prepared = graphs.prepare(
        model,
        request.precision,
        plugins=plugins,
        release=release,
        progress=lambda batches: progress("calibrate", batches, batches),
    )
    if not graphs.changes(model, request.precision, plugins=plugins, release=release):
        return request.model, prepared
    path = graph_path(request.output)
    graphs.save_graph(prepared.model, path)
    return path, prepared
