"""`edgeattn estimate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeattn.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command in this process: exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgeattn", "estimate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[batch,16,height,width] x) => '
        "(float[batch,16,height,width] y) { a = Conv (x, w)  y = Relu (a) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 1, 1), np.float32), "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


TARGET = ("--target", "jetpack-6.2-orin-nx-16")


def test_tables_json_and_plot(run, model, tmp_path):
    files = tmp_path / "estimate.json", tmp_path / "roof.png"
    status, out, _ = run(model, *TARGET, "--size", "64x96", "--batch", 2, "--json", files[0], "-o", files[1], "--all")
    assert status == 0
    for part in ("not measured", "convolution", "fits", "not compared with a measurement", "assumed:"):
        assert part in out
    record = json.loads(files[0].read_text())
    assert record["measured"] is False
    assert record["input_sizes"] == {"x": [2, 16, 64, 96]}
    assert record["macs"] == 2 * 64 * 96 * 256
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_bad_input(run, model):
    status, _, err = run(model, *TARGET)
    assert status == 2
    assert "--size" in err
    assert run(model, "--target", "jetpack-6.2-orin", "--size", "64x64", "--batch", 1)[0] == 2
    status, _, err = run(model, *TARGET, "--input", "x:1x2")
    assert status == 2
    assert "NAME=SHAPE" in err
    assert run(model, *TARGET, "--input", "x=1x16x8x8")[0] == 0
