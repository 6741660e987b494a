"""How right `edgeattn estimate` is: FLOPs against torch's own count, activation memory against ONNX Runtime's arena.

`python benchmarks/estimate_accuracy.py` prints the table and writes benchmarks/results/estimate_accuracy.json and .md.

FLOPs: twice the multiplications of convolutions and matrix products of the exported graph, against
`torch.utils.flop_counter` on the PyTorch module; the two share no code. Activation memory: `peak_activation_bytes`
against the arena as `onnx_arena.py` measures it, twice: with the order and the sharing of buffers that ONNX Runtime
chooses by itself, and in the order of the file without sharing, which tells how right the analysis of the graph is.
GPU kernels: against every result of benchmarks/gpu/run.py in benchmarks/results, if there is any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgeattn.blocks import BLOCKS
from edgeattn.export.estimate import estimate
from edgeattn.export.estimate.measured import compare_measured, is_measurement
from edgeattn.export.run_directory import versions
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.models import MODELS
from edgeattn.targets import TARGETS
from edgeattn.validation.randomise import randomise

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGET = "jetpack-6.2-orin-nx-16"
GPU_TARGET = "trt-10.16-h200"

FLOPS_BAR = 0.01
ARENA_BAR = 0.15
MODELS_BAR = 5


@dataclass(frozen=True)
class Subject:
    """A module to export and count.

    Attributes:
        module: the module.
        inputs: one tensor for each input.
        outputs: number of outputs.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: int = 1


def network(name: str, size: tuple[int, int] | None = None) -> Subject:
    """Return a declared network with random weights and all its outputs, since torch counts a whole forward."""
    spec = MODELS.get(name)
    height, width = size or spec.size
    inputs = tuple(torch.randn(1, 3, height, width) for _ in spec.inputs)
    return Subject(randomise(spec.build()), inputs, len(spec.outputs))


def block(name: str, variant: str = "official") -> Subject:
    """Return a block in a published configuration."""
    spec = BLOCKS.get(name)
    chosen = spec.variant(variant)
    assert chosen.published is not None
    arguments, sizes = chosen.published.arguments, chosen.published.sizes
    return Subject(randomise(spec.build(**arguments).eval()), spec.example_inputs(chosen, sizes, arguments=arguments))


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "ccnet-digits": lambda: network("ccnet-digits"),
    "cosnet-digits": lambda: network("cosnet-digits"),
    "ccnet-r101 at 257x257": lambda: network("ccnet-r101", (257, 257)),
    "transformer-encoder-layer": lambda: block("transformer-encoder-layer"),
    "squeeze-excitation": lambda: block("squeeze-excitation"),
    "cbam": lambda: block("cbam"),
    "resnest-bottleneck": lambda: block("resnest-bottleneck"),
    "selective-kernel": lambda: block("selective-kernel"),
    "non-local": lambda: block("non-local"),
}


def arena(path: Path, *, defaults: bool) -> int:
    """Return the arena that one run of a model takes in ONNX Runtime, in bytes."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        json.dump({"model": str(path), "defaults": defaults}, request)
        request.flush()
        command = [sys.executable, str(HERE / "onnx_arena.py"), request.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(json.loads(done.stdout)["extensions"])


def counted_flops(subject: Subject) -> int:
    """Return torch's count of the whole forward."""
    frozen = subject.module.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frozen(*subject.inputs)
    return int(counter.get_total_flops())


def exported(subject: Subject) -> onnx.ModelProto:
    """Return the plain form."""
    model = to_onnx(
        subject.module,
        subject.inputs,
        input_names=[f"input_{index}" for index in range(len(subject.inputs))],
        output_names=[f"output_{index}" for index in range(subject.outputs)],
    )
    return inline_plugins(model)


def measure(name: str) -> dict[str, Any]:
    """Return the figures of one subject."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    model = exported(subject)
    found = estimate(model, TARGETS.get(TARGET), gains=False)
    counted = counted_flops(subject)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        default, ordered = (arena(path, defaults=value) for value in (True, False))
    return {
        "model": name,
        "flops": 2 * found.macs,
        "torch_flops": counted,
        "flops_error": 2 * found.macs / counted - 1,
        "activation_bytes": found.peak_activation_bytes,
        "live_bytes": found.live_activation_bytes,
        "arena_default_bytes": default,
        "arena_default_error": found.peak_activation_bytes / default - 1,
        "arena_ordered_bytes": ordered,
        "arena_ordered_error": found.peak_activation_bytes / ordered - 1,
    }


def kernels() -> tuple[list[dict[str, Any]], str]:
    """Return the comparison with GPU measurements in the repository, and what to say about it."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        if is_measurement(json.loads(path.read_text(encoding="utf-8"))):
            found += [{"file": path.name, **asdict(entry)} for entry in compare_measured(path, TARGETS.get(GPU_TARGET))]
    if not found:
        return [], "GPU kernels: not compared, no measurement in the repository."
    inside = sum(entry["within_band"] for entry in found)
    errors = sorted(abs(entry["error"]) for entry in found)
    return found, (
        f"GPU kernels: {len(found)} compared, {inside} within the band, median error of the typical time "
        f"{errors[len(errors) // 2]:.0%}."
    )


def markdown(records: list[dict[str, Any]], sentences: list[str]) -> str:
    """Return the page."""
    head = [
        "model", "GFLOP", "torch", "error", "activations MiB", "arena, defaults", "error", "arena, file order", "error",
    ]  # fmt: skip
    rows = [
        [
            record["model"],
            f"{record['flops'] / 1e9:.3f}",
            f"{record['torch_flops'] / 1e9:.3f}",
            f"{record['flops_error']:+.2%}",
            f"{record['activation_bytes'] / 2**20:.2f}",
            f"{record['arena_default_bytes'] / 2**20:.2f}",
            f"{record['arena_default_error']:+.1%}",
            f"{record['arena_ordered_bytes'] / 2**20:.2f}",
            f"{record['arena_ordered_error']:+.1%}",
        ]
        for record in records
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    title = (
        "`edgeattn estimate` against torch's FLOP count and ONNX Runtime's arena (CPU, FP32, basic graph optimisation)."
    )
    return "\n".join([title, "", *lines, "", *sentences, ""])


def main() -> int:
    """Measure, print, write; return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to measure; all when none is named")
    names = parser.parse_args().names or list(SUBJECTS)
    if unknown := [name for name in names if name not in SUBJECTS]:
        parser.error(f"unknown model {unknown[0]!r}; the models are {', '.join(SUBJECTS)}")
    records = [measure(name) for name in track(names, "measuring", console=Console(stderr=True))]
    compared, about_kernels = kernels()
    flops = [record for record in records if abs(record["flops_error"]) <= FLOPS_BAR]
    within = {
        kind: [record for record in records if abs(record[f"arena_{kind}_error"]) <= ARENA_BAR]
        for kind in ("default", "ordered")
    }
    sentences = [
        f"FLOPs within {FLOPS_BAR:.0%}: {len(flops)} of {len(records)} models.",
        f"Activation memory within {ARENA_BAR:.0%} of the arena: {len(within['default'])} of {len(records)} models "
        f"with ONNX Runtime's defaults, {len(within['ordered'])} in the order of the file without shared buffers.",
        "Known differences: ONNX Runtime's Softmax over another axis than the last takes two copies of its input "
        "(cosnet-digits); it keeps the results of pointwise operators that the estimate fuses (selective-kernel); with "
        "its defaults it chooses another order and keeps buffers for later results of the same size.",
        about_kernels,
    ]
    page = markdown(records, sentences)
    print(page)
    if names == list(SUBJECTS):
        record = {"measured_on": "CPU, one thread", "versions": versions(), "records": records, "kernels": compared}
        write_text(RESULTS / "estimate_accuracy.json", json.dumps({**record, "summary": sentences}, indent=1) + "\n")
        write_text(RESULTS / "estimate_accuracy.md", page)
    enough = min(MODELS_BAR, len(records))
    return int(len(flops) < len(records) or min(map(len, within.values())) < enough)


if __name__ == "__main__":
    sys.exit(main())
