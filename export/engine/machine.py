"""The machine an engine is built on: its TensorRT, its GPU and its driver; and what to do where TensorRT is missing."""

from __future__ import annotations

import ctypes
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError
from edgeattn.targets import Target

_JETSON_SMS = frozenset({53, 62, 72, 87, 110})
"""CUDA architectures that only Jetson modules have, whose TensorRT comes with JetPack."""

_JETSON_MARK = Path("/etc/nv_tegra_release")
_CUDA_DRIVER = "libcuda.so.1"
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_SM_MAJOR, _SM_MINOR = 75, 76
"""Numbers of CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device.

    Attributes:
        name: as the driver calls it.
        sm: CUDA architecture, such as 87.
        driver: versions of the kernel module and of the CUDA driver interface.
    """

    name: str
    sm: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """What an engine depends on besides its graph.

    Attributes:
        tensorrt: full version of TensorRT.
        gpu: the device.
    """

    tensorrt: str
    gpu: Gpu

    @property
    def tensorrt_release(self) -> tuple[int, int]:
        """Major and minor version of TensorRT."""
        return release_of(self.tensorrt)


def release_of(version: str) -> tuple[int, int]:
    """Return major and minor of a version string such as "10.3.0"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def import_tensorrt(target: Target | None = None) -> Any:
    """Return TensorRT's Python module.

    Args:
        target: what the module is wanted for; this machine when None.

    Raises:
        UserError: it is not installed or does not load; the message says what is missing and how to install it.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise UserError(f"{_what_is_missing(error)} {install_hint(target)}") from error


def _what_is_missing(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"TensorRT is not installed: Python has no module {error.name!r}."
    return f"TensorRT's Python module is installed, but does not load: {error}."


def install_hint(target: Target | None) -> str:
    """Return how TensorRT is installed on a target, or on this machine when None."""
    if target is None:
        if _JETSON_MARK.exists():
            return _JETPACK_HINT
        return "Install it with `pip install tensorrt` on a machine with an NVIDIA GPU and driver."
    if target.sm in _JETSON_SMS:
        return _JETPACK_HINT
    version, cuda = f"{target.tensorrt[0]}.{target.tensorrt[1]}", target.cuda[0]
    return f'For {target.name}, install it with `pip install "tensorrt-cu{cuda}=={version}.*"` on that machine.'


_JETPACK_HINT = (
    "On a Jetson it comes with JetPack: `sudo apt install nvidia-jetpack`; the Python module lies in the system's "
    "Python, so a virtual environment needs --system-site-packages."
)


def local_machine(target: Target | None = None) -> Machine:
    """Describe this machine.

    Args:
        target: what it is wanted for, see `import_tensorrt`.

    Raises:
        UserError: there is no TensorRT, or no GPU that it could build for.
    """
    return Machine(str(import_tensorrt(target).__version__), local_gpu())


def local_gpu() -> Gpu:
    """Ask the CUDA driver about the first device; nothing but the driver is needed.

    Raises:
        UserError: there is no driver or no device.
    """
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
    except OSError as error:
        raise UserError(
            f"there is no NVIDIA driver on this machine ({error}), and TensorRT builds engines only on the GPU they "
            "are for. Build on the device."
        ) from error
    device = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise UserError(
            "the NVIDIA driver finds no GPU on this machine, and TensorRT builds engines only on the GPU they are for. "
            "Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or build on the device."
        )
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = (_attribute(driver, device, number) for number in (_SM_MAJOR, _SM_MINOR))
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    module = _kernel_module()
    return Gpu(name.value.decode(), 10 * major + minor, f"{module}, {cuda}" if module else cuda)


def _attribute(driver: ctypes.CDLL, device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value


def _kernel_module() -> str | None:
    """Return the version of NVIDIA's kernel module, or None where the system does not tell."""
    try:
        text = _KERNEL_MODULE.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"NVRM version:.*?\s(\d+\.[\d.]+)\s", text)
    return match[1] if match else None
