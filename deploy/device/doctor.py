"""The command doctor: the device against what the bundle is for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .sensors import clocks, power_rails, temperatures
from .system import Gpu, System
from .workspace import Workspace

OK, FAIL, WARN, UNKNOWN = "ok", "fail", "warn", "unknown"

COPIES = 2
"""A build holds the weights at least twice: in the graph and in the engine."""


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: what was compared.
        wanted: what the bundle is for.
        found: what the device has; None where it does not say.
        status: "ok", "fail" (the bundle will not work), "warn" (it may) or "unknown".
        advice: what to do; empty when all is well.
    """

    name: str
    wanted: str
    found: str | None
    status: str
    advice: str = ""


def doctor(workspace: Workspace) -> dict[str, Any]:
    """Compare the device with the bundle's target.

    Returns:
        The findings, the state of the device (power mode, clocks, temperatures, rails), and the verdict: "FAIL" when
        something will keep the bundle from working.
    """
    system, target = workspace.system, workspace.manifest.content["target"]
    findings = list(_findings(workspace, system, target))
    return {
        "measured": "this device",
        "findings": [asdict(finding) for finding in findings],
        "l4t": l4t_release(system),
        "board": system.text("/proc/device-tree/model"),
        "power_mode": system.output("nvpmodel", "-q"),
        "clocks_mhz": clocks(system),
        "temperatures_c": temperatures(system),
        "power_rails": [rail.name for rail in power_rails(system)],
        "verdict": "FAIL" if any(finding.status == FAIL for finding in findings) else "PASS",
    }


def _findings(workspace: Workspace, system: System, target: Mapping[str, Any]) -> Iterator[Finding]:
    gpu = system.gpu()
    yield _jetpack(system, target)
    yield _tensorrt(system, target)
    yield _architecture(gpu, target)
    yield _cuda(gpu, target)
    yield _polygraphy()
    if workspace.manifest.content["plugins"] is not None:
        yield _cmake(system)
    yield from _room(workspace, system)


def _jetpack(system: System, target: Mapping[str, Any]) -> Finding:
    software = str(target["software"] or "")
    if not software.startswith("jetpack-"):
        return Finding("JetPack", "none: not a Jetson target", l4t_release(system), OK)
    wanted = software[len("jetpack-") :]
    version = system.output("dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack")
    if not version:
        found = l4t_release(system)
        return Finding("JetPack", wanted, found and f"L4T {found}", UNKNOWN, "`sudo apt install nvidia-jetpack` tells.")
    fits = re.split(r"[+.~-]", version)[:2] == wanted.split(".")[:2]
    advice = "" if fits else f"Install JetPack {wanted}, or make a bundle for this one with `edgeattn bundle --target`."
    return Finding("JetPack", wanted, version, OK if fits else WARN, advice)


def l4t_release(system: System) -> str | None:
    """Return the Jetson Linux release, such as "36.4.3"; None where this is no Jetson."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", system.text("/etc/nv_tegra_release") or "")
    return f"{match[1]}.{match[2]}" if match else None


def _tensorrt(system: System, target: Mapping[str, Any]) -> Finding:
    wanted = ".".join(map(str, target["tensorrt"]))
    version = _package_version(system) or _module_version("tensorrt")
    if version is None:
        return Finding("TensorRT", wanted, None, FAIL, "Install it with `sudo apt install nvidia-jetpack`.")
    fits = version.split(".")[:2] == wanted.split(".")[:2]
    advice = "" if fits else "Make a bundle for this version: `edgeattn list targets`, `edgeattn bundle --target`."
    return Finding("TensorRT", wanted, version, OK if fits else FAIL, advice)


def _package_version(system: System) -> str | None:
    """Return the version of the TensorRT library that is installed as a Debian package."""
    for package in ("libnvinfer10", "libnvinfer11", "libnvinfer8"):
        if version := system.output("dpkg-query", "-W", "-f", "${Version}", package):
            return version
    return None


def _module_version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None


def _architecture(gpu: Gpu | None, target: Mapping[str, Any]) -> Finding:
    wanted = f"sm_{target['sm']}"
    if gpu is None:
        return Finding("GPU", wanted, None, FAIL, "The NVIDIA driver finds no GPU. Run this on the device.")
    fits = gpu.sm == target["sm"]
    advice = "" if fits else "The kernels are for another GPU. Make a bundle for this one."
    return Finding("GPU", wanted, f"sm_{gpu.sm}, {gpu.name}", OK if fits else FAIL, advice)


def _cuda(gpu: Gpu | None, target: Mapping[str, Any]) -> Finding:
    wanted = ".".join(map(str, target["cuda"]))
    if gpu is None:
        return Finding("CUDA driver", wanted, None, UNKNOWN)
    fits = gpu.cuda >= tuple(target["cuda"])
    advice = "" if fits else "The driver is older than the kernels' PTX. Update JetPack."
    return Finding("CUDA driver", wanted, "{}.{}".format(*gpu.cuda), OK if fits else WARN, advice)


def _polygraphy() -> Finding:
    version = _module_version("polygraphy")
    advice = "" if version else "Install it with `python3 -m pip install polygraphy`."
    return Finding("Polygraphy", "any", version, OK if version else FAIL, advice)


def _cmake(system: System) -> Finding:
    text = system.output("cmake", "--version")
    match = re.search(r"version (\d+)\.(\d+)", text or "")
    if match is None:
        return Finding("cmake", "3.18", None, FAIL, "Install it with `sudo apt install cmake g++`.")
    fits = (int(match[1]), int(match[2])) >= (3, 18)
    advice = "" if fits else "Install a newer one with `python3 -m pip install cmake`."
    return Finding("cmake", "3.18", f"{match[1]}.{match[2]}", OK if fits else FAIL, advice)


def _room(workspace: Workspace, system: System) -> Iterator[Finding]:
    """Compare free memory and disk with the least that a build takes."""
    sizes = {member.name: member.size for member in workspace.manifest.members}
    models = [sizes[entry["model"]] for entry in workspace.manifest.content["precisions"].values()]
    match = re.search(r"^MemAvailable:\s+(\d+) kB", system.text("/proc/meminfo") or "", re.MULTILINE)
    memory = int(match[1]) << 10 if match else None
    yield _enough("free memory", COPIES * max(models), memory, "Stop other programs, or add swap.")
    existing = next(folder for folder in (workspace.work, *workspace.work.absolute().parents) if folder.exists())
    disk = system.free_bytes(Path(existing))
    yield _enough("free disk", COPIES * sum(models), disk, "Make room, or choose another folder with --work.")


def _enough(name: str, wanted: int, found: int | None, advice: str) -> Finding:
    words = f"at least {wanted / 2**20:.1f} MiB"
    if found is None:
        return Finding(name, words, None, UNKNOWN)
    enough = found >= wanted
    return Finding(name, words, f"{found / 2**20:.0f} MiB", OK if enough else FAIL, "" if enough else advice)
