"""Files that are either complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import DeviceError

LEFTOVER = ".edgeattn-tmp-"
"""How the names of temporary files and folders begin."""


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file so that it is complete or unchanged, whenever the process ends; return the path.

    Raises:
        DeviceError: the folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=LEFTOVER, dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise DeviceError(
            f"cannot write {path}: {error.strerror or error}. Make room there, or choose another folder with --work."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def write_json(path: Path, record: Any) -> Path:
    """Write JSON atomically and return the path; a NaN in it is a defect and raises ValueError."""
    return write_bytes(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file.

    Raises:
        DeviceError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DeviceError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    return digest.hexdigest()
