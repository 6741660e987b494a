"""The command line: listings, and one clear paragraph with exit status 2 for everything a user can get wrong."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from edgeattn.cli.main import main
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import save_checkpoint

Run = Callable[..., tuple[int, str, str]]
BUNDLED = str(MODELS.get("ccnet-digits").checkpoint)


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


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("blocks", ["criss-cross", "rcca", "co-attention", "CoAttentionOneWay"]),
        ("models", ["ccnet-r101", "cosnet-digits", "bundled"]),
        ("plugins", ["CrissCrossAttention", "CoAttentionOneWay"]),
        ("targets", ["jetpack-6.2-orin", "10.3"]),
    ],
)
def test_listings(run: Run, what: str, expected: list[str]) -> None:
    status, out, _ = run("list", what)
    assert status == 0
    assert all(name in out for name in expected)


def fails(result: tuple[int, str, str], *words: str) -> None:
    """Assert one paragraph of error that contains the words, exit status 2, and no traceback."""
    status, out, err = result
    assert status == 2, err
    assert "Traceback" not in out + err
    assert err.count("error:") == 1
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


def test_unknown_names(run: Run, tmp_path: Path) -> None:
    fails(run("list", "horses"), "horses", "blocks, models")
    fails(run("export", "bundled", "--model", "ccnet-digit", "-o", tmp_path / "o"), "ccnet-digit", "ccnet-digits")
    arguments = ("export", "bundled", "--model", "ccnet-digits", "--target", "jetpack-6", "-o", tmp_path / "o")
    fails(run(*arguments), "jetpack-6", "jetpack-6.2-orin")
    fails(run("export", "bundled", "--model", "ccnet-r101", "-o", tmp_path / "o"), "no trained weights are bundled")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("size", ["128", "128x", "axb", "128x160x3", "0x16", "-1x16", "99999999x16", "8x8"])
def test_wrong_size_strings(run: Run, tmp_path: Path, size: str) -> None:
    fails(run("export", "bundled", "--model", "ccnet-digits", f"--size={size}", "-o", tmp_path / "o"), repr(size))


def test_wrong_checkpoint_lists_every_key(run: Run, tmp_path: Path) -> None:
    state = MODELS.get("ccnet-digits").build().state_dict()
    state["head.cca.gama"] = state.pop("head.cca.gamma")
    del state["conv1.weight"]
    state["conv2.weight"] = torch.zeros(3)
    path = save_checkpoint(state, tmp_path / "wrong.safetensors", {})
    result = run("export", path, "--model", "ccnet-digits", "-o", tmp_path / "o")
    fails(result, "conv1.weight", "conv2.weight", "head.cca.gama", "head.cca.gamma")


class Payload:
    """Pickles to code that would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


def test_files_that_are_no_checkpoints(run: Run, tmp_path: Path) -> None:
    whole = Path(BUNDLED).read_bytes()
    contents = {
        "truncated.safetensors": whole[: len(whole) // 2],
        "empty.pth": b"",
        "page.pth": b"<html>404</html>",
        "huge_header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "code.pth": pickle.dumps(Payload(tmp_path / "ran")),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        fails(run("export", path, "--model", "ccnet-digits", "-o", tmp_path / "o"), name)
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "zip.pth")
    fails(run("export", tmp_path / "zip.pth", "--model", "ccnet-digits", "-o", tmp_path / "o"), "zip.pth")
    fails(run("export", tmp_path / "absent.pth", "--model", "ccnet-digits", "-o", tmp_path / "o"), "absent.pth")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o").exists()


def test_unwritable_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        fails(run("export", "bundled", "--model", "ccnet-digits", "--samples", 1, "-o", output), "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_calibration_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    def export(source: Path) -> tuple[int, str, str]:
        arguments = ("--int8", "--calibration", source, "--samples", 1, "-o", tmp_path / "o")
        return run("export", "bundled", "--model", "ccnet-digits", *arguments)

    empty = tmp_path / "empty"
    empty.mkdir()
    fails(export(empty), "empty", "holds no images")
    fails(export(tmp_path / "absent"), "absent")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (32, 32)).save(few / "one.png")
    fails(export(few), "few", "at least")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 not really")
    fails(export(broken), "broken.npz")


def test_images_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    arguments = ("--images", tmp_path / "absent", "-o", tmp_path / "o")
    fails(run("export", "bundled", "--model", "ccnet-digits", *arguments), "absent")
    weights = save_checkpoint(torch.nn.Linear(1, 1), tmp_path / "linear.safetensors", {})
    fails(run("export", weights, "--model", "ccnet-r101", "-o", tmp_path / "o"), "Missing")


def test_options_without_effect_are_refused(run: Run, tmp_path: Path) -> None:
    export = ("export", "bundled", "--model", "ccnet-digits", "-o", tmp_path / "o")
    fails(run(*export, "--calibration", tmp_path), "--int8")
    fails(run(*export, "--extra-size", "96x96"), "--dynamic")
    assert not (tmp_path / "o").exists()


def test_opset_out_of_range(run: Run, tmp_path: Path) -> None:
    arguments = ("--opset", 23, "--samples", 1, "-o", tmp_path / "o")
    fails(run("export", "bundled", "--model", "ccnet-digits", *arguments), "opset 23", "18 to 22")


def test_compare_and_rewrite_name_what_is_wrong(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    fails(run("compare", "bundled", text, "--model", "ccnet-digits"), "text.onnx")
    fails(run("rewrite", text, "-o", tmp_path / "out.onnx"), "text.onnx")
    fails(run("rewrite", tmp_path / "absent.onnx", "-o", tmp_path / "out.onnx"), "absent.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_rewrite_of_a_graph_without_attention_exits_with_1(run: Run, tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "relu",
        [info("x", TensorProto.FLOAT, [1, 4])],
        [info("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "relu.onnx")
    status, out, _ = run("rewrite", tmp_path / "relu.onnx", "-o", tmp_path / "out.onnx")
    assert status == 1
    assert "0 replaced" in out


def test_missing_arguments_exit_with_2(run: Run) -> None:
    status, _, err = run("export", "bundled")
    assert status == 2
    assert "Traceback" not in err
