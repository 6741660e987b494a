"""The official CCNet and COSNet (ResNet-101, random weights) from checkpoint to verified ONNX, as a user runs it.

`python benchmarks/official_export.py` runs `edgeattn export` with FP32, FP16, INT8 and plugin nodes at the published
sizes, each in a process of its own, and writes wall time, processor time and peak memory to
benchmarks/results/official_export.json. Weights are random, so nothing is said about accuracy: FP32 and FP16 have to
pass, while INT8 may differ by more than its tolerance, as random weights make it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

from edgeattn.export.run_directory import versions
from edgeattn.foundation import write_text
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.validation.randomise import raise_gains, randomise

RESULTS = Path(__file__).parent / "results" / "official_export.json"
NAMES = ("ccnet-r101", "cosnet-r101")
CALIBRATION, EVALUATION, THREADS = 32, 2, 2
LIMITS = {"seconds": 15 * 60, "peak_gib": 16}


def write_photos(folder: Path, count: int, seed: int) -> Path:
    """Write crops of scikit-learn's two photographs."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(count):
        photo = photos[index % 2]
        left, top = random.integers(0, photo.width - 200), random.integers(0, photo.height - 200)
        photo.crop((left, top, left + 200, top + 200)).save(folder / f"{index:03}.png")
    return folder


def trained_like(name: str) -> torch.nn.Module:
    """Return the network with random weights and gains that keep it from forgetting its input."""
    return raise_gains(randomise(MODELS.get(name).build(), seed=1), by=0.3)


def measure(name: str, folder: Path) -> dict[str, object]:
    """Run `edgeattn export` on one network; returns what it took and what it found."""
    checkpoint, run = folder / f"{name}.safetensors", folder / name
    save_checkpoint(trained_like(name).state_dict(), checkpoint, {"origin": "random"})
    command = [sys.executable, "-m", "edgeattn.cli.main", "export", str(checkpoint), "--model", name]
    command += ["--fp16", "--int8", "--plugins", "--calibration", str(folder / "calibration")]
    command += ["--images", str(folder / "images"), "--threads", str(THREADS), "-o", str(run)]
    start, before = time.monotonic(), os.times()
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, after = time.monotonic() - start, os.times()
    parity = json.loads((run / "parity.json").read_text())
    return {
        "model": name,
        "size": list(MODELS.get(name).size),
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.children_user + after.children_system - before.children_user, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "exit_status": process.returncode,
        "forms": {entry["form"]["name"]: entry["verdict"] for entry in parity["forms"]},
    }


def main() -> None:
    """Measure every network, print the table and write the record."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="edgeattn-official-") as name:
        folder = Path(name)
        write_photos(folder / "calibration", CALIBRATION, seed=0)
        write_photos(folder / "images", EVALUATION, seed=1)
        networks = [measure(network, folder) for network in sys.argv[1:] or NAMES]
    table = Table("network", "seconds", "processor seconds", "peak GiB", title="checkpoint to verified ONNX (CPU)")
    for entry in networks:
        table.add_row(*(str(entry[key]) for key in ("model", "seconds", "processor_seconds", "peak_gib")))
    Console().print(table)
    record = {
        "measured_on": f"CPU, {THREADS} threads; load of the machine before: {load:.1f}",
        "limits": LIMITS,
        "versions": versions(),
        "calibration_images": CALIBRATION,
        "evaluation_images": EVALUATION,
        "networks": networks,
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
