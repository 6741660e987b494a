"""The record beside an engine: what it was built from and with, so that a stale engine is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeattn.export.engine.configuration import Configuration
from edgeattn.export.engine.graph import PrecisionOptions
from edgeattn.export.engine.machine import Machine
from edgeattn.foundation import __version__, sha256_of, write_text

FORMAT = 1
"""Version of the record's layout."""


def record_path(engine: Path) -> Path:
    """Return where the record of an engine is."""
    return engine.with_name(f"{engine.name}.json")


def layers_path(engine: Path) -> Path:
    """Return where the layer information of an engine is."""
    return engine.with_name(f"{engine.name}.layers.json")


def graph_path(engine: Path) -> Path:
    """Return where the graph of an engine is, if it is not the user's own file."""
    return engine.with_name(f"{engine.name}.onnx")


def engine_key(
    model: Path,
    machine: Machine,
    configuration: Configuration,
    precision: PrecisionOptions,
) -> dict[str, Any]:
    """Return everything that decides what an engine is, in types that JSON has; files by their SHA-256."""
    choices = asdict(configuration)
    choices["plugins"] = {library.name: sha256_of(library) for library in configuration.plugins}
    # Through JSON and back, so that it compares equal to what is read from a file.
    key: dict[str, Any] = json.loads(
        json.dumps(
            {
                "onnx": sha256_of(model),
                "external data": _external_data(model),
                "plugins": choices.pop("plugins"),
                "TensorRT": machine.tensorrt,
                "SM": machine.gpu.sm,
                "driver": machine.gpu.driver,
                "configuration": choices,
                "precision": {
                    "fp16": precision.fp16,
                    "int8": precision.int8,
                    "calibration": sha256_of(precision.calibration) if precision.calibration else None,
                },
                "edgeattn": __version__,
            }
        )
    )
    return key


def _external_data(model: Path) -> dict[str, str]:
    """Return the SHA-256 of the files beside a model that hold its weights, if any do."""
    files = {
        tensor.location: model.parent / tensor.location
        for graph in ir.load(model).graphs()
        for value in graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return {str(location): sha256_of(file) for location, file in sorted(files.items())}


def read_record(engine: Path) -> dict[str, Any] | None:
    """Return the record beside an engine, or None when there is none that can be read."""
    try:
        record = json.loads(record_path(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def write_record(engine: Path, facts: Mapping[str, Any]) -> None:
    """Write the record of an engine that has been written: its hash and the given facts."""
    record = {"format": FORMAT, "engine": engine.name, "engine_sha256": sha256_of(engine), **facts}
    write_text(record_path(engine), json.dumps(record, indent=1) + "\n")


def stale_reasons(engine: Path, record: Mapping[str, Any] | None, key: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why an engine has to be built (again), one sentence each; empty when it is up to date.

    Args:
        engine: path of the engine.
        record: see `read_record`.
        key: see `engine_key`, of what is asked for now.
    """
    if not engine.exists():
        return ("there is no engine yet.",)
    if record is None:
        return ("nothing says what the engine was built from.",)
    if record.get("engine_sha256") != sha256_of(engine):
        return ("the engine file is not the one that was recorded.",)
    return tuple(_differences(record.get("key", {}), key))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in [*new, *(name for name in old if name not in new)]:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name} was {_short(before)} and is {_short(now)}."


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
