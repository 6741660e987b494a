"""The one interface to what runs a model: TensorRT on the device, ONNX Runtime where bundles are tested."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import DeviceError

Arrays = Mapping[str, np.ndarray]
Tell = Callable[[str], None]
"""Called with one line about what is being done."""


@dataclass(frozen=True)
class BuildRequest:
    """What to make an engine of.

    Attributes:
        model: ONNX file.
        plugin_nodes: nodes of it that have to become plugin layers.
        library: plugin library; None where the model needs none.
        profiles: by input name, the smallest, usual and largest shape; one mapping for each profile.
        timing_cache: file of measurements, read when it exists and renewed after the build.
    """

    model: Path
    plugin_nodes: int
    library: Path | None
    profiles: tuple[Mapping[str, list[list[int]]], ...]
    timing_cache: Path


@dataclass(frozen=True)
class Built:
    """An engine that was made.

    Attributes:
        data: its bytes.
        timing_cache: the measurements with those of this build; None where there are none.
        notes: what a user should read.
    """

    data: bytes
    timing_cache: bytes | None = None
    notes: tuple[str, ...] = ()


class Session(Protocol):
    """A loaded engine."""

    inputs: Mapping[str, np.dtype[Any]]
    """Type of each input by name."""

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs by name; host memory in, host memory out."""
        ...

    def memory(self) -> dict[str, int]:
        """Return what is known of the memory it takes, in bytes, by what it is."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Backend(Protocol):
    """Something that makes and runs engines."""

    name: str
    needs_library: bool
    """Plugin nodes run in a C++ library, which has to be built first."""

    def measured(self) -> str:
        """Return where results come from, in words that no reader can misunderstand."""
        ...

    def identity(self) -> dict[str, str]:
        """Return what an engine depends on besides its model."""
        ...

    def build(self, request: BuildRequest, tell: Tell) -> Built:
        """Make an engine."""
        ...

    def load(self, engine: Path, library: Path | None) -> Session:
        """Load an engine."""
        ...


BACKENDS = {"tensorrt": ".tensorrt_engine", "onnxruntime": ".onnxruntime_engine"}
"""Modules by name; each is imported when it is chosen, because the other's library may be missing."""


def backend_named(name: str) -> Backend:
    """Return a backend.

    Raises:
        DeviceError: there is no such backend, or its library is not installed.
    """
    if name not in BACKENDS:
        raise DeviceError(f"there is no engine {name!r}. Choose {' or '.join(BACKENDS)}.")
    try:
        module = importlib.import_module(BACKENDS[name], __package__)
        backend: Backend = module.backend()
    except ImportError as error:
        raise DeviceError(f"{error}. {_HINTS[name]}") from error
    return backend


_HINTS = {
    "tensorrt": "On a Jetson, TensorRT comes with JetPack (`sudo apt install nvidia-jetpack`) and lies in the system's "
    "Python; Polygraphy comes with `python3 -m pip install polygraphy`.",
    "onnxruntime": "Install it with `python3 -m pip install onnxruntime`. It is for tests only.",
}
