"""What the programs ask of the machine: files below a root, commands, the GPU; tests can replace each of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CUDA_DRIVER = "libcuda.so.1"
_SM_MAJOR, _SM_MINOR = 75, 76
"""Numbers of CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device.

    Attributes:
        name: as the driver calls it.
        sm: CUDA architecture, such as 87.
        cuda: CUDA version of the driver (major, minor).
    """

    name: str
    sm: int
    cuda: tuple[int, int]


@dataclass(frozen=True)
class Finished:
    """A command that ended.

    Attributes:
        status: exit status.
        output: what it wrote, standard output and errors together.
    """

    status: int
    output: str


def run_command(command: Sequence[str]) -> Finished | None:
    """Run a command without a shell; None where there is no such program or it does not end within an hour."""
    try:
        done = subprocess.run(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3600, text=True, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Finished(done.returncode, done.stdout)


def first_gpu() -> Gpu | None:
    """Ask the CUDA driver about the first device; None where there is no driver or no device."""
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    numbers = []
    for attribute in (_SM_MAJOR, _SM_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    cuda = version.value // 1000, version.value % 1000 // 10
    return Gpu(name.value.decode(errors="replace"), 10 * numbers[0] + numbers[1], cuda)


@dataclass(frozen=True)
class System:
    """The machine.

    Attributes:
        root: where /etc, /proc and /sys are looked for.
        run: runs a command.
        gpu: describes the first CUDA device.
        free_bytes: room left in the file system of a folder.
    """

    root: Path = Path("/")
    run: Callable[[Sequence[str]], Finished | None] = run_command
    gpu: Callable[[], Gpu | None] = first_gpu
    free_bytes: Callable[[Path], int] = field(default=lambda folder: shutil.disk_usage(folder).free)

    def text(self, path: str) -> str | None:
        """Return the text of a file below the root, without space around it; None where it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """Return the whole number in a file below the root; None where there is none."""
        text = self.text(path)
        return int(text) if text is not None and re.fullmatch(r"-?\d{1,18}", text) else None

    def glob(self, pattern: str) -> list[str]:
        """Return the paths below the root that match a pattern, in order, as if the root were /."""
        found = self.root.glob(pattern.lstrip("/"))
        return sorted("/" + path.relative_to(self.root).as_posix() for path in found)

    def output(self, *command: str) -> str | None:
        """Return what a command wrote; None where it is missing or failed."""
        done = self.run(command)
        return done.output.strip() if done is not None and done.status == 0 else None
