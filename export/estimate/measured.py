"""Estimates of plugin kernels beside what `benchmarks/gpu/run.py` measured on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.export.estimate.costing import plugin_traffic
from edgeattn.export.estimate.hardware import roof_of, seconds
from edgeattn.export.estimate.result import Band
from edgeattn.foundation import UserError
from edgeattn.plugins_trt.variants import Cost
from edgeattn.targets import Target

_FORMAT = 1
_PLUGIN = "plugin"
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Comparison:
    """A kernel's estimate beside its measurement.

    Attributes:
        workload: operation and size.
        element: data type.
        layout: layout of its tensors.
        gpu: where it was measured.
        estimated: estimated time.
        measured_seconds: the better median with a cold L2 cache, called one by one or in a CUDA graph.
        error: typical estimate over measurement, minus one.
        within_band: whether the measurement lies within the band.
    """

    workload: str
    element: str
    layout: str
    gpu: str
    estimated: Band
    measured_seconds: float
    error: float
    within_band: bool


def is_measurement(document: Any) -> bool:
    """Tell whether a JSON document is a result of `benchmarks/gpu/run.py` and no dry run."""
    return (
        isinstance(document, dict)
        and {"dry_run", "environment", "sections"} <= document.keys()
        and not document["dry_run"]
    )


def compare_measured(path: Path, target: Target) -> tuple[Comparison, ...]:
    """Compare the estimate of every plugin kernel in a result file with its measurement.

    Args:
        path: JSON file that `benchmarks/gpu/run.py` wrote.
        target: a target of the GPU it ran on.

    Raises:
        UserError: the file is no such result, a dry run, of another GPU, or holds no timed plugin kernel.
    """
    document = _read(path)
    gpu = document["environment"].get("gpu") or {}
    name, capability = str(gpu.get("name")), str(gpu.get("compute_capability", "")).replace(".", "")
    words = (target.hardware or target.name).replace("-", " ").split()
    if capability != str(target.sm) or not {*words[:1]} <= {*name.lower().replace("-", " ").split()}:
        raise UserError(
            f"{path} was measured on {name} (sm_{capability or '?'}), and the target {target.name} is sm_{target.sm}. "
            "Give a target of that GPU, such as one that `edgeattn list targets` names after it."
        )
    records = document["sections"].get("speed", {}).get("records", [])
    timed = [
        record
        for record in records
        if record.get("contestant") == _PLUGIN and record.get("status") in ("ok", "failed") and "calls" in record
    ]
    if not timed:
        raise UserError(f"{path} holds no timed plugin kernel. Run benchmarks/gpu/run.py with the section speed.")
    return tuple(_compared(record, target, name) for record in timed)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}. Give a result of benchmarks/gpu/run.py.") from error
    if isinstance(document, dict) and document.get("dry_run"):
        raise UserError(f"{path} is a dry run on a CPU, which measures nothing. Run benchmarks/gpu/run.py on a GPU.")
    if not is_measurement(document) or document.get("format") != _FORMAT:
        raise UserError(f"{path} is no result of benchmarks/gpu/run.py of format {_FORMAT}. Give one.")
    return dict(document)


def _compared(record: Mapping[str, Any], target: Target, gpu: str) -> Comparison:
    cost = Cost(**record["cost"])
    roof = roof_of(target)
    rate = roof.tensor[_PRECISIONS[record["element"]]]
    estimated, _ = seconds("plugin", cost.flops, rate, plugin_traffic(cost), roof.bandwidth)
    measured = 1e-6 * min(record[form]["median"] for form in ("calls", "graph") if form in record)
    return Comparison(
        workload=record["workload"],
        element=record["element"],
        layout=record["layout"],
        gpu=gpu,
        estimated=estimated,
        measured_seconds=measured,
        error=estimated.typical / measured - 1,
        within_band=estimated.low <= measured <= estimated.high,
    )
