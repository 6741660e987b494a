"""The bundle as one file: an uncompressed tar archive in a single canonical form, and as a folder.

Members are plain files in the order of their names after the manifest, with fixed owner, mode and time. Every byte of
the archive follows from the manifest and the members' contents, so a reader needs no tolerance: it computes each header
and compares. Links, devices, odd paths, duplicates, hidden bytes and trailing data all fail that comparison. This is
why the format is written out here rather than left to `tarfile`, which forgives much. `tar -xf` reads it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import DeviceError
from .files import LEFTOVER, sha256_of
from .manifest import MANIFEST, MANIFEST_BYTES, WORK, Manifest, Member, parse

BLOCK = 512
MODIFIED = 315532800
"""Time of every file: the first of January 1980. `tar` warns of 1970."""

NAME_FIELD = 100
PREFIX_AT = 345
"""Where a header has the folder of a name that is longer than its field; see `manifest.NAME_LENGTH`."""

END = bytes(2 * BLOCK)
_REMAKE = "Copy the bundle again, or make it again with `edgeattn bundle`."
_KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}


def header(name: str, size: int) -> bytes:
    """Return the one header that a member may have (POSIX ustar)."""

    def number(value: int, width: int) -> bytes:
        return f"{value:0{width - 1}o}\0".encode("ascii")

    folder, _, file = name.rpartition("/") if len(name) > NAME_FIELD else ("", "", name)
    start = file.encode("ascii").ljust(NAME_FIELD, b"\0") + number(0o644, 8) + number(0, 8) + number(0, 8)
    start += number(size, 12) + number(MODIFIED, 12)
    rest = (b"0" + bytes(100) + b"ustar\x0000").ljust(PREFIX_AT - len(start) - 8, b"\0")
    rest = (rest + folder.encode("ascii")).ljust(BLOCK - len(start) - 8, b"\0")
    checksum = sum(start) + sum(rest) + 8 * ord(" ")
    return start + f"{checksum:06o}\0 ".encode("ascii") + rest


def padding(size: int) -> int:
    """Return the zero bytes that follow a member of a size."""
    return -size % BLOCK


def check_archive(stream: BinaryIO) -> Manifest:
    """Check every byte of a bundle; nothing is written.

    Args:
        stream: the archive, opened for reading in binary mode; it is read from its beginning.

    Raises:
        DeviceError: the file is not exactly what its manifest says; the message says where.
    """
    manifest, _ = _begin(stream)
    for _member, content in _contents(stream, manifest):
        for _ in content:
            pass
    return manifest


def unpack(stream: BinaryIO, folder: Path) -> Manifest:
    """Check a bundle and, when all of it is in order, write it to a new folder.

    The folder appears complete or not at all.

    Args:
        stream: see `check_archive`.
        folder: must not exist.

    Raises:
        DeviceError: see `check_archive`; the folder exists or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise DeviceError(f"{folder} exists. Choose a folder that does not, so that nothing in it is overwritten.")
    check_archive(stream)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f"{LEFTOVER}{glob.escape(folder.name)}-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f"{LEFTOVER}{folder.name}-", dir=folder.parent))
        manifest, data = _begin(stream)  # checked once more: the file may have been changed meanwhile
        (temporary / MANIFEST).write_bytes(data)
        for member, content in _contents(stream, manifest):
            path = temporary / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as output:
                for piece in content:
                    output.write(piece)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise DeviceError(
            f"cannot write {folder}: {error.strerror or error}. Make room there, or choose another folder."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)
    return manifest


def _begin(stream: BinaryIO) -> tuple[Manifest, bytes]:
    """Read and check the manifest and the archive's length; returns the manifest and its bytes."""
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    block = stream.read(BLOCK)
    size = _manifest_size(block)
    if block != header(MANIFEST, size):
        raise DeviceError(f"the header of {MANIFEST} is not as `edgeattn bundle` writes it. {_REMAKE}")
    data = _exactly(stream, size, MANIFEST)
    manifest = parse(data)
    _skip_padding(stream, size, MANIFEST)
    expected = sum(BLOCK + part + padding(part) for part in (size, *(member.size for member in manifest.members)))
    if length != expected + len(END):
        what = "is cut off" if length < expected + len(END) else "has bytes that belong to no file"
        raise DeviceError(f"the bundle {what}: {length} bytes in place of {expected + len(END)}. {_REMAKE}")
    return manifest, data


def _contents(stream: BinaryIO, manifest: Manifest) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """Yield each member with its content in pieces; its digest is checked behind the last piece.

    Nothing of a content may be used before all of it was read.
    """
    for member in manifest.members:
        block = _exactly(stream, BLOCK, member.name)
        if block != header(member.name, member.size):
            raise DeviceError(f"{_what_differs(block, member)}. {_REMAKE}")
        content = _content(stream, member)
        yield member, content
        _skip_padding(stream, member.size, member.name)
    if stream.read() != END:
        raise DeviceError(f"the end of the bundle is not as `edgeattn bundle` writes it. {_REMAKE}")


def _content(stream: BinaryIO, member: Member) -> Iterator[bytes]:
    digest = hashlib.sha256()
    left = member.size
    while left:
        piece = _exactly(stream, min(left, 1 << 20), member.name)
        digest.update(piece)
        left -= len(piece)
        yield piece
    if digest.hexdigest() != member.sha256:
        raise DeviceError(f"{member.name} is not the file that was bundled: its SHA-256 differs. {_REMAKE}")


def _manifest_size(block: bytes) -> int:
    if len(block) < BLOCK or block[:NAME_FIELD].rstrip(b"\0") != MANIFEST.encode():
        raise DeviceError(
            f"the file does not begin with {MANIFEST}. Give an uncompressed bundle that `edgeattn bundle` wrote."
        )
    digits = block[124:135]
    if not all(digit in b"01234567" for digit in digits) or (size := int(digits, 8)) > MANIFEST_BYTES:
        raise DeviceError(f"{MANIFEST} has the size {digits!r}; {MANIFEST_BYTES} bytes are allowed. {_REMAKE}")
    return size


def _exactly(stream: BinaryIO, size: int, name: str) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise DeviceError(f"the bundle is cut off in {name}. {_REMAKE}")
    return data


def _skip_padding(stream: BinaryIO, size: int, name: str) -> None:
    if any(_exactly(stream, padding(size), name)):
        raise DeviceError(f"there are bytes after {name} that belong to no file. {_REMAKE}")


def _what_differs(block: bytes, member: Member) -> str:
    """Return why a header is not the one that was expected."""
    folder, file = (
        part.rstrip(b"\0").decode("ascii", "backslashreplace") for part in (block[PREFIX_AT:500], block[:NAME_FIELD])
    )
    name = f"{folder}/{file}" if folder else file
    kind = _KINDS.get(block[156:157])
    if not any(block):
        return f"{member.name} is missing"
    if kind:
        return f"the bundle holds {kind}, {name!r}, and may hold plain files only"
    if name != member.name:
        return f"the bundle holds {name!r} in place of {member.name!r}"
    return f"the header of {name!r} is not as `edgeattn bundle` writes it"


def check_folder(folder: Path, *, tell: Callable[[str], None] | None = None) -> Manifest:
    """Check every file of an unpacked bundle; the folder that the device writes to is left out.

    Args:
        folder: where the bundle was unpacked.
        tell: called with the name of each file before it is read.

    Raises:
        DeviceError: a file is missing, changed or too much, or is a link.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > MANIFEST_BYTES:
            raise DeviceError(f"{path} is a link or too large. Unpack the bundle again.")
        manifest = parse(path.read_bytes())
    except OSError as error:
        raise DeviceError(
            f"{folder} is no unpacked bundle: {MANIFEST} cannot be read ({error.strerror or error}). Name it with "
            "--bundle."
        ) from error
    names = {member.name for member in manifest.members}
    for found in _files_in(folder):
        if found not in names and found != MANIFEST:
            raise DeviceError(f"{folder / found} is not part of the bundle. Remove it, or unpack the bundle again.")
    for member in manifest.members:
        file = folder / member.name
        if tell:
            tell(member.name)
        if not file.is_file():
            raise DeviceError(f"{file} is missing. Unpack the bundle again.")
        if file.stat().st_size != member.size or sha256_of(file) != member.sha256:
            raise DeviceError(f"{file} is not the file that was bundled: it was changed. Unpack the bundle again.")
    return manifest


def _files_in(folder: Path) -> Iterator[str]:
    """Yield every file below a folder but the device's own, and Python's compiled modules.

    Raises:
        DeviceError: something is neither file nor folder, such as a link.
    """
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if here == folder and WORK in folders:
            folders.remove(WORK)
        for name in (*folders, *files):
            if (here / name).is_symlink() or not ((here / name).is_file() or (here / name).is_dir()):
                raise DeviceError(f"{here / name} is a link or a device, and a bundle has none. Unpack it again.")
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        yield from ((here / name).relative_to(folder).as_posix() for name in files)
