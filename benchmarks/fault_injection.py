"""Injects every fault into every form of three networks, and counts what parity detects and `bisect` locates.

    python benchmarks/fault_injection.py

Writes benchmarks/results/fault_injection.json. A fault counts as typical of the precisions that its declaration names;
in the others its effect may drown in their own rounding.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import edgeattn.blocks.zoo  # noqa: F401
from edgeattn.blocks.spec import BLOCKS
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import write_text
from edgeattn.validation.divergence import OnnxForm, TorchForm, bisect
from edgeattn.validation.parity import Form, compare_forms
from edgeattn.validation.randomise import randomise

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "validation"))

from fault_subjects import NAMES, Subject, make_subject  # noqa: E402
from fault_trials import Trial, injections, run_trials  # noqa: E402
from faults import FAULTS  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fault_injection.json"
PRECISIONS = ("fp32", "fp16", "int8")


def clean_alarms(subject: Subject, precision: str, folder: Path) -> dict[str, object]:
    """Return whether the undamaged form raises an alarm."""
    path = folder / "clean.onnx"
    onnx.save(subject.forms[precision], path)
    form = Form("clean", path, precision, plugin=False)
    parity = compare_forms(
        subject.spec, subject.original, [form], subject.samples(precision), latency_runs=0, pictures=0
    )
    found = bisect(subject.reference, OnnxForm(path, sessions=subject.sessions), subject.feeds())
    return {"model": subject.name, "precision": precision, "parity": not parity.passed, "bisect": found.found}


def block_alarms(folder: Path) -> list[dict[str, object]]:
    """Return whether `bisect` raises an alarm for the undamaged forms of every third block, with random weights."""
    results: list[dict[str, object]] = []
    for spec in track(list(BLOCKS)[::3], description="blocks"):
        variant = spec.variants[0]
        if variant.method != "forward":
            continue
        block = randomise(spec.build(**variant.arguments))
        inputs = spec.example_inputs(variant, spec.sizes_of(variant)[0])
        names = [entry.name for entry in spec.inputs_of(variant)]
        with torch.no_grad():
            made = block(*inputs)
        outputs = [f"output_{index}" for index in range(len(made) if isinstance(made, tuple) else 1)]
        plain = inline_plugins(to_onnx(block, inputs, input_names=names, output_names=outputs))
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        for precision, model in (("fp32", plain), ("fp16", to_fp16(plain).model)):
            onnx.save(model, folder / "block.onnx")
            found = bisect(TorchForm(block, names, outputs), OnnxForm(folder / "block.onnx"), [feed])
            results.append({"block": spec.name, "precision": precision, "bisect": found.found})
    return results


def rates(trials: Sequence[Trial]) -> dict[str, float]:
    """Return how many faults were injected, and the share that was detected and located."""
    count = max(len(trials), 1)
    return {
        "injected": len(trials),
        "detected": sum(trial.detected for trial in trials) / count,
        "located": sum(trial.located for trial in trials) / count,
    }


def main() -> None:
    """Run the whole matrix."""
    torch.set_num_threads(1)
    console, clean, trials = Console(), [], []
    for name in track(NAMES, description="networks", console=console):
        subject = make_subject(name)
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                clean.append(clean_alarms(subject, precision, Path(folder)))
                damaged = injections(subject, precision, FAULTS.values())
                trials += run_trials(subject, precision, damaged, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        blocks = block_alarms(Path(folder))
    typical = [trial for trial in trials if trial.precision in FAULTS[trial.fault].precisions]
    table = Table("form", "typical faults", "detected", "located", "all faults", "detected", "located")
    groups = {}
    for precision in PRECISIONS:
        pair = [rates([trial for trial in group if trial.precision == precision]) for group in (typical, trials)]
        groups[precision] = {"typical": pair[0], "all": pair[1]}
        cells = [f"{rate[key]:.1%}" if key != "injected" else f"{rate[key]:.0f}" for rate in pair for key in rate]
        table.add_row(precision, *cells)
    console.print(table)
    alarms = sum(bool(entry["bisect"]) for entry in (*clean, *blocks)) + sum(bool(entry["parity"]) for entry in clean)
    console.print(f"false alarms: {alarms} of {2 * len(clean) + len(blocks)} checks of undamaged forms")
    record = {
        "measured_on": f"CPU, ONNX Runtime {onnxruntime.__version__}",
        "kinds": {kind.name: kind.imitates for kind in FAULTS.values()},
        "typical": rates(typical),
        "by_precision": groups,
        "clean": clean,
        "clean_blocks": blocks,
        "trials": [{**asdict(trial), "located": trial.located} for trial in trials],
    }
    write_text(RESULT, json.dumps(record, indent=1) + "\n")
    console.print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
