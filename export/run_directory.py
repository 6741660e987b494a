"""The run directory: stages with recorded inputs and outputs, so that a run can be resumed and audited."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgeattn.foundation import UserError, __version__, remove_leftovers, sha256_of, write_text

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest's layout."""

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnx-graphsurgeon", "polygraphy", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on: edgeattn, Python and the libraries that touch the model."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"edgeattn": __version__, "python": platform.python_version(), **libraries}


class RunDirectory:
    """A folder in which every stage's files are recorded in `manifest.json`.

    A stage is skipped when its key (name, settings, hashes of its input files, library versions) is the recorded one
    and its files still have the recorded hashes. The manifest is rewritten after each stage, so a killed run resumes
    where it stopped; stages themselves write files atomically.

    Args:
        path: the folder; created when missing. Files of others in it are left alone.

    Raises:
        UserError: the folder cannot be created or written, or holds a manifest of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the output {self.path} is a file. Give a folder with -o.")
        self._manifest = self._read()
        remove_leftovers(self.path)
        self.skipped: list[str] = []
        self._write()  # an unwritable folder shows before any work is done

    def describe(self, facts: Mapping[str, object]) -> None:
        """Record facts about the whole run, such as the model, the target and where results were measured."""
        self._manifest["run"] = {**facts}
        self._write()

    @property
    def manifest(self) -> dict[str, object]:
        """The manifest as written: format, versions, run facts, and per stage key, settings, inputs and outputs."""
        return json.loads(json.dumps(self._manifest))

    def stage(
        self,
        name: str,
        work: Callable[[], Mapping[str, object] | None],
        *,
        settings: Mapping[str, object],
        inputs: Sequence[Path],
        outputs: Sequence[str],
    ) -> list[Path]:
        """Run one stage, or skip it when nothing it depends on has changed.

        Args:
            name: unique name of the stage.
            work: writes the output files into the folder; what it returns is recorded as the stage's facts.
            settings: everything else the result depends on, as JSON values.
            inputs: files or folders that the stage reads.
            outputs: names, relative to the folder, of the files that the stage writes.

        Returns:
            Paths of the outputs.
        """
        hashes = {self._relative(path): sha256_of(path) for path in inputs}
        basis = {"stage": name, "settings": settings, "inputs": hashes, "versions": versions()}
        key = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        paths = [self.path / output for output in outputs]
        stages = self._manifest["stages"]
        assert isinstance(stages, dict)
        recorded = stages.get(name)
        if recorded is not None and recorded["key"] == key and self._intact(recorded["outputs"], outputs):
            self.skipped.append(name)
            return paths
        stages.pop(name, None)
        for folder in {path.parent for path in paths}:
            remove_leftovers(folder)
        facts = work() or {}
        stages[name] = {
            "key": key,
            "settings": {**settings},
            "inputs": hashes,
            "facts": {**facts},
            "outputs": {output: sha256_of(path) for output, path in zip(outputs, paths, strict=True)},
        }
        self._write()
        return paths

    def _intact(self, recorded: Mapping[str, str], outputs: Sequence[str]) -> bool:
        return set(recorded) == set(outputs) and all(
            (self.path / name).is_file() and sha256_of(self.path / name) == digest for name, digest in recorded.items()
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix() if path.is_relative_to(self.path) else path.name

    def _read(self) -> dict[str, object]:
        empty: dict[str, object] = {"format": FORMAT, "versions": versions(), "run": {}, "stages": {}}
        path = self.path / MANIFEST
        if not path.exists():
            return empty
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            known = isinstance(manifest["stages"], dict) and manifest["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a readable manifest ({error}). Remove it or choose another folder."
            ) from error
        if not known:
            raise UserError(f"{path} has format {manifest['format']}, not {FORMAT}. Choose another folder.")
        return {**manifest, "versions": versions()}

    def _write(self) -> None:
        write_text(self.path / MANIFEST, json.dumps(self._manifest, indent=2) + "\n")
