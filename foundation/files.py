"""Files that are either complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeattn.foundation.errors import UserError

_LEFTOVER = ".edgeattn-tmp-"
"""How the names of temporary files begin."""


def remove_leftovers(folder: Path) -> None:
    """Remove from one folder the temporary files of runs that were killed while writing."""
    for leftover in folder.glob(f"{_LEFTOVER}*"):
        leftover.unlink()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    Args:
        path: final location of one file; its folder is created when missing.

    Yields:
        A path in the same folder with the same suffix, so that writers that look at the suffix behave the same.

    Raises:
        UserError: the folder cannot be created or written.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_LEFTOVER}{final.stem}-", suffix=final.suffix, dir=final.parent)
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {final.parent}: {error.strerror or error}. Choose a folder you may write to."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's file mode mask (reading it needs setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically and return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file, or of a folder's file names and contents in sorted order.

    Raises:
        UserError: the path does not exist or cannot be read.
    """
    root = Path(path)
    digest = hashlib.sha256()
    try:
        if root.is_dir():
            for file in sorted(item for item in root.rglob("*") if item.is_file()):
                digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_of(file)}\n".encode())
            return digest.hexdigest()
        with root.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror or error}. Check the path.") from error
