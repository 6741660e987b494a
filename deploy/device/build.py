"""The command build: the plugin library and the engine, each only where it is not there already."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engines import Backend, BuildRequest, Tell
from .errors import DeviceError
from .files import read_json, sha256_of, write_bytes, write_json
from .workspace import Workspace

LIBRARY = "libedgeattn_plugins.so"


def build(workspace: Workspace, precision: str | None, backend: Backend, tell: Tell) -> dict[str, Any]:
    """Build the engine of a precision, and the plugin library where the engine needs it.

    Args:
        workspace: the checked bundle.
        precision: which; the only one of the bundle when None.
        backend: what builds.
        tell: told what is being done.

    Returns:
        The record that was written beside the engine.

    Raises:
        DeviceError: it cannot be built here.
    """
    name, entry = workspace.manifest.precision(precision)
    library = plugin_library(workspace, tell) if entry["plugin_nodes"] and backend.needs_library else None
    if entry["plugin_nodes"] and not backend.needs_library and entry["form"] == "plugin, stripped":
        raise DeviceError(
            f"the model of {name} holds plugin nodes without bodies, which only TensorRT runs. Use --engine tensorrt."
        )
    engine, record_path = engine_paths(workspace, name, backend)
    key = _key(workspace, entry, backend)
    known = read_json(record_path)
    if _is_current(known, key, engine):
        tell(f"{engine} is up to date")
        return {**known, "built": False}
    cache = workspace.work / f"timing.{backend.name}.cache"
    carried = workspace.manifest.content["timing_cache"]
    if carried is not None and not cache.exists():
        write_bytes(cache, (workspace.bundle / carried).read_bytes())
    request = BuildRequest(
        workspace.bundle / entry["model"], entry["plugin_nodes"], library, tuple(entry["profiles"]), cache
    )
    record_path.unlink(missing_ok=True)  # an engine without a record counts as none
    start = time.monotonic()
    built = backend.build(request, tell)
    seconds = time.monotonic() - start
    write_bytes(engine, built.data)
    if built.timing_cache is not None:
        write_bytes(cache, built.timing_cache)
    record = {
        "measured": backend.measured(),
        "key": key,
        "engine": engine.name,
        "engine_sha256": sha256_of(engine),
        "engine_bytes": len(built.data),
        "seconds": seconds,
        "notes": list(built.notes),
    }
    write_json(record_path, record)
    return {**record, "built": True}


def engine_paths(workspace: Workspace, precision: str, backend: Backend) -> tuple[Path, Path]:
    """Return where the engine of a precision lies, and its record."""
    return (
        workspace.work / f"{precision}.{backend.name}.engine",
        workspace.work / f"{precision}.{backend.name}.engine.json",
    )


def require_engine(workspace: Workspace, precision: str, backend: Backend) -> tuple[Path, Path | None]:
    """Return the engine that is to be used, and its plugin library.

    Raises:
        DeviceError: it was not built, or something it depends on changed since.
    """
    entry = workspace.manifest.content["precisions"][precision]
    engine, record_path = engine_paths(workspace, precision, backend)
    if not _is_current(read_json(record_path), _key(workspace, entry, backend), engine):
        raise DeviceError(
            f"there is no engine of {precision} for this bundle and this device. Build it first: "
            f"python3 -m edgeattn_device build --precision {precision}"
        )
    if not (entry["plugin_nodes"] and backend.needs_library):
        return engine, None
    library, record = _library_paths(workspace)
    if not _is_current(read_json(record), _library_key(workspace), library):
        raise DeviceError(f"the plugin library {library} is missing or another one. Run the command build again.")
    return engine, library


def plugin_library(workspace: Workspace, tell: Tell) -> Path:
    """Compile the plugin library with cmake, unless the one that is there is of these sources.

    Raises:
        DeviceError: cmake is missing or failed; the message ends with its last lines.
    """
    library, record = _library_paths(workspace)
    key = _library_key(workspace)
    if _is_current(read_json(record), key, library):
        tell(f"{library} is up to date")
        return library
    folder = workspace.work / "plugins" / "build"
    sources = (workspace.bundle / "plugins").resolve()
    configure = ("cmake", "-S", f"{sources / 'cpp'}", "-B", f"{folder}", f"-DEDGEATTN_KERNELS={sources / 'kernels'}")
    for command in (configure, ("cmake", "--build", f"{folder}")):
        tell(" ".join(command))
        done = workspace.system.run(command)
        if done is None:
            raise DeviceError("cmake is missing or did not end. Install it with `sudo apt install cmake g++`.")
        if done.status:
            last = "\n".join([line for line in done.output.splitlines() if line.strip()][-12:])
            raise DeviceError(f"the plugin library does not compile; the command was {' '.join(command)}\n{last}")
    made = folder / LIBRARY
    if not made.is_file():
        raise DeviceError(f"cmake ended well, but there is no {made}. Remove {folder} and try again.")
    write_bytes(library, made.read_bytes())
    write_json(record, {"key": key, "engine_sha256": sha256_of(library)})
    return library


def _library_paths(workspace: Workspace) -> tuple[Path, Path]:
    folder = workspace.work / "plugins"
    return folder / LIBRARY, folder / f"{LIBRARY}.json"


def _library_key(workspace: Workspace) -> dict[str, Any]:
    return {"sources": workspace.digest("plugins/")}


def _key(workspace: Workspace, entry: Mapping[str, Any], backend: Backend) -> dict[str, Any]:
    """Return everything that an engine depends on; an engine with another key is built anew."""
    plugins = workspace.digest("plugins/") if entry["plugin_nodes"] and backend.needs_library else {}
    return {
        "backend": backend.name,
        **backend.identity(),
        "model": workspace.digest(entry["model"]),
        "plugins": plugins,
        "profiles": entry["profiles"],
    }


def _is_current(known: Any, key: Mapping[str, Any], file: Path) -> bool:
    return (
        isinstance(known, dict)
        and known.get("key") == key
        and file.is_file()
        and known.get("engine_sha256") == sha256_of(file)
    )
