"""What the tasks of a sweep do on a machine with PyTorch: export, forms, parity, support, estimate, bundle."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from edgeattn.deploy.bundle import BundleRequest, make_bundle
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.deploy.sweep.tasks import Job
from edgeattn.export.estimate import estimate
from edgeattn.export.run_directory import MANIFEST
from edgeattn.export.support import check_support
from edgeattn.export.surgery import strip_bodies
from edgeattn.foundation import write_text
from edgeattn.targets import TARGETS
from edgeattn.validation.parity import Form


class _FormRun(ExportRun):
    """A run that judges one form only: the others are combinations of their own."""

    def make_forms(self) -> list[Form]:
        """Write the files and return the form of the request's precision and plugins."""
        precision = next((name for name in ("fp16", "bf16", "int8") if getattr(self.request, name)), "fp32")
        made = super().make_forms()
        return [form for form in made if form.precision == precision and form.plugin == self.request.plugins]


def export(job: Job) -> dict[str, Any]:
    """Export the network once for all precisions and targets."""
    run = ExportRun(_request(job), job.folder)
    run.make_forms()
    return {"layout": run.loaded.layout, "weights": run.loaded.report.summary()}


def forms(job: Job) -> dict[str, Any]:
    """Convert the export to a reduced precision, with and without plugin nodes."""
    run = ExportRun(_request(job), job.folder)
    _take_over(run, job.folder_of("export"), "export")
    run.make_forms()
    return {"notes": [note for notes in run.notes.values() for note in notes], "taken_over": run.directory.skipped}


def parity(job: Job) -> dict[str, Any]:
    """Judge one form against the PyTorch original."""
    run = _FormRun(_request(job), job.folder)
    precision = job.settings["precision"]
    source = job.folder_of("export" if precision == "fp32" else "forms")
    for stage in ("export",) if precision == "fp32" else ("export", precision):
        _take_over(run, source, stage)
    record = run.run()
    (entry,) = record["forms"]
    return {
        "file": entry["form"]["path"],
        "verdict": entry["verdict"],
        "reasons": entry["reasons"],
        "metric": record["original"]["metric"],
        "accuracy": entry["score"]["value"],
        "original_accuracy": record["original"]["value"],
        "task_drop": entry["task_drop"],
        "label_agreement": entry["label_agreement"],
        "relative_l2": {name: error["worst_relative_l2"] for name, error in entry["outputs"].items()},
        "samples": record["samples"],
        "model_bytes": entry["facts"]["bytes"],
        "plugin_nodes": entry["facts"]["plugin_nodes"],
        "measured": entry["measured"],
        "taken_over": run.directory.skipped,
    }


def support(job: Job) -> dict[str, Any]:
    """Check whether the target's TensorRT takes the form, in the representation it gets."""
    target = TARGETS.get(job.settings["target"])
    model = onnx.load(_form(job))
    if job.settings["plugins"] and not target.takes_function_bodies:
        model = strip_bodies(model)
    report = check_support(model, target.tensorrt, target=target.name, dla_cores=target.dla_cores or 0)
    write_text(job.folder / "support.json", json.dumps(report.as_dict(), indent=1) + "\n")
    return {
        "verdict": report.verdict,
        "counts": report.counts,
        "problems": [f"{finding.subject or 'the model'}: {finding.detail}" for finding in report.problems],
    }


def estimate_form(job: Job) -> dict[str, Any]:
    """Estimate time and memory of the form on the target; nothing is measured."""
    found = estimate(_form(job), TARGETS.get(job.settings["target"]), gains=False)
    write_text(job.folder / "estimate.json", json.dumps(found.as_dict(), indent=1) + "\n")
    return {
        "seconds": {"low": found.seconds.low, "typical": found.seconds.typical, "high": found.seconds.high},
        "flops": found.flops,
        "peak_activation_bytes": found.peak_activation_bytes,
        "engine_bytes": found.engine_bytes,
        "required_bytes": found.required_bytes,
        "available_bytes": found.available_bytes,
        "fits": found.fits,
    }


def bundle(job: Job) -> dict[str, Any]:
    """Pack the form for the target."""
    settings = job.settings
    made = make_bundle(
        BundleRequest(
            run=job.folder_of("parity"),
            target=settings["target"],
            output=job.folder / f"{job.label}.tar",
            checkpoint=None if settings["path"] == BUNDLED else Path(settings["path"]),
            images=_path(settings["images"]),
            golden=settings["golden"],
            weights_licence=settings["weights_licence"],
        )
    )
    return {"file": made.path.relative_to(job.root).as_posix(), "bytes": made.size, "sha256": made.sha256}


def _request(job: Job) -> ExportRequest:
    """Return what the form's run is asked for."""
    torch.set_num_threads(1)
    settings = job.settings
    precision = settings.get("precision", "fp32")
    reduced = precision != "fp32"
    int8: dict[str, Any] = {}
    if precision == "int8":
        int8 = {
            "int8": True,
            "int8_exclude": tuple(settings["int8_exclude"]),
            "calibration_method": settings["calibration_method"],
        }
    return ExportRequest(
        model=settings["model"],
        checkpoint=settings["path"],
        layout=settings["layout"],
        size=(settings["size"][0], settings["size"][1]),
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        fp16_exclude=tuple(settings["fp16_exclude"]) if reduced else (),
        calibration=_path(settings["calibration"]) if reduced else None,
        plugins=settings.get("plugins", False),
        opset=settings["opset"],
        images=_path(settings["images"]),
        sample_count=settings["samples"],
        **int8,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _form(job: Job) -> Path:
    return job.folder_of("parity") / str(job.needs["parity"].facts["file"])


def _take_over(run: ExportRun, source: Path, stage: str) -> None:
    """Copy the file of a finished stage of another run, so that this run finds the stage done.

    Whether it really is the same stage is for the run to say: its key is computed anew from what it is asked for.
    """
    manifest: Mapping[str, Any] = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    recorded = manifest["stages"][stage]
    (name,) = recorded["outputs"]
    folder = Path() if run.request.plugins else Path("intermediate")
    output = folder / Path(name).name
    exported = folder / "model.plugin.onnx"

    run.directory.stage(
        stage,
        functools.partial(_copy, source / name, run.directory.path / output, recorded["facts"]),
        settings=recorded["settings"],
        inputs=[run.checkpoint if stage == "export" else run.directory.path / exported],
        outputs=[output.as_posix()],
    )


def _copy(source: Path, destination: Path, facts: Mapping[str, object]) -> Mapping[str, object]:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    return facts
