"""Every block at its published size on a CPU: the original and the block in torch, both exports in ONNX Runtime.

`python benchmarks/blocks.py [NAME ...]` prints a table and writes benchmarks/results/blocks.json and blocks.md after
each block; with names, only these blocks are measured and the rest of the results stays. One thread; the best of
several runs; the two ONNX files run in turns. Peak memory is that of a process that holds ONNX Runtime and one model,
the least of five such processes where they are quick.

The bars: ONNX Runtime on our export is never slower (ratio >= 0.95) than on the direct export of the original, 1.3
times as fast in the geometric mean, and never above its peak memory. Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from edgeattn.blocks import BLOCKS, BlockSpec, Variant
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.validation.randomise import randomise

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("onnx_worker.py")
ROUNDS, SECONDS = 3, 4.0
SLOWER, MEAN = 0.95, 1.3
MEMORY_NOISE_MIB = 2.0
"""Two runs of one file differ by this much; a peak within it is not above."""


class _Method(nn.Module):
    """Calls one method of a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: torch.Tensor) -> Any:
        return getattr(self.module, self.method)(*inputs)


def milliseconds(work: Callable[[], object]) -> float:
    """Return the best time of several runs, two at least."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < SECONDS / 2:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)


def largest_mib(model: onnx.ModelProto) -> float:
    """Return the size of the largest floating-point tensor besides inputs and weights, in MiB."""
    shaped = onnx.shape_inference.infer_shapes(model, data_prop=True)
    weights = {tensor.name for tensor in model.graph.initializer}
    sizes = [
        math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*shaped.graph.value_info, *shaped.graph.output)
        if value.name not in weights and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    return max(sizes) * 4 / 2**20


def worker(folder: Path, files: list[str], *, rounds: int, seconds: float, outputs: str = "") -> dict[str, Any]:
    """Run ONNX files in a process of their own."""
    request = {
        "files": [str(folder / name) for name in files],
        "inputs": str(folder / "inputs.npz"),
        "outputs": outputs and str(folder / outputs),
        "rounds": rounds,
        "seconds": seconds,
    }
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "request.json")], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def peak_mib(folder: Path, name: str) -> float:
    """Return the least peak memory of processes that each run one ONNX file; they differ by some MiB."""
    peaks: list[float] = []
    started = time.monotonic()
    while not peaks or (len(peaks) < 5 and time.monotonic() - started < SECONDS):
        peaks.append(worker(folder, [name], rounds=3, seconds=0)["peak_mib"])
    return min(peaks)


def prepare(name: str, variant_name: str, folder: str, answer: Any) -> None:
    """In a process of its own: time torch, write both ONNX files, the inputs and the original's outputs."""
    torch.set_num_threads(1)
    spec = BLOCKS.get(name)
    variant = spec.variant(variant_name)
    assert variant.published is not None
    arguments, sizes = variant.published.arguments, variant.published.sizes
    block = randomise(spec.build(**arguments), seed=3)
    module, original_name = spec.original.split(":")
    original = getattr(importlib.import_module(module), original_name)(**arguments).eval()
    original.load_state_dict(block.state_dict())
    inputs = spec.example_inputs(variant, sizes, arguments=arguments)
    names = [entry.name for entry in spec.inputs_of(variant)]
    np.savez(Path(folder) / "inputs.npz", **{key: tensor.numpy() for key, tensor in zip(names, inputs, strict=True)})
    record: dict[str, Any] = {}
    with torch.no_grad():
        wanted = _Method(original, variant.method)(*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        np.savez(Path(folder) / "expected.npz", *(tensor.numpy() for tensor in wanted))
        record["torch_original_ms"] = milliseconds(lambda: _Method(original, variant.method)(*inputs))
        record["torch_block_ms"] = milliseconds(lambda: _Method(block, variant.method)(*inputs))
    outputs = [f"output_{index}" for index in range(len(wanted))]
    model = inline_plugins(to_onnx(block, inputs, input_names=names, output_names=outputs, method=variant.method))
    record["nodes"] = len(model.graph.node)
    record["largest_mib"] = largest_mib(model)
    onnx.save(model, Path(folder) / "block.onnx")
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                _Method(original, variant.method),
                inputs,
                dynamo=True,
                opset_version=DEFAULT_OPSET,
                input_names=names,
                output_names=outputs,
                verbose=False,
            )
            assert program is not None
            program.save(Path(folder) / "original.onnx")
            record["original_nodes"] = len(program.model_proto.graph.node)
            record["original_largest_mib"] = largest_mib(program.model_proto)
        except Exception as error:  # whatever the exporter meets
            record["original_export"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    answer.put(record)


def measure(spec: BlockSpec, variant: Variant) -> dict[str, Any]:
    """Return the figures of one published configuration."""
    assert variant.published is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=prepare, args=(spec.name, variant.name, temporary, answer))
        process.start()
        while answer.empty() and process.is_alive():
            time.sleep(0.1)
        if answer.empty():
            raise RuntimeError(f"{spec.name}: the process that exports it ended with {process.exitcode}")
        record = answer.get()
        process.join()
        worker(folder, ["block.onnx"], rounds=1, seconds=0, outputs="actual.npz")
        record["peak_mib"] = peak_mib(folder, "block.onnx")
        with np.load(folder / "actual.npz") as actual, np.load(folder / "expected.npz") as expected:
            record["relative_l2"] = max(
                float(np.linalg.norm(actual[key] - expected[key]) / np.linalg.norm(expected[key])) for key in expected
            )
        if (folder / "original.onnx").exists():
            try:
                record["original_peak_mib"] = peak_mib(folder, "original.onnx")
                times = worker(folder, ["original.onnx", "block.onnx"], rounds=ROUNDS, seconds=SECONDS)["milliseconds"]
                record["original_ms"], record["block_ms"] = times
                record["ratio"] = times[0] / times[1]
            except subprocess.CalledProcessError as error:
                record["original_export"] = f"ONNX Runtime: {error.stderr.strip().splitlines()[-1][:200]}"
        if "block_ms" not in record:
            record["block_ms"] = worker(folder, ["block.onnx"], rounds=ROUNDS, seconds=SECONDS)["milliseconds"][0]
    return {
        "block": spec.name,
        "variant": variant.name,
        "network": variant.published.network,
        "arguments": {key: str(value) for key, value in variant.published.arguments.items()},
        "sizes": dict(variant.published.sizes),
        **record,
    }


def verdict(records: list[Mapping[str, Any]]) -> tuple[float, list[str]]:
    """Return the geometric mean of the ratios, and a sentence for each bar that is missed."""
    compared = [record for record in records if "ratio" in record]
    mean = math.exp(sum(math.log(record["ratio"]) for record in compared) / max(len(compared), 1))
    missed = [] if mean >= MEAN else [f"geometric mean {mean:.2f} is below {MEAN}"]
    for record in records:
        name = f"{record['block']}/{record['variant']}"
        if record.get("ratio", 1.0) < SLOWER:
            missed.append(f"{name}: ratio {record['ratio']:.2f} is below {SLOWER}")
        if record["peak_mib"] > record.get("original_peak_mib", math.inf) + MEMORY_NOISE_MIB:
            missed.append(f"{name}: peak {record['peak_mib']:.0f} MiB, original {record['original_peak_mib']:.0f} MiB")
        if not record["relative_l2"] <= 1e-5:
            missed.append(f"{name}: relative L2 {record['relative_l2']:.1e}")
    return mean, missed


COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "block": lambda r: f"{r['block']}/{r['variant']}",
    "size": lambda r: "x".join(str(value) for value in r["sizes"].values()),
    "torch original ms": lambda r: f"{r['torch_original_ms']:.1f}",
    "torch block ms": lambda r: f"{r['torch_block_ms']:.1f}",
    "ORT original ms": lambda r: f"{r['original_ms']:.1f}" if "original_ms" in r else "no export",
    "ORT block ms": lambda r: f"{r['block_ms']:.1f}",
    "ratio": lambda r: f"{r['ratio']:.2f}" if "ratio" in r else "",
    "nodes (original)": lambda r: f"{r['nodes']} ({r.get('original_nodes', '-')})",
    "peak MiB (original)": lambda r: f"{r['peak_mib']:.0f} ({r.get('original_peak_mib', math.nan):.0f})",
    "largest MiB": lambda r: f"{r['largest_mib']:.1f}",
}


def markdown(records: list[Mapping[str, Any]], mean: float) -> str:
    """Return the table as a Markdown page."""
    rows = [[cell(record) for cell in COLUMNS.values()] for record in records]
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(COLUMNS), ["---"] * len(COLUMNS), *rows]]
    head = "Blocks at their published sizes, one CPU thread, FP32 (`python benchmarks/blocks.py`)."
    foot = f"Geometric mean of the ratio (ORT original / ORT block): {mean:.2f}."
    return "\n".join([head, "", *lines, "", foot, ""])


def main() -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="blocks to measure; all when none is named")
    names = parser.parse_args().names
    cases = [(spec, v) for spec in BLOCKS for v in spec.variants if v.published and (not names or spec.name in names)]
    if not cases:
        parser.error(f"no published configuration of {', '.join(names)}; see `edgeattn list blocks`")
    path = RESULTS / "blocks.json"
    known = json.loads(path.read_text())["records"] if names and path.exists() else []
    results = {(record["block"], record["variant"]): record for record in known}
    for spec, variant in track(cases, "measuring", console=Console(stderr=True)):
        results[spec.name, variant.name] = measure(spec, variant)
        records = sorted(results.values(), key=lambda record: (record["block"], record["variant"]))
        mean, missed = verdict(records)
        page = markdown(records, mean)
        summary = {"measured_on": "CPU, one thread", "versions": versions(), "geometric_mean": mean, "missed": missed}
        write_text(path, json.dumps({**summary, "records": records}, indent=1) + "\n")
        write_text(RESULTS / "blocks.md", page)
    print(page)
    for sentence in missed:
        print(f"missed: {sentence}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
