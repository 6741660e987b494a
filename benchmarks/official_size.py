"""The official-size CCNet (ResNet-101, 769x769, random weights) through export, surgery and FP16: time and memory.

`python benchmarks/official_size.py` prints a table and writes benchmarks/results/official_size.json. Weights are
random, so nothing is said about accuracy; the FP32 graph is compared with torch on one input.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from edgeattn.export.fp16 import to_fp16
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.models import MODELS
from edgeattn.validation.randomise import randomise

RESULTS = Path(__file__).parent / "results" / "official_size.json"
T = TypeVar("T")


def main() -> None:
    """Run the stages and print the table."""
    stages: list[dict[str, object]] = []

    def timed(name: str, work: Callable[[], T]) -> T:
        start = time.monotonic()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        stages.append({"stage": name, "seconds": round(time.monotonic() - start, 1), "peak_gib": round(peak, 2)})
        return result

    spec = MODELS.get("ccnet-r101")
    model = timed("build", lambda: randomise(spec.build()))
    example = torch.randn(1, 3, *spec.size, generator=torch.Generator().manual_seed(0))
    plugin = timed(
        "export and surgery",
        lambda: to_onnx(model, [example], input_names=["image"], output_names=["logits"], outputs=[0]),
    )
    plain = timed("inline", lambda: inline_plugins(plugin))
    half = timed("FP16", lambda: to_fp16(plugin).model)
    timed("inline FP16", lambda: inline_plugins(half))
    exported = stages[:]

    def run() -> float:
        session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
        actual = session.run(None, {"image": example.numpy()})[0]
        with torch.no_grad():
            expected = model(example)[0].numpy()
        return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))

    difference = timed("compare FP32 with torch", run)
    total = sum(float(stage["seconds"]) for stage in exported)  # type: ignore[arg-type]
    table = Table("stage", "seconds", "peak GiB so far", title="ccnet-r101, 769x769 (CPU)")
    for stage in stages:
        table.add_row(*(str(value) for value in stage.values()))
    console = Console()
    console.print(table)
    console.print(f"export to FP16: {total:.0f} s; FP32 relative L2 {difference:.1e}; {len(plain.graph.node)} nodes")
    record = {
        "measured_on": "CPU",
        "versions": versions(),
        "stages": stages,
        "relative_l2": difference,
        "nodes": {"plain": len(plain.graph.node), "plugin": len(plugin.graph.node)},
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
