"""The timing cache: what TensorRT measured of its kernels, kept for the next build on the same machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.export.engine.machine import Machine
from edgeattn.foundation import atomic_path

if TYPE_CHECKING:
    import tensorrt as trt


def default_folder() -> Path:
    """Return where timing caches are kept: `$XDG_CACHE_HOME/edgeattn/timing`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeattn" / "timing"


def cache_path(folder: Path, machine: Machine) -> Path:
    """Return the cache of a machine: measurements hold for one TensorRT version, architecture and driver."""
    name = f"tensorrt-{machine.tensorrt}_sm-{machine.gpu.sm}_driver-{machine.gpu.driver}"
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.cache"


def save_cache(config: trt.IBuilderConfig, path: Path) -> None:
    """Add what a build measured to a cache file, also when the build did not come to its end.

    Args:
        config: the builder configuration of the build.
        path: see `cache_path`.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return
    if path.exists():  # another build may have written meanwhile
        other = config.create_timing_cache(path.read_bytes())
        if other is not None:
            cache.combine(other, True)
    data = cache.serialize()
    if data is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(data))
