"""Every declared network at its published size, from a checkpoint in published names to verified FP32 ONNX.

`python benchmarks/zoo_export.py [NAMES]` runs `edgeattn export` on each network with random weights, in a process of
its own, and writes time, peak memory and parity to benchmarks/results/zoo_export.json after each network; what is
recorded there already is not repeated (delete the file to begin anew). A network that forgot its image would pass any
comparison, so it is also recorded how far the outputs of two images lie apart.
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
import onnxruntime
import torch
from official_export import THREADS, trained_like, write_photos
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from edgeattn.deploy.evidence import load_original
from edgeattn.export.calibration import image_files, read_image
from edgeattn.export.run_directory import versions
from edgeattn.foundation import write_text
from edgeattn.models import MODELS, ModelSpec, Sample
from edgeattn.models.checkpoint import COUNTER, save_checkpoint

RESULTS = Path(__file__).parent / "results" / "zoo_export.json"


def feeds(spec: ModelSpec, images: Path) -> list[dict[str, np.ndarray]]:
    """Return the inputs for two images, or groups of images."""
    files, count = image_files(images), len(spec.inputs)
    groups = (files[:count], files[count : 2 * count])
    return [spec.network_inputs(Sample(tuple(read_image(file, spec.size) for file in group), None)) for group in groups]


def normalised(network: nn.Module, spec: ModelSpec, images: Path) -> nn.Module:
    """Give the batch normalisations the statistics of two images, and return the network.

    The cubic units of some networks leave FP32's range with random statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    first, second = feeds(spec, images)
    with torch.no_grad():
        network(*(torch.from_numpy(np.concatenate([first[name], second[name]])) for name in spec.inputs))
    return network.eval()


def published_state(spec: ModelSpec, images: Path | None) -> dict[str, torch.Tensor]:
    """Return random weights in the first published layout, as a checkpoint of the authors would hold them.

    Statistics are random too, or those of images.
    """
    network = trained_like(spec.name)
    state = (normalised(network, spec, images) if images else network).state_dict()
    layout = spec.layouts[0]
    shapes = layout.published_shapes()
    if shapes is None:
        return state
    filler = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return {
        name: state.get(layout.renamed(name), filler[name]).reshape(shape)
        for name, shape in shapes.items()
        if not name.endswith(COUNTER)
    }


def distance(spec: ModelSpec, file: Path, images: Path) -> float:
    """Return the relative L2 distance of the first output between two images (or groups of images)."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    first, second = (session.run(None, feed)[0] for feed in feeds(spec, images))
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


def own_error(spec: ModelSpec, checkpoint: Path, images: Path) -> float:
    """Return how far the original in FP32 is from itself in FP64, as relative L2: what no form can be better than."""
    original = load_original(spec, checkpoint)
    inputs = [torch.from_numpy(array) for array in feeds(spec, images)[0].values()]
    with torch.no_grad():
        single, double = original(*inputs), original.double()(*(array.double() for array in inputs))
    first, exact = (output[0] if isinstance(output, tuple) else output for output in (single, double))
    return float((first.double() - exact).norm() / exact.norm())


def measure(spec: ModelSpec, images: Path, folder: Path, *, normal: bool = False) -> dict[str, object]:
    """Export one network; returns what it took and what was found."""
    checkpoint, run = folder / f"{spec.name}.safetensors", folder / spec.name
    save_checkpoint(published_state(spec, images if normal else None), checkpoint, {"origin": "random"})
    command = [sys.executable, "-m", "edgeattn.cli.main", "export", str(checkpoint), "--model", spec.name]
    command += ["--images", str(images), "--samples", "1", "--threads", str(THREADS), "-o", str(run)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    entry: dict[str, object] = {
        "size": list(spec.size),
        "layout": spec.layouts[0].name,
        "seconds": round(time.monotonic() - start, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "exit_status": process.returncode,
    }
    if not (run / "parity.json").is_file():
        return {**entry, "error": message[-500:]}
    (form,) = json.loads((run / "parity.json").read_text())["forms"]
    outputs = {name: float(f"{output['worst_relative_l2']:.2e}") for name, output in form["outputs"].items()}
    apart = distance(spec, run / "model.onnx", images)
    if not normal and not np.isfinite(apart):
        return measure(spec, images, folder / "normalised", normal=True)
    if form["verdict"] != "PASS":
        entry["original_against_fp64"] = float(f"{own_error(spec, checkpoint, images):.2e}")
    return {
        **entry,
        "normalised": normal,
        "verdict": form["verdict"],
        "relative_l2": outputs,
        "distance_of_two_images": float(f"{apart:.2e}"),
        "onnx_mib": round((run / "model.onnx").stat().st_size / 2**20, 1),
        "nodes": form["facts"]["nodes"],
    }


def main() -> None:
    """Measure every network that is not recorded yet, and print the table."""
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"networks": {}}
    names = sys.argv[1:] or [spec.name for spec in MODELS if spec.checkpoint is None]
    with tempfile.TemporaryDirectory(prefix="edgeattn-zoo-") as name:
        images = write_photos(Path(name) / "images", 2 * max(len(spec.inputs) for spec in MODELS), seed=1)
        for network in track([name for name in names if name not in record["networks"]], "networks"):
            with tempfile.TemporaryDirectory(prefix="edgeattn-zoo-") as folder:
                record["networks"][network] = measure(MODELS.get(network), images, Path(folder))
            record |= {"measured_on": f"CPU, {THREADS} threads", "versions": versions()}
            write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    table = Table("network", "size", "seconds", "peak GiB", "verdict", "relative L2", title="FP32 export (CPU)")
    for network, entry in record["networks"].items():
        worst = max(entry.get("relative_l2", {}).values(), default="–")
        size = "x".join(map(str, entry["size"]))
        verdict = entry.get("verdict", "error")
        table.add_row(network, size, *(str(each) for each in (entry["seconds"], entry["peak_gib"], verdict, worst)))
    Console().print(table)


if __name__ == "__main__":
    main()
