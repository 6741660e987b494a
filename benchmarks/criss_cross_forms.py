"""Criss-cross attention in ONNX Runtime: the inlined core beside the public formulations, speed and memory.

`python benchmarks/criss_cross_forms.py` prints a table and writes benchmarks/results/criss_cross_forms.json. Every form
runs in a process of its own, on the CPU with one thread, at 512 channels, 97x97 pixels, two recurrences. All forms
compute the same function; the script checks it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from edgeattn.blocks import CrissCrossAttention, CrissCrossCore
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.validation.randomise import randomise

RESULTS = Path(__file__).parent / "results" / "criss_cross_forms.json"
CHANNELS, SIDE, RUNS = 512, 97, 9


class OfficialCore(nn.Module):
    """The public code's formulation: 3-D batched products, an added diagonal, concatenation."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Compute what `CrissCrossCore` computes."""
        batch, _, height, width = query.shape

        def columns(t: torch.Tensor) -> torch.Tensor:
            return t.permute(0, 3, 1, 2).reshape(batch * width, -1, height)

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t.permute(0, 2, 1, 3).reshape(batch * height, -1, width)

        diagonal = torch.diag(torch.full((height,), -torch.inf)).nan_to_num(0.0)  # as published, but finite
        energy_columns = torch.bmm(columns(query).transpose(1, 2), columns(key)) + diagonal
        energy_columns = energy_columns.view(batch, width, height, height).transpose(1, 2)
        energy_rows = torch.bmm(rows(query).transpose(1, 2), rows(key)).view(batch, height, width, width)
        attention = torch.cat([energy_columns, energy_rows], dim=3).softmax(dim=3)
        attention_columns = attention[..., :height].transpose(1, 2).reshape(batch * width, height, height)
        attention_rows = attention[..., height:].reshape(batch * height, width, width)
        out_columns = torch.bmm(columns(value), attention_columns.transpose(1, 2)).view(batch, width, -1, height)
        out_rows = torch.bmm(rows(value), attention_rows.transpose(1, 2)).view(batch, height, -1, width)
        return out_columns.permute(0, 2, 3, 1) + out_rows.permute(0, 2, 1, 3) + residual


class EinsumCore(nn.Module):
    """The formulation with four einsums, as OpenMMLab writes it."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Compute what `CrissCrossCore` computes."""
        height = query.shape[2]
        energy_columns = torch.einsum("bchw,bciw->bwhi", query, key)
        energy_columns = energy_columns.masked_fill(torch.eye(height, dtype=torch.bool), -1e30).transpose(1, 2)
        energy_rows = torch.einsum("bchw,bchj->bhwj", query, key)
        attention = torch.cat([energy_columns, energy_rows], dim=3).softmax(dim=3)
        out = torch.einsum("bciw,bhwi->bchw", value, attention[..., :height])
        out = out + torch.einsum("bchj,bhwj->bchw", value, attention[..., height:])
        return out + residual


class Recurrent(nn.Module):
    """One attention applied twice with shared weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return self.attention(self.attention(x))


def _exported(core: nn.Module) -> onnx.ModelProto:
    attention = randomise(CrissCrossAttention(CHANNELS))
    attention.core = core
    model = Recurrent(attention)
    example = [torch.zeros(1, CHANNELS, SIDE, SIDE)]
    return to_onnx(model, example, input_names=["x"], output_names=["y"])


FORMS: dict[str, Callable[[], onnx.ModelProto]] = {
    "edgeattn, inlined": lambda: inline_plugins(_exported(CrissCrossCore())),
    "edgeattn, function body": lambda: _exported(CrissCrossCore()),
    "batched matmul and concat (official)": lambda: _exported(OfficialCore()),
    "einsum and concat (OpenMMLab)": lambda: _exported(EinsumCore()),
}


def peak_mebibytes() -> float:
    """Return the largest resident memory that this process has had, from Linux's own record of it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def run(model: bytes, results: multiprocessing.Queue) -> None:
    """Time one form in this process: milliseconds of processor time per run, and MiB above loading."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    before = peak_mebibytes()
    output = session.run(None, {"x": x})[0]
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        session.run(None, {"x": x})
        times.append(1000 * (time.process_time() - start))
    peak = peak_mebibytes() - before
    results.put((statistics.median(times), peak, output[:, ::64, ::7, ::5]))


def main() -> None:
    """Measure every form and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all forms; the best of each form counts")
    repeats = parser.parse_args().repeats
    context = multiprocessing.get_context("spawn")
    models = {name: make() for name, make in track(FORMS.items(), description="export")}
    best: dict[str, dict[str, float]] = {}
    reference = None
    for _ in track(range(repeats), description="measure"):
        for name, model in models.items():
            results = context.Queue()
            process = context.Process(target=run, args=(model.SerializeToString(), results))
            process.start()
            milliseconds, mebibytes, output = results.get()
            process.join()
            reference = output if reference is None else reference
            difference = float(np.linalg.norm(output - reference) / np.linalg.norm(reference))
            if not difference <= 1e-5:
                raise SystemExit(f"{name} differs from {next(iter(FORMS))}: relative L2 {difference:.1e}")
            known = best.setdefault(name, {"milliseconds": milliseconds, "mebibytes": mebibytes})
            known["milliseconds"] = min(known["milliseconds"], milliseconds)
            known["mebibytes"] = min(known["mebibytes"], mebibytes)
            known["nodes"] = len(model.graph.node)
    table = Table("form", "nodes", "CPU ms", "peak MiB above loading", title="criss-cross, C 512, 97x97, twice (CPU)")
    for name, figures in best.items():
        table.add_row(name, f"{figures['nodes']:.0f}", f"{figures['milliseconds']:.0f}", f"{figures['mebibytes']:.0f}")
    Console().print(table)
    record = {"measured_on": "CPU, ONNX Runtime, 1 thread", "versions": versions(), "forms": best}
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
