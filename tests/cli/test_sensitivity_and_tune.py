"""`edgeattn sensitivity` and `edgeattn tune` on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from edgeattn.cli.main import main
from edgeattn.deploy.tuning import Sensitivity, SensitivityRequest
from edgeattn.deploy.tuning.records import Effect, ModuleSensitivity

Run = Callable[..., tuple[int, str, str]]
SMALL = ("bundled", "--model", "ccnet-digits", "--size", "64x80", "--granularity", "block", "--depth", "1")
TARGET = ("--target", "jetpack-6.2-orin-nx-16")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeattn", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images without ground truth."""
    folder = tmp_path_factory.mktemp("images")
    for index, colour in enumerate(((200, 30, 30), (20, 90, 180))):
        Image.new("RGB", (96, 80), colour).save(folder / f"{index}.png")
    return folder


def test_sensitivity_asks_and_prints(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SensitivityRequest] = []
    alone, silent = Effect(1.25, 97.5, 12.3, None), Effect(math.nan, math.nan, -math.inf, "no kernel")
    modules = (
        ModuleSensitivity("head[0]", ("a",), (), silent, alone),
        ModuleSensitivity("layer1", ("b",), (), alone, alone),
    )
    record = Sensitivity("net", "fp16", "points of mIoU", 7, 0, 80.0, alone, modules, "on a CPU", ("mind this",))

    def analyse(request: SensitivityRequest, output: Path, progress: object) -> Sensitivity:
        asked.append(request)
        return record

    monkeypatch.setattr("edgeattn.cli.sensitivity.analyse", analyse)
    status, out, err = run("sensitivity", *SMALL, "--precision", "fp16", "--samples", 7, "-o", tmp_path)
    assert status == 0, err
    for part in ("head[0]", "does not run", "layer1", "+1.250", "12.3", "█", "everything in FP16", "note: mind this"):
        assert part in out
    assert "sensitivity.fp16.json" in out
    export = asked[0].export
    assert (asked[0].precision, asked[0].granularity, asked[0].depth) == ("fp16", "block", 1)
    assert (export.model, export.size, export.sample_count, export.fp16, export.int8) == (
        *("ccnet-digits", (64, 80), 7),
        *(True, False),
    )


def test_tune_without_ground_truth(run: Run, tmp_path: Path, images: Path) -> None:
    common = (*SMALL, *TARGET, "--images", images, "--workers", 1, "--curve", 0, "-o", tmp_path)
    status, _, err = run("tune", *common, "--budget", "mIoU -1")
    assert status == 2
    assert "needs ground truth" in err
    assert "labels 99.5" in err
    # A budget that is looser than the bars of parity: the form is written, and fails them.
    status, out, err = run("tune", *common, "--budget", "labels 60")
    assert status == 1, err
    assert "FAIL ccnet-digits, tuned" in err
    for part in ("tuned", "INT8, default", "not measured", "the search saw the first 1 of 2 samples"):
        assert part in out
    assert (tmp_path / "tuning.json").exists()


def test_what_cannot_be_used_is_said_in_a_paragraph(run: Run, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "o")
    cases = [
        (("tune", *SMALL, *TARGET, "--budget", "accuracy 3", *output), "accuracy 3"),
        (("tune", *SMALL, "--target", "jetpack-6", "--budget", "mIoU -1", *output), "jetpack-6"),
        (("tune", "bundled", *TARGET, "--budget", "mIoU -1", *output), "--model"),
        (("sensitivity", *SMALL, "--precision", "int4", *output), "int4"),
        (("sensitivity", *SMALL, "--images", tmp_path / "absent", *output), "absent"),
    ]
    for arguments, word in cases:
        status, out, err = run(*arguments)
        assert status == 2, err
        assert word in err
        assert "Traceback" not in out + err
    assert not (tmp_path / "o").exists()
