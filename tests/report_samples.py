"""A small finished run and the results of a device, made without running a network, for tests of pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.deploy.device.manifest import Manifest
from edgeattn.deploy.device.system import System
from edgeattn.deploy.device.workspace import Workspace
from edgeattn.foundation import sha256_of
from edgeattn.validation.metrics import TensorComparison
from edgeattn.validation.records import Form, FormParity, Parity, Picture, SizeCheck, TaskScore, write_parity
from edgeattn.validation.report import write_report
from edgeattn.validation.runners import FormFacts, Latency
from edgeattn.validation.tolerance import Arithmetic, tolerance

CLASSES = ("background", "cat & <dog>")
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, (2, 24, 32))
RUN = {
    "format": 1,
    "run": {"model": "ccnet-digits", "size": [128, 160], "evaluation": "holiday", "note": "<script>alert(1)</script>"},
    "stages": {},
}


def form_parity(name: str, precision: str, error: float, reasons: tuple[str, ...] = ()) -> FormParity:
    """Return what was measured of a form whose output differs by noise."""
    comparison = TensorComparison()
    reference = RNG.standard_normal((1, 2, 24, 32)).astype(np.float32)
    comparison.add(reference, reference + np.float32(error) * RNG.standard_normal(reference.shape).astype(np.float32))
    return FormParity(
        form=Form(name, Path(f"/somewhere/else/{name}.onnx"), precision, plugin="plugin" in name),
        facts=FormFacts(nodes=37, plugin_nodes=3 * ("plugin" in name), bytes=1_234_567, fp16=False, qdq=False),
        measured="CPU, ONNX Runtime 9.9.9",
        outputs={} if "broken" in name else {"logits": comparison.result()},
        label_agreement=float("nan") if "broken" in name else 0.98765,
        score=TaskScore("mIoU", 0.81234, (0.9, float("nan"))),
        task_drop=0.00567,
        tolerance=tolerance(precision, Arithmetic(12, 576, 9), peak=12.0, rms=3.0),
        reasons=reasons,
        latency=None if "broken" in name else Latency(12.345, 10, 2),
    )


def sample_parity() -> Parity:
    """Return a comparison with everything that a page can show: failures, sizes, pictures of two frames."""
    flipped = LABELS.copy()
    flipped[0, :2, :5] = 1 - flipped[0, :2, :5]
    images = tuple(RNG.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(2))
    return Parity(
        model="ccnet-digits",
        classes=CLASSES,
        samples=200,
        unlabelled=0,
        original=TaskScore("mIoU", 0.81801, (0.9, 0.7)),
        original_latency=Latency(20.0, 10, 2),
        forms=(
            form_parity("fp32", "fp32", 1e-7),
            form_parity("fp32 plugin", "fp32", 1e-7),
            form_parity("fp16", "fp16", 1e-3, ("label agreement 98.765% is below 99.500%",)),
            form_parity("broken int8", "int8", 1.0, ("ONNX Runtime cannot load it: <no & reason>",)),
        ),
        sizes=(
            SizeCheck("fp32", (97, 129), {"logits": 3.2e-7}, 1.0, ()),
            SizeCheck("fp32 plugin", (97, 129), {}, float("nan"), (), skipped="the form takes one fixed size"),
        ),
        pictures=(Picture(images, LABELS, LABELS, {"fp32": LABELS, "fp16": flipped}),),
        environment={"onnxruntime": "9.9.9"},
    )


def write_run(folder: Path) -> Path:
    """Write a run directory with its analyses, and return it."""
    parity = sample_parity()
    write_parity(parity, folder / "parity.json")
    page = write_report(parity, folder / "report.html", manifest=RUN)
    outputs = {"parity.json": sha256_of(folder / "parity.json"), "report.html": sha256_of(page)}
    manifest = {**RUN, "stages": {"compare": {"outputs": outputs}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, content in (("sensitivity.int8", sensitivity()), ("divergence", divergence())):
        path = folder / name.partition(".")[0] / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    return folder


def sensitivity() -> dict[str, Any]:
    """Return the record of an analysis of two modules, one of which cannot be lowered."""

    def effect(loss: float, snr: float | str, failure: str | None = None) -> dict[str, Any]:
        return {"loss": loss, "labels": 99.0, "snr": snr, "failure": failure}

    return {
        "model": "ccnet-digits",
        "precision": "int8",
        "metric": "points of mIoU",
        "samples": 8,
        "everything": effect(1.5, 12.0),
        "modules": [
            {"module": "head.broken", "alone": effect(0, "-inf", "it does not load"), "without": effect(1.0, 20.0)},
            {"module": "backbone.layer4.2.conv3", "alone": effect(0.5, 20.0), "without": effect(0.25, 25.0)},
        ],
        "measured": "accuracy: CPU, ONNX Runtime 9.9.9",
        "notes": ["two samples are calibration samples too"],
    }


def divergence() -> dict[str, Any]:
    """Return the record of a search that found its module."""

    def point(module: str, local: float | str, total: float | str, limit: float = 1e-3) -> dict[str, Any]:
        figures = {"total": total, "inherited": 0.0, "local": local, "limit": limit}
        diverges = not float(local) <= limit
        return {"module": module, "call": 1, "tensor": module, **figures, "diverges": diverges, "failure": None}

    quiet = [point(f"backbone.layer{index // 4}.{index % 4}", 1e-4 * (1 + index % 3), 5e-4) for index in range(16)]
    return {
        "verdict": "model.onnx diverges from PyTorch first in head.softmax",
        "found": True,
        "reference": "PyTorch",
        "candidate": "model.onnx",
        "samples": 4,
        "points": [*quiet, point("head.softmax", 0.3, 0.3), point("head.last", "nan", "inf")],
        "measured": "CPU, ONNX Runtime 9.9.9",
        "notes": [],
    }


def doctor_record(status: str = "ok") -> dict[str, Any]:
    """Return what doctor says of a board."""
    advice = "" if status == "ok" else "Make a bundle for this version."
    finding = {"name": "TensorRT", "wanted": "10.3", "found": "10.3.0.30", "status": status, "advice": advice}
    return {
        "measured": "this device",
        "findings": [finding],
        "l4t": "36.4.3",
        "board": "NVIDIA Jetson Orin NX",
        "power_mode": "NV Power Mode: MAXN",
        "verdict": "PASS" if status == "ok" else "FAIL",
    }


def verify_record(verdict: str = "PASS") -> dict[str, Any]:
    """Return what verify says of an engine."""
    return {
        "measured": "TensorRT 10.3.0 (imitated)",
        "samples": 4,
        "outputs": {"logits": {"worst_relative_l2": 1.5e-3, "max_abs": 0.02, "mismatched": 0, "compared": 9}},
        "label_agreement": 0.99912,
        "metric": "mIoU",
        "score": 0.8123,
        "original_score": 0.8180,
        "task_drop": 0.0057,
        "limits": {"relative_l2": 1e-2, "label_agreement": 0.995, "task_drop": None},
        "reasons": [] if verdict == "PASS" else ["label agreement 90.000% is below 99.500%"],
        "verdict": verdict,
    }


def bench_record() -> dict[str, Any]:
    """Return what bench says of an engine on a board with sensors, after too few runs for p99.9."""
    power = {
        "mean_w": 11.25,
        "energy_per_frame_j": 0.0421,
        "scope": "the rail VDD_IN, which carries everything behind it",
        "hottest_c": {"gpu-thermal": 61.5},
    }
    return {
        "measured": "TensorRT 10.3.0 (imitated)",
        "scope": "one call after another, host memory to host memory, copies included",
        "batch": 1,
        "runs": 500,
        "latency_ms": {"p50": 3.75, "p90": 3.9, "p99": 5.25, "p99.9": None},
        "mean_ms": 3.8,
        "frames_per_second": 263.2,
        "memory_bytes": {"context": 12_345_678},
        "power": power,
        "clocks_mhz": {"17000000.gpu": 918.0},
        "power_mode": "NV Power Mode: MAXN",
        "verdict": "PASS",
    }


def write_work(folder: Path, provenance: Mapping[str, Any], **verdicts: str) -> Path:
    """Write what a board left in the folder `work` of a bundle, as the device's programs name it; return the folder."""
    content = {
        "provenance": provenance,
        "model": {"name": "ccnet-digits"},
        "target": {"name": "jetpack-6.2-orin-nx-16"},
    }
    workspace = Workspace(folder, folder, Manifest(content, (), 0, "ab" * 32), System())
    build = {"engine": "fp16.tensorrt.engine", "engine_bytes": 2_345_678, "seconds": 41.5, "notes": []}
    workspace.write("doctor", None, doctor_record())
    workspace.write("build", "fp16", {"measured": "TensorRT 10.3.0 (imitated)", **build, "verdict": "PASS"})
    workspace.write("verify", "fp16", verify_record(verdicts.get("verify", "PASS")))
    workspace.write("bench", "fp16", bench_record())
    (folder / "fp16.tensorrt.engine.json").write_text('{"key": {}}')
    return folder
