"""What the last task of a combination does on the device: build, verify and time a bundle.

A worker on a device needs only this package, numpy and Dask; the engine runs in the Python that has its library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeattn.deploy.device.archive import check_folder, unpack
from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.sweep.tasks import Job
from edgeattn.foundation import UserError

PACKAGE = "edgeattn_device"
COMMANDS = ("build", "verify", "bench")


def device(job: Job) -> dict[str, Any]:
    """Unpack the bundle and run its own commands; what a killed attempt has built is used again."""
    made = job.needs["bundle"].facts
    bundle = job.folder / "bundle"
    _unpack(job.root / made["file"], bundle)
    records = {command: _run(job, bundle, command) for command in COMMANDS}
    shutil.rmtree(bundle)  # the bundle lies in its archive, and the engine is made anew from it
    verify, bench = records["verify"], records["bench"]
    power = bench["power"]
    return {
        "measured": bench["measured"],
        "verdict": verify["verdict"],
        "reasons": verify["reasons"],
        "label_agreement": verify["label_agreement"],
        "accuracy": verify["score"],
        "original_accuracy": verify["original_score"],
        "latency_ms": bench["latency_ms"],
        "mean_ms": bench["mean_ms"],
        "frames_per_second": bench["frames_per_second"],
        "memory_bytes": bench["memory_bytes"],
        "energy_per_frame_j": power["energy_per_frame_j"],
        "mean_w": power["mean_w"],
        "power_scope": power["scope"],
        "engine_bytes": records["build"]["engine_bytes"],
        "build_seconds": records["build"]["seconds"],
    }


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if folder.exists():
            check_folder(folder)
            return
        with archive.open("rb") as stream:
            unpack(stream, folder)
    except DeviceError as error:
        raise UserError(str(error)) from error


def _run(job: Job, bundle: Path, command: str) -> dict[str, Any]:
    """Run one command of the bundle's own package, and return its record."""
    settings, work = job.settings, job.folder / "work"
    options = ["--bundle", f"{bundle}", "--work", f"{work}", "--engine", settings["engine"]]
    if command == "bench":
        options += [
            f"--runs={settings['runs']}",
            f"--seconds={settings['seconds']}",
            f"--warm-up={settings['warm_up']}",
        ]
    python = settings["python"] or sys.executable
    environment = {**os.environ, "PYTHONPATH": f"{bundle}", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [python, "-m", PACKAGE, command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise UserError(f"cannot start {python} on the device ({error.strerror or error}). Check [device].") from error
    # A failed verification ends with status 1 and has a record all the same.
    records = list(work.glob(f"{command}.*.json"))
    if done.returncode not in (0, 1) or len(records) != 1:
        last = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise UserError(f"`edgeattn_device {command}` ended with status {done.returncode}: {last}")
    record: dict[str, Any] = json.loads(records[0].read_text(encoding="utf-8"))
    return record
