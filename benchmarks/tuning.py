"""Tunes the bundled models to budgets, and checks the project's bars on what was written.

    python benchmarks/tuning.py [--keep FOLDER]

Writes benchmarks/results/tuning.json. The share of multiplications in INT8 is counted here once more, from the written
ONNX file, independently of the estimate that the search goes by. FOLDER keeps the runs; an unfinished one is continued.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import shape_inference
from rich.console import Console
from rich.table import Table

from edgeattn.cli.console import progress_bars
from edgeattn.deploy.pipeline import ExportRequest
from edgeattn.deploy.tuning import TuneRequest, Tuning, tune
from edgeattn.deploy.tuning.data import NONE
from edgeattn.foundation import write_text

RESULT = Path(__file__).parent / "results" / "tuning.json"
TARGET = "jetpack-6.2-orin-nx-16"
BAR_BUDGET, BAR_SHARE = "mIoU -0.2", 0.6
SEARCHES = (("ccnet-digits", BAR_BUDGET), ("cosnet-digits", BAR_BUDGET), ("ccnet-digits", "labels 99.9"))
"""The project's bar for both models, and a budget that the default quantisation is far from, so that the search has to
work."""


def int8_share(path: Path) -> float:
    """Return the share of the multiplications in convolutions whose input and weight come from a DequantizeLinear."""
    graph = shape_inference.infer_shapes(onnx.load(path)).graph
    producers = {name: node.op_type for node in graph.node for name in node.output}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    macs = {True: 0, False: 0}
    for node in (node for node in graph.node if node.op_type == "Conv"):
        quantised = all(producers.get(name) == "DequantizeLinear" for name in node.input[:2])
        macs[quantised] += prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
    return macs[True] / sum(macs.values())


def measured(result: Tuning, folder: Path) -> dict[str, Any]:
    """Return the record of one search."""
    chosen = result.rows[-1]
    return {
        "model": result.samples.model,
        "budget": result.budget.text,
        "unit": result.budget.measure.unit,
        "target": result.target,
        "samples": result.samples.count,
        "lost": {"search": chosen.search, "confirmation": chosen.confirmation, "all": chosen.everything},
        "confirmations": result.confirmations,
        "conv_macs_int8": {
            "estimate": chosen.outcome.cost.int8_share,
            "counted": int8_share(folder / "model.tuned.onnx"),
        },
        "estimated_ms": {row.name: 1e3 * row.outcome.cost.seconds for row in result.rows},
        "modules": {kind: chosen.outcome.assignment.count(kind) for kind in ("int8", "fp16", "fp32")},
        "lost_on_search_half": {row.name: row.search for row in result.rows},
        "evaluated": sum(outcome.part != NONE for outcome in result.tried),
        "parity": result.parity["verdict"],
        "task": {
            "original": result.original.task(result.metric),
            "tuned": result.chosen.score.task(result.metric),
        },
        "same_labels": result.chosen.score.agreement,
    }


def within_bar(entry: dict[str, Any]) -> bool:
    """Whether a search for the project's budget kept its bars on all samples and on both halves."""
    return all(loss <= 0.2 for loss in entry["lost"].values()) and entry["conv_macs_int8"]["counted"] >= BAR_SHARE


def main() -> None:
    """Run every search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the runs")
    parser.add_argument("--samples", type=int, default=200)
    arguments = parser.parse_args()
    console, entries = Console(), []
    with tempfile.TemporaryDirectory() as temporary:
        for model, budget in SEARCHES:
            folder = (arguments.keep or Path(temporary)) / model
            export = ExportRequest(model, int8=True, target=TARGET, sample_count=arguments.samples)
            with progress_bars(f"{model}, {budget}: ") as progress:
                result = tune(TuneRequest(export, budget, curve=0), folder, progress)
            entries.append(measured(result, folder))
    table = Table(
        "model", "budget", "lost: search", "confirmation", "all", "conv MACs in INT8", "INT8/FP16/FP32", "tried"
    )
    for entry in entries:
        losses = [f"{entry['lost'][part]:+.3f}" for part in ("search", "confirmation", "all")]
        counts = "/".join(str(count) for count in entry["modules"].values())
        share = f"{entry['conv_macs_int8']['counted']:.1%}"
        table.add_row(entry["model"], entry["budget"], *losses, share, counts, str(entry["evaluated"]))
    console.print(table)
    kept = all(within_bar(entry) for entry in entries if entry["budget"] == BAR_BUDGET)
    console.print(f"bars ({BAR_BUDGET}, {BAR_SHARE:.0%} of convolution MACs in INT8): {'kept' if kept else 'NOT KEPT'}")
    record = {
        "measured_on": "accuracy on a CPU with ONNX Runtime, FP16 emulated; times estimated, nothing ran on the target",
        "bars_kept": kept,
        "searches": entries,
    }
    write_text(RESULT, json.dumps(record, indent=1) + "\n")
    console.print(f"written to {RESULT}")
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
