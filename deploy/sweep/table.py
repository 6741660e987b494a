"""The results of a sweep as one table: a row for each combination, as JSON and Parquet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.deploy.sweep.plan import STAGES, Combination
from edgeattn.deploy.sweep.tasks import BLOCKED, DONE, FAILED, SKIPPED, Result
from edgeattn.foundation import UserError, atomic_path, write_text

JSON, PARQUET = "sweep.json", "sweep.parquet"
COMPLETE = "complete"


@dataclass(frozen=True)
class Row:
    """What is known of one combination; None where it is not.

    Attributes:
        number: place in the matrix, from 1; points of plots carry it.
        checkpoint, model, height, width, precision, plugins, target: the combination.
        status: "complete"; "failed", where a task of it did; "skipped", where no worker could run one.
        problems: what did not go well, in sentences: errors, failed parity, rejected nodes.
        parity: "PASS" or "FAIL", against the PyTorch original on this CPU.
        metric: task metric that accuracies are values of.
        accuracy: of the form, 0 to 1.
        original_accuracy: of the PyTorch original on the same images.
        label_agreement: fraction of the labels that are the original's.
        relative_l2: worst relative error of an output on an image.
        support: what the target's TensorRT is expected to say of the form.
        estimated_ms, estimated_ms_low, estimated_ms_high: time on the target by the roofline estimate, not measured.
        estimated_memory_bytes: estimated memory for running.
        fits: it is within the target's memory.
        estimated_engine_bytes: estimated size of the engine.
        model_bytes: size of the ONNX file.
        bundle: the bundle, relative to the sweep's folder.
        bundle_bytes: its size.
        bundle_sha256: its digest.
        measured: where the following figures were measured.
        device_verdict: "PASS" or "FAIL" of the engine against the original, on the golden samples.
        device_accuracy: of the engine, on the golden samples.
        latency_ms, latency_p99_ms: measured median and 99th percentile.
        frames_per_second: measured.
        energy_per_frame_j: from the board's sensors.
        engine_bytes: size of the engine.
        seconds: of all its tasks together, shared ones included.
    """

    number: int
    checkpoint: str
    model: str
    height: int
    width: int
    precision: str
    plugins: bool
    target: str
    status: str
    problems: tuple[str, ...]
    parity: str | None = None
    metric: str | None = None
    accuracy: float | None = None
    original_accuracy: float | None = None
    label_agreement: float | None = None
    relative_l2: float | None = None
    support: str | None = None
    estimated_ms: float | None = None
    estimated_ms_low: float | None = None
    estimated_ms_high: float | None = None
    estimated_memory_bytes: int | None = None
    fits: bool | None = None
    estimated_engine_bytes: int | None = None
    model_bytes: int | None = None
    bundle: str | None = None
    bundle_bytes: int | None = None
    bundle_sha256: str | None = None
    measured: str | None = None
    device_verdict: str | None = None
    device_accuracy: float | None = None
    latency_ms: float | None = None
    latency_p99_ms: float | None = None
    frames_per_second: float | None = None
    energy_per_frame_j: float | None = None
    engine_bytes: int | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Nothing failed; what was skipped did not."""
        verdicts = (self.parity, self.device_verdict)
        return self.status != FAILED and "FAIL" not in verdicts and self.support != "rejected"


def make_rows(combinations: Sequence[Combination], results: Mapping[str, Result]) -> list[Row]:
    """Return the row of each combination.

    Args:
        combinations: the cells of the matrix.
        results: results of the tasks by name.
    """
    return [_row(number, combination, results) for number, combination in enumerate(combinations, 1)]


def _row(number: int, combination: Combination, results: Mapping[str, Result]) -> Row:
    own = {stage: results[combination.tasks[stage]] for stage in STAGES if stage in combination.tasks}
    found = {stage: result.facts for stage, result in own.items() if result.status == DONE}
    states = {result.status for result in own.values()}
    height, width = combination.size
    row = Row(
        number,
        combination.checkpoint,
        combination.model,
        height,
        width,
        combination.precision,
        combination.plugins,
        combination.target,
        next((status for status in (FAILED, SKIPPED, BLOCKED) if status in states), COMPLETE),
        tuple(_problems(own)),
        seconds=sum(result.seconds for result in own.values()),
    )
    readers = {"parity": _parity, "support": _support, "estimate": _estimate, "bundle": _bundle, "device": _device}
    values = {name: value for stage, read in readers.items() if stage in found for name, value in read(found[stage])}
    return dataclasses.replace(row, **values)


def _problems(own: Mapping[str, Result]) -> list[str]:
    """Return what did not go well, without the tasks that only wait for one that is named."""
    sentences = [
        f"{stage} {result.status}: {result.message}"
        for stage, result in own.items()
        if result.status in (FAILED, SKIPPED)
    ]
    for stage in ("parity", "device"):
        if stage in own:
            sentences += [f"{stage}: {reason}" for reason in own[stage].facts.get("reasons", ())]
    if "support" in own and own["support"].facts.get("verdict") == "rejected":
        sentences += [f"support: {problem}" for problem in own["support"].facts["problems"][:1]]
    return sentences


Values = list[tuple[str, Any]]


def _parity(facts: Mapping[str, Any]) -> Values:
    errors = [float(error) for error in facts["relative_l2"].values() if error is not None]
    return [
        ("parity", facts["verdict"]),
        ("metric", facts["metric"]),
        ("accuracy", facts["accuracy"]),
        ("original_accuracy", facts["original_accuracy"]),
        ("label_agreement", facts["label_agreement"]),
        ("relative_l2", max(errors, default=None)),
        ("model_bytes", facts["model_bytes"]),
    ]


def _support(facts: Mapping[str, Any]) -> Values:
    return [("support", facts["verdict"])]


def _estimate(facts: Mapping[str, Any]) -> Values:
    seconds = facts["seconds"]
    return [
        ("estimated_ms", 1e3 * seconds["typical"]),
        ("estimated_ms_low", 1e3 * seconds["low"]),
        ("estimated_ms_high", 1e3 * seconds["high"]),
        ("estimated_memory_bytes", facts["required_bytes"]),
        ("fits", facts["fits"]),
        ("estimated_engine_bytes", facts["engine_bytes"]),
    ]


def _bundle(facts: Mapping[str, Any]) -> Values:
    return [("bundle", facts["file"]), ("bundle_bytes", facts["bytes"]), ("bundle_sha256", facts["sha256"])]


def _device(facts: Mapping[str, Any]) -> Values:
    return [
        ("measured", facts["measured"]),
        ("device_verdict", facts["verdict"]),
        ("device_accuracy", facts["accuracy"]),
        ("latency_ms", facts["latency_ms"]["p50"]),
        ("latency_p99_ms", facts["latency_ms"]["p99"]),
        ("frames_per_second", facts["frames_per_second"]),
        ("energy_per_frame_j", facts["energy_per_frame_j"]),
        ("engine_bytes", facts["engine_bytes"]),
    ]


def write_table(rows: Sequence[Row], facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the rows as JSON, with facts about the sweep, and as Parquet.

    Raises:
        UserError: PyArrow is not installed, or the folder cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Parquet needs PyArrow ({error}). Install it with `pip install edgeattn[fleet]`.") from error
    records = [dataclasses.asdict(row) for row in rows]
    path = write_text(folder / JSON, json.dumps({**facts, "rows": records}, indent=1) + "\n")
    types = {
        "str": pyarrow.string(),
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "bool": pyarrow.bool_(),
        "tuple[str, ...]": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema(
        [(entry.name, types[str(entry.type).removesuffix(" | None")]) for entry in dataclasses.fields(Row)]
    )
    with atomic_path(folder / PARQUET) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(records, schema=schema), temporary)
    return [path, folder / PARQUET]
