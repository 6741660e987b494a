"""The page of a finished run, with what devices measured: results of other runs, damage and old records are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from edgeattn.cli.main import app
from edgeattn.deploy import run_report
from edgeattn.deploy.device import archive
from edgeattn.deploy.device.workspace import provenance_digest
from edgeattn.deploy.device_results import device_sections, read_results
from edgeattn.deploy.run_report import report_run
from edgeattn.foundation import UserError

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from report_samples import RUN, write_run, write_work
from test_device import ORT, board, device, write_bundle


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    (tmp_path / "run").mkdir()
    return write_run(tmp_path / "run")


@pytest.fixture
def work(run: Path, tmp_path: Path) -> Path:
    """What a board left."""
    return write_work(tmp_path / "orin-7" / "work", manifest_of(run))


def manifest_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_page_holds_the_run_its_analyses_and_the_devices(run: Path, work: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = report_run(run, [work], tmp_path / "page.html")
    page = done.path.read_text(encoding="utf-8")
    for expected in (
        "Sensitivity to INT8",
        "Error along the network: model.onnx",
        "Device orin-7: NVIDIA Jetson Orin NX",
        "10.3.0.30",  # doctor
        "2.35 MB",  # engine
        "41.5 s",
        "1.5e-03",  # verify
        "fp16, host",
        "81.23",
        "3.75 ms",  # bench
        "263.2",
        "11.25 W",
        "42.10 mJ",
        "context 12.35 MB",
        "17000000.gpu 918 MHz",
        "NV Power Mode: MAXN",
        "gpu-thermal 62 °C",
        "TensorRT 10.3.0 (imitated)",
        "Pictures before and after",
    ):
        assert expected in page, expected
    assert "<script" not in page
    assert "nothing here ran on TensorRT" not in page  # a device did
    assert "nothing here ran on TensorRT" in report_run(run, [], tmp_path / "p.html").path.read_text(encoding="utf-8")
    assert done.failed == ("parity of fp16", "parity of broken int8")
    assert len(done.notes) == 1
    assert "judged on holiday" in done.notes[0]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_layouts_are_those_of_the_device_programs(tmp_path: Path) -> None:
    """Every command of the device package, with a fake board and ONNX Runtime as the engine, gives what is read."""
    with write_bundle(tmp_path).open("rb") as stream:
        archive.unpack(stream, tmp_path / "tiny")
    bundle, system = tmp_path / "tiny", board(tmp_path / "root", "orin")
    assert device(bundle, "doctor", system=system) == 0
    for command, extra in (("build", ()), ("verify", ()), ("bench", ("--runs", "100", "--warm-up", "0"))):
        assert device(bundle, command, "--precision", "fp16", *ORT, *extra, system=system) == 0
    found = read_results(bundle / "work", provenance_digest({}))
    assert found.title == "tiny: NVIDIA Jetson Orin NX"
    assert [*found.builds] == [*found.verifies] == [*found.benches] == ["fp16"]
    latency, page = device_sections([found], {"forms": []})
    assert "ONNX Runtime" in latency.body
    assert "not TensorRT" in page.body
    assert "VDD_IN" in page.body


def test_a_failed_engine_is_said(run: Path, tmp_path: Path) -> None:
    first = write_work(tmp_path / "a", manifest_of(run))
    second = write_work(tmp_path / "b", manifest_of(run), verify="FAIL")
    done = report_run(run, [first, second], tmp_path / "page.html")
    assert done.failed[-1] == "fp16 on b: NVIDIA Jetson Orin NX"
    passing = json.loads((run / "parity.json").read_text())
    passing["forms"] = passing["forms"][:2]
    (run / "parity.json").write_text(json.dumps(passing))
    assert "parity PASS" in report_run(run, [first], tmp_path / "page.html").path.read_text(encoding="utf-8")
    assert "parity FAIL" in report_run(run, [second], tmp_path / "page.html").path.read_text(encoding="utf-8")
    assert "label agreement 90.000% is below 99.500%" in done.path.read_text(encoding="utf-8")


def test_results_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = write_work(tmp_path / "work", provenance={**manifest_of(run), "run": {"model": "another"}})
    with pytest.raises(UserError, match=r"bench\.fp16\.json is a result of another run"):
        report_run(run, [other], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("run"), "comes from an older release"),
        (lambda record: record.pop("latency_ms"), "latency_ms is missing"),
        (lambda record: record["latency_ms"].pop("p99"), "latency_ms.p99 is missing"),
        (lambda record: record.update(runs="many"), "runs is 'many'"),
        (lambda record: record.update(mean_ms=True), "mean_ms is True"),
        (lambda record: record["power"].update(hottest_c=[61]), "power.hottest_c is no dict"),
        (lambda record: record.update(mean_ms=float("nan")), "NaN is no number"),
        (lambda record: record.update(runs=10**400), "runs is 1000"),
        (lambda record: record["power"].update(mean_w=1e301), "power.mean_w is 1e+301"),
        (lambda record: record.update(precision="int8"), "renamed"),
        (lambda record: record.pop("command"), "no result of a command"),
    ],
)
def test_a_damaged_record_is_named(
    run: Path, work: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(work / "bench.fp16.json", change)
    with pytest.raises(UserError, match=r"bench\.fp16\.json") as caught:
        read_results(work, provenance_digest(manifest_of(run)))
    assert message in str(caught.value)


def test_other_files_are_named(run: Path, work: Path, tmp_path: Path) -> None:
    digest = provenance_digest(manifest_of(run))
    (work / "verify.fp16.json").write_text('{"command": "verify", "ru')
    with pytest.raises(UserError, match=r"verify\.fp16\.json is damaged"):
        read_results(work, digest)
    (work / "verify.fp16.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"verify\.fp16\.json is damaged"):
        read_results(work, digest)
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path / "nowhere", digest)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "empty", digest)


def test_runs_that_cannot_be_drawn_are_refused(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(UserError, match=r"report\.html is a file of the run"):
        report_run(run, [], run / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        report_run(run, [], tmp_path)
    edit(run / "sensitivity" / "sensitivity.int8.json", lambda record: record.update(model="cosnet-digits"))
    with pytest.raises(UserError, match="is about cosnet-digits"):
        report_run(run, [], output)
    edit(
        run / "sensitivity" / "sensitivity.int8.json", lambda record: (record.update(RUN["run"]), record.pop("samples"))
    )
    with pytest.raises(UserError, match=r"sensitivity\.int8\.json is damaged"):
        report_run(run, [], output)
    edit(run / "parity.json", lambda record: record["original"].pop("metric"))
    with pytest.raises(UserError, match="not recorded as this release does it"):
        report_run(run, [], output)
    edit(run / "manifest.json", lambda record: record["stages"].clear())
    with pytest.raises(UserError, match="is not finished"):
        report_run(run, [], output)
    (run / "parity.json").unlink()
    with pytest.raises(UserError, match=r"parity\.json cannot be read"):
        report_run(run, [], output)
    with pytest.raises(UserError, match="does not exist"):
        report_run(tmp_path / "nowhere", [], output)
    assert not output.exists()


def test_pictures_come_from_the_page_that_the_run_wrote(run: Path, tmp_path: Path) -> None:
    page = report_run(run, [], tmp_path / "page.html").path.read_text(encoding="utf-8")
    assert page.count("data:image/png") == (run / "report.html").read_text(encoding="utf-8").count("data:image/png") > 0
    (run / "report.html").write_text('<section id="pictures"><script></script></section>\n')
    done = report_run(run, [], tmp_path / "page.html")
    assert "data:image/png" not in done.path.read_text(encoding="utf-8")
    assert "report.html is not the page that the run wrote" in done.notes[-1]


def test_ranges_come_from_the_given_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model gets the images in its size, as many as are measured on, and the INT8 form where there is one."""
    given: dict[str, Any] = {}

    def measure(path: Path, feeds: Callable[[], Any], **options: Any) -> object:
        given.update(options, path=path, shapes=[feed["image"].shape for feed in feeds()])
        raise UserError("enough")

    monkeypatch.setattr(run_report, "measure_spans", measure)
    (tmp_path / "holiday").mkdir()
    for index in range(2):
        Image.new("RGB", (40, 30)).save(tmp_path / "holiday" / f"{index}.png")
    with pytest.raises(UserError, match="enough"):
        report_run(run, [], tmp_path / "page.html", images=tmp_path / "holiday")
    assert given["path"] == run / "model.onnx"
    assert (given["data"], given["int8"]) == ("holiday", None)
    assert given["shapes"] == [(1, 3, 128, 160)] * 2


def test_command(run: Path, work: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run), str(work), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 1, result.output  # two forms of the run fail
    assert "note: ranges of tensors are not measured" in " ".join(result.output.split())
    assert (tmp_path / "page.html").is_file()
