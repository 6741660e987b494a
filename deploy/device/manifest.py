"""`manifest.json` of a bundle: its layout, what it may say, and how it guards itself.

The file is canonical: the same content always gives the same bytes, and it holds the SHA-256 of its own remainder. That
finds damage and careless edits. It is no signature: who rewrites the digests as well is only found by the signature of
the whole bundle (`signature.py`), or by comparing its SHA-256 with the one that its maker published.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import DeviceError

MANIFEST = "manifest.json"
KIND = "edgeattn bundle"
FORMAT = 1
"""Version of the bundle's layout; a reader takes no other."""

WORK = "work"
"""Folder beside the members that the device writes to; no member may lie in it."""

MANIFEST_BYTES = 4 << 20
MEMBER_BYTES = 4 << 30
TOTAL_BYTES = 16 << 30
MEMBERS = 4096
NAME_LENGTH, FOLDER_LENGTH = 100, 155
"""Characters that a file's own name and its folder may have: what a header of the archive holds."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REMAKE = "Make the bundle again with `edgeattn bundle`, or copy it again."

_LAYOUT: Mapping[str, type | tuple[type, ...]] = {
    "created_with": dict,
    "files": dict,
    "format": int,
    "golden": dict,
    "kind": str,
    "licence": dict,
    "model": dict,
    "plugins": (dict, type(None)),
    "precisions": dict,
    "provenance": dict,
    "sha256": str,
    "target": dict,
    "timing_cache": (str, type(None)),
}


@dataclass(frozen=True)
class Member:
    """One file of a bundle.

    Attributes:
        name: path in the bundle, with forward slashes.
        size: in bytes.
        sha256: hexadecimal digest of its content.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest that was checked.

    Attributes:
        content: the JSON document.
        members: every file but the manifest itself, in the order of the archive.
        size: length of the manifest in bytes.
        digest: hexadecimal SHA-256 of the manifest's bytes.
    """

    content: Mapping[str, Any]
    members: tuple[Member, ...]
    size: int
    digest: str

    def precision(self, name: str | None) -> tuple[str, Mapping[str, Any]]:
        """Return name and entry of a precision; the only one where none is named.

        Raises:
            DeviceError: there is no such precision, or a choice has to be made.
        """
        known = self.content["precisions"]
        if name is None and len(known) == 1:
            name = next(iter(known))
        if name is None or name not in known:
            asked = "no precision is named" if name is None else f"the bundle has no precision {name!r}"
            raise DeviceError(f"{asked}. Give --precision with one of {', '.join(known)}.")
        return name, known[name]


def canonical(content: Any) -> bytes:
    """Return JSON of which the same content always gives the same bytes."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest: canonical JSON with the digest of everything else in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return canonical({**rest, "sha256": hashlib.sha256(canonical(rest)).hexdigest()})


def parse(data: bytes) -> Manifest:
    """Check a manifest.

    Raises:
        DeviceError: it is damaged, edited, of another format, or names files that no bundle may hold.
    """
    if len(data) > MANIFEST_BYTES:
        raise DeviceError(f"{MANIFEST} has {len(data)} bytes; {MANIFEST_BYTES} are allowed. {_REMAKE}")
    try:
        content = json.loads(data.decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"{MANIFEST} is damaged: {error}. {_REMAKE}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DeviceError(f"{MANIFEST} is not that of an edgeattn bundle. Give a file that `edgeattn bundle` wrote.")
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise DeviceError(
            f"the bundle has format {content.get('format')!r}; this release reads format {FORMAT}. Use the release of "
            "edgeattn that made it, or make it again."
        )
    for key, kind in _LAYOUT.items():
        if key not in content or not isinstance(content[key], kind):
            raise DeviceError(f"{MANIFEST} lacks {key!r}, or holds something else under it. {_REMAKE}")
    if unknown := sorted(content.keys() - _LAYOUT.keys()):
        raise DeviceError(f"{MANIFEST} has the unknown entries {', '.join(unknown)}. {_REMAKE}")
    try:
        intact = sealed(content) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise DeviceError(f"{MANIFEST} was changed after it was written: its own SHA-256 differs. {_REMAKE}")
    members = _members(content["files"])
    _require_references(content, {member.name for member in members})
    return Manifest(content, members, len(data), hashlib.sha256(data).hexdigest())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _members(files: Mapping[str, Any]) -> tuple[Member, ...]:
    if len(files) > MEMBERS:
        raise DeviceError(f"the bundle names {len(files)} files; {MEMBERS} are allowed. {_REMAKE}")
    members = []
    for name, entry in sorted(files.items()):
        require_name(name)
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
            raise DeviceError(f"{MANIFEST} does not give size and SHA-256 of {name!r}. {_REMAKE}")
        size, digest = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size <= MEMBER_BYTES:
            raise DeviceError(f"{MANIFEST} gives {name!r} the size {size!r}; 0 to {MEMBER_BYTES} is allowed. {_REMAKE}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise DeviceError(f"{MANIFEST} gives {name!r} the SHA-256 {digest!r}, which is none. {_REMAKE}")
        members.append(Member(name, size, digest))
    if (total := sum(member.size for member in members)) > TOTAL_BYTES:
        raise DeviceError(f"the bundle's files have {total} bytes; {TOTAL_BYTES} are allowed. {_REMAKE}")
    folded = {member.name.lower() for member in members}
    folders = {"/".join(name.split("/")[:depth]) for name in folded for depth in range(1, name.count("/") + 1)}
    if len(folded) != len(members) or folders & folded:
        raise DeviceError(f"two files of the bundle would take the same place. {_REMAKE}")
    return tuple(members)


def require_name(name: str) -> None:
    """Refuse a name that a bundle may not hold: absolute, leading out of the folder, hidden, reserved, or unusual.

    Raises:
        DeviceError: the message says why.
    """
    parts = name.split("/")
    reason = None
    if name.startswith("/") or re.match(r"[A-Za-z]:|\\", name):
        reason = "is an absolute path"
    elif ".." in parts:
        reason = "leads out of the folder"
    elif not _NAME.fullmatch(name) or any(part.endswith(".") for part in parts):
        reason = "has characters that no file of a bundle has"
    elif len(parts[-1]) > NAME_LENGTH or len("/".join(parts[:-1])) > FOLDER_LENGTH:
        reason = f"is longer than {NAME_LENGTH} characters, or its folder than {FOLDER_LENGTH}"
    elif parts[0].lower() == WORK or name.lower() == MANIFEST:
        reason = "is reserved"
    if reason:
        raise DeviceError(f"the bundle names the file {name!r}, which {reason}. {_REMAKE}")


def _require_references(content: Mapping[str, Any], members: set[str]) -> None:
    """Refuse a manifest whose entries do not fit together; what is found here is not looked at again."""
    try:
        named = [entry["model"] for entry in content["precisions"].values()]
        named += [sample["file"] for sample in content["golden"]["samples"]]
        named += [content["timing_cache"]] if content["timing_cache"] is not None else []
        complete = bool(content["precisions"]) and bool(content["golden"]["samples"])
        # What the programs read without asking.
        for entry in content["precisions"].values():
            _ = entry["plugin_nodes"] + 0, entry["form"] + "", [*entry["profiles"]], {**entry["tolerance"]}
            complete = complete and {"relative_l2", "label_agreement", "task_drop"} <= entry["tolerance"].keys()
            for given in entry["tolerance"].get("outputs", ()):
                complete = complete and {"output", "relative_l2", "max_abs"} <= given.keys()
            for norms in entry.get("allowed_error", {}).values():
                complete = complete and len([norm + 0.0 for norm in norms]) == len(content["golden"]["samples"])
        for part, keys in _PARTS.items():
            complete = complete and keys <= content[part].keys()
        plugins_fit = content["plugins"] is not None or not any(
            entry["plugin_nodes"] for entry in content["precisions"].values()
        )
        lost = sorted({name for name in named if name not in members})
    except (AttributeError, KeyError, TypeError) as error:
        raise DeviceError(f"{MANIFEST} is not laid out as format {FORMAT} says: {error!r}. {_REMAKE}") from error
    if lost:
        raise DeviceError(f"{MANIFEST} speaks of {lost[0]!r}, which is no file of the bundle. {_REMAKE}")
    if not complete or not plugins_fit:
        raise DeviceError(f"{MANIFEST} lacks models, golden samples, plugins or figures of the target. {_REMAKE}")


_PARTS = {
    "model": {"name", "inputs", "outputs", "classes", "preprocessing", "size"},
    "target": {"name", "tensorrt", "tensorrt_full", "cuda", "sm", "software"},
}
