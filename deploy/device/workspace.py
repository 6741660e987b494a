"""An unpacked bundle that was checked, and the folder that the programs write to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .archive import check_folder
from .files import LEFTOVER, write_json
from .manifest import WORK, Manifest, canonical
from .system import System


def provenance_digest(provenance: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a run's manifest, which tells to which run on the host a result belongs."""
    return hashlib.sha256(canonical(provenance)).hexdigest()


@dataclass(frozen=True)
class Workspace:
    """What every command works on.

    Attributes:
        bundle: folder of the unpacked bundle.
        work: folder for everything that is made from it.
        manifest: the bundle's manifest.
        system: the machine.
    """

    bundle: Path
    work: Path
    manifest: Manifest
    system: System

    @classmethod
    def open(cls, bundle: Path, work: Path | None = None, system: System | None = None) -> Workspace:
        """Check every file of a bundle, and remove what killed processes left in the work folder.

        Raises:
            DeviceError: a file is not as it was bundled.
        """
        manifest = check_folder(bundle)
        folder = work or bundle / WORK
        for leftover in folder.rglob(f"{LEFTOVER}*") if folder.is_dir() else ():
            leftover.unlink(missing_ok=True)
        return cls(bundle, folder, manifest, system or System())

    def digest(self, prefix: str) -> dict[str, str]:
        """Return the digests of all members whose name begins with a prefix."""
        return {member.name: member.sha256 for member in self.manifest.members if member.name.startswith(prefix)}

    def write(self, command: str, precision: str | None, record: Mapping[str, Any]) -> Path:
        """Write the result of a command, with what it was about, and return the path."""
        name = f"{command}.json" if precision is None else f"{command}.{precision}.json"
        content = self.manifest.content
        about = {
            "command": command,
            "bundle": self.manifest.digest,
            "run": provenance_digest(content["provenance"]),
            "model": content["model"]["name"],
            "target": content["target"]["name"],
            **({} if precision is None else {"precision": precision}),
        }
        return write_json(self.work / name, {**about, **record})
