"""`edgeattn plugins`: a library from one command, reproducible, with its resources; refused input in one paragraph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeattn.cli.main import main
from edgeattn.plugins_trt import library_builder
from edgeattn.plugins_trt.kernel_library import KernelLibrary

Run = Callable[..., tuple[int, str, str]]
SMALL = (
    *("--operation", "CoAttentionOneWayGated", "--size", "head_channels=16,channels=16"),
    *("--element", "float16", "--layout", "linear"),
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that runs `edgeattn plugins` with a cache of its own: exit status, stdout, stderr."""
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeattn", "plugins", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_build_report_and_build_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernel compiler needs Triton")
    library = tmp_path / "library"
    status, out, err = run("build", "--target", "jetpack-6.2-orin", *SMALL, "--jobs", 2, "-o", library)
    assert (status, err) == (0, "")
    assert "2 kernels" in out
    stem = "CoAttentionOneWayGated-{}-float16-linear-head_channels16_channels16-sm87.{}"
    names = {stem.format(launch, kind) for launch in ("attend", "merge") for kind in ("cubin", "ptx")}
    assert contents(library).keys() == {*names, "manifest.json", "kernel_table.cpp", "kernels.S"}
    assert [(kernel.launch, kernel.sm, kernel.ptx_isa) for kernel in KernelLibrary.load(library).kernels] == [
        ("attend", 87, 85),
        ("merge", 87, 85),
    ]

    status, out, _ = run("report", library)
    assert status == 0
    assert "sm_87, PTX 8.5, float16, linear, head_channels=16 channels=16" in out
    kernel = KernelLibrary.load(library).kernels[0]
    row = next(line.split() for line in out.splitlines() if "CoAttentionOneWayGated.attend" in line)
    assert row[1:6] == [str(number) for number in (kernel.warps, kernel.registers, kernel.shared, 0, 0)]

    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path / "another cache"))
    status, _, _ = run("build", "--sm", 87, "--ptx-isa", 85, *SMALL, "-o", tmp_path / "again")
    assert status == 0
    assert contents(tmp_path / "again") == contents(library)

    monkeypatch.setattr(library_builder, "problems", lambda kernel, limit: [f"needs more than {limit} bytes"])
    status, _, err = run("build", "--sm", 87, "--ptx-isa", 85, *SMALL, "-o", tmp_path / "refused")
    assert status == 1
    assert f"{stem.format('attend', 'cubin')}: needs more than 166912 bytes" in err
    assert "Nothing was written" in err
    assert not (tmp_path / "refused").exists()
    status, out, err = run("build", "--sm", 87, "--ptx-isa", 85, *SMALL, "--allow-problems", "-o", tmp_path / "allowed")
    assert (status, err.count("PROBLEM")) == (0, 2)
    assert contents(tmp_path / "allowed") == contents(library)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "jetpack-99"], "jetpack-99"),
        (["--sm", "87"], "not pairs"),
        ([], "nothing to build for"),
        (["--sm", "87", "--ptx-isa", "85", "--size", "channels"], "NAME=NUMBER"),
        (["--sm", "87", "--ptx-isa", "85", "--element", "int8"], "float16, bfloat16, float32"),
        (["--sm", "87", "--ptx-isa", "85", "--layout", "nhwc"], "channels-last"),
        (["--sm", "87", "--ptx-isa", "85", "--operation", "Other"], "'Other'"),
        (["--sm", "87", "--ptx-isa", "85", "--model", "no.onnx"], "cannot read the model no.onnx"),
    ],
)
def test_what_cannot_be_built_is_one_paragraph(run: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    status, _, err = run("build", *arguments, "-o", tmp_path / "library")
    assert status == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "library").exists()


def test_report_of_no_library(run: Run, tmp_path: Path) -> None:
    status, _, err = run("report", tmp_path)
    assert status == 2
    assert f"{tmp_path} is not a kernel library" in err
