"""Run directories: resuming, auditing, and surviving interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeattn.export.run_directory import RunDirectory
from edgeattn.foundation import UserError, write_text


class Doubler:
    """A stage that doubles the number in `source`, counting how often it ran."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source, self.calls = folder, source, 0

    def __call__(self) -> dict[str, object]:
        self.calls += 1
        write_text(self.folder / "result", str(2 * int(self.source.read_text())))
        return {"doubled": True}

    def run(self, **settings: object) -> int:
        directory = RunDirectory(self.folder)
        (path,) = directory.stage("double", self, settings=settings, inputs=[self.source], outputs=["result"])
        return int(path.read_text())


@pytest.fixture
def doubler(tmp_path: Path) -> Doubler:
    return Doubler(tmp_path / "run", write_text(tmp_path / "source", "21"))


def test_an_unchanged_stage_is_skipped(doubler: Doubler) -> None:
    assert [doubler.run(a=1), doubler.run(a=1)] == [42, 42]
    assert doubler.calls == 1


def test_changed_input_settings_or_output_run_it_again(doubler: Doubler) -> None:
    doubler.run(a=1)
    doubler.source.write_text("4")
    assert doubler.run(a=1) == 8
    assert doubler.run(a=2) == 8
    (doubler.folder / "result").write_text("tampered")
    assert doubler.run(a=2) == 8
    (doubler.folder / "result").unlink()
    assert doubler.run(a=2) == 8
    assert doubler.calls == 5


def test_an_interrupted_stage_runs_again(doubler: Doubler) -> None:
    doubler.run(a=1)
    directory = RunDirectory(doubler.folder)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directory.stage("double", killed, settings={"a": 2}, inputs=[doubler.source], outputs=["result"])
    assert doubler.run(a=2) == 42
    assert doubler.calls == 2


def test_only_our_own_leftovers_are_removed(doubler: Doubler) -> None:
    doubler.run(a=1)
    theirs = write_text(doubler.folder / "deep" / ".notes.tmp.txt", "kept")
    ours = write_text(doubler.folder / ".edgeattn-tmp-result-abc", "half")
    RunDirectory(doubler.folder)
    assert theirs.exists()
    assert not ours.exists()


def test_manifest_records_what_was_done(doubler: Doubler) -> None:
    doubler.run(a=1)
    manifest = json.loads((doubler.folder / "manifest.json").read_text())
    stage = manifest["stages"]["double"]
    assert stage["settings"] == {"a": 1}
    assert stage["facts"] == {"doubled": True}
    assert set(stage["outputs"]) == {"result"}
    assert set(stage["inputs"]) == {"source"}
    assert "torch" in manifest["versions"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "stages": {}}'])
def test_a_manifest_that_is_not_ours_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = write_text(tmp_path / "manifest.json", content)
    with pytest.raises(UserError, match="manifest"):
        RunDirectory(tmp_path)
    assert path.read_text() == content


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(write_text(tmp_path / "file", ""))
