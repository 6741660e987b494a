"""A kernel library is read back as it was written, or refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.kernel_library import MANIFEST, CompiledKernel, KernelLibrary

KERNEL = CompiledKernel(
    operation="CrissCrossAttention",
    op_type="CrissCrossAttention",
    launch="columns",
    kernel="module:function",
    element="float16",
    layout="channels-last",
    static={"channels": 512},
    sm=87,
    ptx_isa=85,
    entry="function",
    warps=4,
    shared=14336,
    registers=128,
    stack=0,
    spill_stores=0,
    spill_loads=0,
    constants={"CHANNELS": 512},
    scope={"channels": 512, "CHANNELS": 512},
    parameters=(("query", "*fp16"), ("scalar_0", "i32")),
    cubin="a.cubin",
    ptx="a.ptx",
    source_hash="0" * 64,
)
FILES = {"a.cubin": b"machine code", "a.ptx": b"text"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    KernelLibrary(tmp_path / "library", (KERNEL,), "3.9.0").write(FILES)
    return tmp_path / "library"


def test_what_is_written_is_read_back(folder: Path) -> None:
    assert KernelLibrary.load(folder) == KernelLibrary(folder, (KERNEL,), "3.9.0")
    assert (folder / "a.cubin").read_bytes() == FILES["a.cubin"]


def test_writing_again_replaces_what_was_there(folder: Path) -> None:
    (folder / "own notes.txt").write_text("kept")
    (folder / "kernels.S").write_text("kept")
    other = dataclasses.replace(KERNEL, cubin="b.cubin", ptx="b.ptx")
    KernelLibrary(folder, (other,), "3.9.0").write({"b.cubin": b"1", "b.ptx": b"2"})
    assert {path.name for path in folder.iterdir()} == {
        "b.cubin",
        "b.ptx",
        MANIFEST,
        "kernels.S",
        "own notes.txt",
    }


def test_manifest_is_last_so_an_interrupted_write_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        KernelLibrary(folder, (KERNEL,), "3.9.0").write(FILES)
    with pytest.raises(UserError, match="not a kernel library"):
        KernelLibrary.load(folder)
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize(
    "files",
    [{}, {"a.cubin": b""}, {**FILES, "c.cubin": b""}],
)
def test_files_must_be_those_of_the_kernels(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"a\.ptx"):
        KernelLibrary(tmp_path, (KERNEL,), "3.9.0").write(files)


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "not a kernel library"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "format None"),
        (_edited(lambda manifest: manifest.update(format=2)), "format 2"),
        (_edited(lambda manifest: manifest.pop("kernels")), "damaged: 'kernels'"),
        (_edited(lambda manifest: manifest.update(files={})), "damaged: 'a.cubin'"),
        (_edited(lambda manifest: manifest["kernels"][0].pop("warps")), "no field 'warps'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(warps="4")), "field 'warps' is '4'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(element="int8")), "field 'element' is 'int8'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(static={"channels": 1.5})), "field 'static'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(parameters=[["a"]])), "field 'parameters'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(cubin="../a.cubin")), "field 'cubin'"),
        (_edited(lambda manifest: manifest["kernels"][0].update(extra=1)), "unknown fields extra"),
        (lambda folder: (folder / "a.ptx").unlink(), "lacks the file a.ptx"),
        (lambda folder: (folder / "a.cubin").write_bytes(b"machine cod"), "SHA-256 differs"),
    ],
)
def test_damage_is_refused_with_the_reason(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        KernelLibrary.load(folder)
    assert "edgeattn plugins build" in str(error.value)
