"""The whole path on the bundled trained models: forms, evidence, resuming, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from edgeattn.deploy import pipeline
from edgeattn.deploy.files import compare_files, rewrite_file
from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.models import MODELS


def assert_passed(record: dict) -> None:
    """Assert the verdict, and show the reasons where it is another."""
    reasons = [check["reasons"] for check in [*record["forms"], *record["sizes"]]]
    assert record["verdict"] == "PASS", reasons


@pytest.fixture(scope="module")
def ccnet_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportRun]:
    """A static CCNet run with every form, for a target that takes no function bodies."""
    folder = tmp_path_factory.mktemp("run") / "ccnet"
    request = ExportRequest(
        "ccnet-digits", fp16=True, int8=True, plugins=True, target="jetpack-6.2-orin", sample_count=12
    )
    run = ExportRun(request, folder)
    assert_passed(run.run())
    return folder, run


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def test_every_form_and_the_evidence_are_written(ccnet_run: tuple[Path, ExportRun]) -> None:
    folder, _ = ccnet_run
    names = {path.name for path in folder.iterdir()}
    models = {f"model{kind}{precision}.onnx" for kind in ("", ".plugin") for precision in ("", ".fp16", ".int8")}
    stripped = {f"model.plugin{precision}.stripped.onnx" for precision in ("", ".fp16", ".int8")}
    assert names == models | stripped | {"manifest.json", "parity.json", "report.html", "load_report.json"}
    for name in models | stripped:
        model = onnx.load(folder / name)
        onnx.checker.check_model(model)
        assert model.ir_version == 10
        plugin = "plugin" in name
        assert ("CrissCrossAttention" in operators(folder / name)) == plugin
        assert bool(model.functions) == (plugin and "stripped" not in name)
    assert "QuantizeLinear" in operators(folder / "model.int8.onnx")


def test_evidence_says_what_the_target_takes(ccnet_run: tuple[Path, ExportRun]) -> None:
    folder, _ = ccnet_run
    support = json.loads((folder / "parity.json").read_text())["support"]
    plain = [f"model{precision}.onnx" for precision in ("", ".fp16", ".int8")]
    stripped = [f"model.plugin{precision}.stripped.onnx" for precision in ("", ".fp16", ".int8")]
    assert sorted(report["model"] for report in support) == sorted(plain + stripped)
    assert {(report["target"], report["verdict"]) for report in support} == {("jetpack-6.2-orin", "accepted")}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What TensorRT takes" in page
    assert "for jetpack-6.2-orin." in page


def test_evidence_says_what_was_measured(ccnet_run: tuple[Path, ExportRun]) -> None:
    folder, run = ccnet_run
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["verdict"] == "PASS"
    assert "nothing here ran on TensorRT" in parity["status"]
    assert {entry["form"]["name"] for entry in parity["forms"]} == {
        *("fp32", "fp32 plugin", "fp16", "fp16 plugin", "int8", "int8 plugin")
    }
    report = (folder / "report.html").read_text()
    assert "http://" not in report
    assert "https://" not in report
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["run"]["calibration"]["samples"] >= 8
    assert manifest["run"]["target"] == "jetpack-6.2-orin"
    # Q/DQ with FP16 scales exist from opset 19 on; the user is told.
    assert any("19" in note for note in run.notes["int8"])


def test_rerun_resumes_and_repairs(ccnet_run: tuple[Path, ExportRun], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first = ccnet_run
    second = ExportRun(first.request, folder)
    second.run()
    assert set(second.directory.skipped) == set(second.directory.manifest["stages"])  # type: ignore[arg-type]
    (folder / "model.fp16.onnx").write_bytes(b"damaged")
    third = ExportRun(first.request, folder)

    def no_export(*_: object, **__: object) -> None:
        raise AssertionError("the export stage was repeated")

    monkeypatch.setattr(pipeline, "to_onnx", no_export)
    third.make_forms()
    assert set(third.directory.skipped) == set(third.directory.manifest["stages"]) - {"inline-fp16", "compare"}  # type: ignore[arg-type]
    onnx.checker.check_model(onnx.load(folder / "model.fp16.onnx"))


def test_a_killed_stage_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.onnx, "save", killed)
    run = ExportRun(ExportRequest("ccnet-digits", plugins=True, sample_count=1), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.make_forms()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]


def test_cosnet_dynamic_passes_at_odd_sizes(tmp_path: Path) -> None:
    request = ExportRequest(
        "cosnet-digits", dynamic=True, sample_count=4, extra_sizes=((97, 113), (129, 161), (96, 128))
    )
    record = ExportRun(request, tmp_path / "run").run()
    assert_passed(record)
    assert len(record["sizes"]) == 3
    assert all(check["skipped"] is None for check in record["sizes"])
    assert all(error <= 1e-5 for check in record["sizes"] for error in check["relative_l2"].values())
    # Without --plugins the plugin form is an intermediate.
    assert {path.name for path in (tmp_path / "run").glob("*.onnx")} == {"model.onnx"}


def test_images_and_calibration_of_the_user(tmp_path: Path) -> None:
    spec = MODELS.get("ccnet-digits")
    assert spec.samples is not None
    (tmp_path / "images").mkdir()
    for index, sample in enumerate(spec.samples(8)):
        Image.fromarray(sample.images[0]).save(tmp_path / "images" / f"{index}.png")
    request = ExportRequest(
        "ccnet-digits", int8=True, calibration=tmp_path / "images", images=tmp_path / "images", sample_count=3
    )
    run = ExportRun(request, tmp_path / "run")
    record = run.run()
    assert record["samples"] == 3
    assert {entry["form"]["name"]: entry["verdict"] for entry in record["forms"]}["fp32"] == "PASS"
    fingerprint = run.directory.manifest["run"]["calibration"]["sha256"]  # type: ignore[index]
    arrays = np.concatenate([spec.network_inputs(sample)["image"] for sample in spec.samples(8)])
    np.savez(tmp_path / "images.npz", image=arrays)
    other = ExportRun(
        ExportRequest("ccnet-digits", int8=True, calibration=tmp_path / "images.npz", sample_count=1), tmp_path / "npz"
    )
    assert other.calibration is not None
    assert other.calibration.fingerprint == fingerprint


def test_files_are_compared_and_rewritten(ccnet_run: tuple[Path, ExportRun], tmp_path: Path) -> None:
    folder, _ = ccnet_run
    result = rewrite_file(folder / "model.onnx", tmp_path / "rewritten.onnx")
    assert [replacement.operation for replacement in result.accepted] == ["CrissCrossAttention"] * 2
    files = [tmp_path / "rewritten.onnx", folder / "model.int8.onnx", folder / "model.plugin.fp16.onnx"]
    record = compare_files("ccnet-digits", "bundled", files, sample_count=3, output=tmp_path / "evidence")
    assert [entry["form"]["precision"] for entry in record["forms"]] == ["fp32", "int8", "fp16"]
    assert [entry["form"]["plugin"] for entry in record["forms"]] == [True, False, True]
    assert record["forms"][0]["verdict"] == "PASS", record["forms"][0]["reasons"]
    assert (tmp_path / "evidence" / "report.html").exists()


@pytest.mark.parametrize("model", ["ccnet-digits", "cosnet-digits"])
@pytest.mark.parametrize("size", [(97, 113), (129, 161)], ids=str)
def test_static_forms_at_odd_sizes(model: str, size: tuple[int, int], tmp_path: Path) -> None:
    request = ExportRequest(model, size=size, plugins=True, sample_count=3)
    record = ExportRun(request, tmp_path / "run").run()
    assert_passed(record)
    for entry in record["forms"]:
        assert all(error["worst_relative_l2"] <= 1e-5 for error in entry["outputs"].values())
    shape = onnx.load(tmp_path / "run" / "model.onnx").graph.input[0].type.tensor_type.shape
    assert tuple(dim.dim_value for dim in shape.dim) == (1, 3, *size)
