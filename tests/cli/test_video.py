"""`edgeattn video`: from a folder of frames to masks, and what cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from edgeattn.cli.main import main
from edgeattn.models import digits

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeattn", "video", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    (pair,) = digits.held_out("pair", 1)
    for index, image in enumerate(pair.images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def test_masks_overlays_and_record(run: Run, frames: Path, tmp_path: Path) -> None:
    output = tmp_path / "masks"
    options = ("--model", "cosnet-digits", "--checkpoint", "bundled", "--references", 2, "--size", "64x80")
    status, out, err = run(frames, *options, "--overlay", "--compare", 1, "-o", output)
    assert status == 0, err
    assert "2 masks" in out
    assert "2 encoder runs" in out
    written = {path.name for path in output.iterdir()}
    assert written == {"0.png", "0.overlay.png", "1.png", "1.overlay.png", "video.json", "graphs"}
    record = json.loads((output / "video.json").read_text())
    assert (record["combination"]["name"], record["size"], record["precision"]) == ("mean", [64, 80], "fp32")
    compared = record["against_whole_network"]
    assert (compared["frames"], compared["runs_per_frame"]) == (1, 2)
    assert compared["largest_difference"] < 1e-4
    assert compared["seconds_per_frame_streamed"] > 0
    expected = 1 - compared["seconds_per_frame_streamed"] / compared["seconds_per_frame_whole"]
    assert abs(compared["share_of_time_saved"] - expected) < 0.02


def test_what_cannot_be_used(run: Run, frames: Path, tmp_path: Path) -> None:
    def fails(*arguments: object, words: list[str], model: str = "cosnet-digits", output: Path | None = None) -> None:
        status, out, err = run(*arguments, "--model", model, "-o", output or tmp_path / "masks")
        assert status == 2
        assert "Traceback" not in out + err
        for word in words:
            assert word in err

    fails(frames, model="ccnet-digits", words=["ccnet-digits does not compare", "cosnet-digits"])
    fails(frames, model="cosnet-r101", words=["no trained weights are bundled"])
    fails(frames, words=["5 references", "2 frames", "--references 1 to 2"])
    fails(frames, "--references", 1, output=frames, words=["would replace the frames", str(frames)])
    fails(frames, "--combination", "median", words=["'median'", "mean or group"])
    fails(frames, "--precision", "int4", words=["'int4'", "fp32 or fp16"])
    fails(frames, "--size", "64", words=["'64'"])
    fails(tmp_path / "absent.mp4", words=["absent.mp4", "does not exist"])
    fails(frames / "0.png", words=["0.png does not end in", ".mp4", "folder of frames"])
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, words=["holds no images"])
    Image.new("RGB", (8, 8)).save(frames / "0.jpg")
    fails(frames, words=["two images are called '0'"])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    fails(tmp_path / "broken.mp4", words=["ffmpeg", "broken.mp4"])
    assert not (tmp_path / "masks").exists()
