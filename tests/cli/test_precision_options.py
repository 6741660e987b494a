"""The options of `edgeattn export` and `compare` about precision and tolerance, from the command line to the record."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgeattn.cli.main import main
from edgeattn.deploy import pipeline
from edgeattn.export.metadata import metadata_of, module_scopes

Run = Callable[..., tuple[int, str, str]]


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


def test_precisions_exclusions_and_limits(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    common = ("--model", "ccnet-digits", "--samples", 4, "--atol", "logits:5")
    forms = ("--fp16", "--bf16", "--int8", "--fp16-exclude", "layer4", "--int8-exclude", "layer1")
    export = ("export", "bundled", *common, "--size", "64x80", *forms, "-o", folder)
    status, out, err = run(*export)
    assert status == 0, err
    assert "note on bf16: opset 18 became 22" in out
    assert {entry["form"]["name"] for entry in parity_of(folder)["forms"]} == {"fp32", "fp16", "bf16", "int8"}
    for entry in parity_of(folder)["forms"]:
        assert entry["tolerance"]["outputs"] == [{"output": "logits", "relative_l2": None, "max_abs": 5.0}]
        assert "Set by the user for output logits" in entry["tolerance"]["derivation"]
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    for precision in ("fp16", "bf16", "int8"):
        model = onnx.load(folder / f"model.{precision}.onnx")
        kept = stages[precision]["facts"]["fp32_nodes"]
        asked = {name for name, why in kept.items() if why == "asked for"}
        assert within(model, "layer4", "Conv") <= asked
        assert not within(model, "layer2", "Conv") & asked
        assert stages[precision]["facts"]["excluded_by_user"] == ["layer4"]
    assert within(model, "layer1", "Conv") <= stages["int8"]["facts"]["float_layers"].keys()
    assert within(model, "layer2", "Conv") <= stages["int8"]["facts"]["int8_layers"].keys()

    # Nothing changed: nothing is repeated. Other rules of judging: the comparison is, and nothing else.
    assert repeated(run(*export)[1], stages) == set()
    monkeypatch.setattr(pipeline, "rules_digest", lambda: "others")
    assert repeated(run(*export)[1], stages) == {"compare"}

    evidence = tmp_path / "evidence"
    files = (folder / "model.fp16.onnx", folder / "model.bf16.onnx")
    strict = ("compare", "bundled", *files, "--model", "ccnet-digits", "--samples", 1, "--atol", "1e-9")
    status, _, err = run(*strict, "--fp16-accumulation", "-o", evidence)
    assert status == 1
    assert "exceeds 1.00e-09" in " ".join(err.split())
    totals, bfloat = parity_of(evidence)["forms"]
    assert (totals["form"]["precision"], bfloat["form"]["precision"]) == ("fp16", "bf16")
    assert "running totals of FP16 sums rounded after every" in totals["measured"]
    assert "BF16 emulated" in bfloat["measured"]
    assert "running totals" not in bfloat["measured"]
    depths = [entry["tolerance"]["expected_relative_l2"] for entry in (totals, parity_of(folder)["forms"][1])]
    assert depths[0] > depths[1]  # rounded totals allow for more


def parity_of(folder: Path) -> dict[str, Any]:
    """Return what a comparison recorded."""
    record: dict[str, Any] = json.loads((folder / "parity.json").read_text())
    return record


def repeated(shown: str, stages: Iterable[str]) -> set[str]:
    """Return the stages that a run did not say to have skipped."""
    skipped = " ".join(shown.split()).partition("unchanged, not repeated: ")[2]
    return {stage for stage in stages if not re.search(rf"(^|, ){stage}(,|\b(?!-))", skipped)}


def within(model: onnx.ModelProto, module: str, operator: str) -> set[str]:
    """Return the names of a module's nodes of an operator."""
    found = {
        node.name
        for node in model.graph.node
        if node.op_type == operator and any(scope.split(".")[0] == module for scope in module_scopes(metadata_of(node)))
    }
    assert found
    return found


def test_options_that_cannot_be_met(run: Run, tmp_path: Path) -> None:
    common = ("export", "bundled", "--model", "ccnet-digits", "-o", tmp_path / "run")
    cases = [
        (("--fp16-exclude", "layer4"), "every form is FP32"),
        (("--fp16", "--int8-exclude", "layer4"), "no INT8 form"),
        (("--atol", "mask:1"), "mask"),
        (("--rtol", "much"), "much"),
    ]
    for arguments, word in cases:
        status, out, err = run(*common, *arguments)
        assert status == 2, err
        assert word in " ".join(err.split())
        assert "Traceback" not in out + err
