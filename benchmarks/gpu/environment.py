"""Where the figures come from: machine, software, clocks and the state of the source."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
import triton
from gpu.cases import Case, Record, Settings
from gpu.data import device_of

ROOT = Path(__file__).resolve().parents[2]
_SMI_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "persistence_mode",
)  # fmt: skip


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return the one case."""
    return [Case("environment")]


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield the environment."""
    device = device_of(settings)
    record: Record = {
        "status": "ok",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
        "commit": _answer(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "plugin_sources_sha256": source_hash(ROOT / "plugins_trt"),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "convolution_tf32": torch.backends.cudnn.allow_tf32,
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
        values = _answer(["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"])
        if values is not None:
            record["nvidia_smi"] = dict(zip(_SMI_FIELDS, values.splitlines()[0].split(", "), strict=False))
    yield record


def source_hash(folder: Path) -> str:
    """Return a hash over the Python sources of a folder, which says what was measured where there is no commit."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _answer(command: list[str]) -> str | None:
    """Return what a command prints, or None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
