"""The device package without TensorRT: ONNX Runtime as the engine, fake boards, real bindings over fakes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgeattn.deploy.device import archive, bench, sensors
from edgeattn.deploy.device import manifest as manifests
from edgeattn.deploy.device.__main__ import main
from edgeattn.deploy.device.build import LIBRARY, plugin_library
from edgeattn.deploy.device.doctor import doctor
from edgeattn.deploy.device.errors import DeviceError
from edgeattn.deploy.device.golden import Comparison, Golden, read_golden
from edgeattn.deploy.device.pictures import read_image, read_video
from edgeattn.deploy.device.system import Finished, Gpu, System
from edgeattn.deploy.device.workspace import Workspace

HEIGHT, WIDTH = 8, 10
LIMITS = {"relative_l2": 1e-5, "label_agreement": 0.995, "task_drop": 0.01}
ORT = ("--engine", "onnxruntime")


def small_model(scale: float = 1.0, *, half: bool = False) -> bytes:
    """Return a 1x1 convolution from three channels to three scores."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weight = (scale * np.eye(3)).reshape(3, 3, 1, 1).astype(np.float16 if half else np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight"], ["logits"], "conv")],
        "graph",
        [helper.make_tensor_value_info("image", kind, [1, 3, HEIGHT, WIDTH])],
        [helper.make_tensor_value_info("logits", kind, [1, 3, HEIGHT, WIDTH])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def golden_bytes(seed: int, **extra: np.ndarray) -> bytes:
    image = np.random.default_rng(seed).standard_normal((1, 3, HEIGHT, WIDTH)).astype(np.float32)
    labels = image.argmax(1)[:, None].astype(np.int16)
    stream = io.BytesIO()
    np.savez(stream, **{"input/image": image, "output/logits": image, "labels": labels, **extra})
    return stream.getvalue()


def write_bundle(folder: Path, *, plugin_nodes: int = 0, members: Mapping[str, bytes] = {}, **target: Any) -> Path:
    """Write the archive of a tiny model and return its path."""
    files = {
        "model/fp32.onnx": small_model(),
        "model/fp16.onnx": small_model(half=True),
        **{f"golden/{index:03}.npz": golden_bytes(index) for index in range(2)},
        "plugins/cpp/CMakeLists.txt": b"cmake",
        "timing.cache": b"carried",
        **members,
    }
    figures = {"name": "jetpack-6.2-orin-nx-16", "tensorrt": [10, 3], "tensorrt_full": "10.3.0.30", "cuda": [12, 6]}
    precision = {"form": "plain", "plugin_nodes": plugin_nodes, "profiles": [], "tolerance": LIMITS}
    rule = {"colour_order": "RGB", "scale": 1 / 255, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {
        "kind": manifests.KIND,
        "format": manifests.FORMAT,
        "created_with": {},
        "licence": {},
        "model": {
            "name": "tiny",
            "inputs": ["image"],
            "outputs": [{"name": "logits", "meaning": "logits"}],
            "classes": ["a", "b", "c"],
            "preprocessing": rule,
            "size": [HEIGHT, WIDTH],
        },
        "target": {**figures, "sm": 87, "software": "jetpack-6.2", **target},
        "precisions": {
            "fp32": {**precision, "model": "model/fp32.onnx"},
            "fp16": {**precision, "model": "model/fp16.onnx", "tolerance": {**LIMITS, "relative_l2": 1e-2}},
        },
        "golden": {"samples": [{"file": f"golden/{index:03}.npz", "index": index} for index in range(2)]},
        "plugins": {} if plugin_nodes else None,
        "timing_cache": "timing.cache",
        "provenance": {},
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    parts = [(manifests.MANIFEST, manifests.sealed(content)), *sorted(files.items())]
    path = folder / "tiny.tar"
    path.write_bytes(
        b"".join(archive.header(name, len(data)) + data + bytes(archive.padding(len(data))) for name, data in parts)
        + archive.END
    )
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An unpacked bundle."""
    with write_bundle(tmp_path).open("rb") as stream:
        archive.unpack(stream, tmp_path / "tiny")
    return tmp_path / "tiny"


def device(bundle: Path, command: str, *arguments: str, system: System | None = None) -> int:
    return main([command, "--bundle", str(bundle), *arguments], system)


def record_of(bundle: Path, name: str) -> dict[str, Any]:
    return json.loads((bundle / "work" / f"{name}.json").read_text())


# Fake boards.


def put(root: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def board(root: Path, name: str) -> System:
    """Return an Orin or a Thor: files as their sysfs has them, and the programs that doctor asks."""
    zones, gpu = "sys/class/thermal/thermal_zone", "sys/class/devfreq"
    put(
        root,
        {
            "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB",
            f"{zones}0/type": "cpu-thermal",
            f"{zones}0/temp": 48500,
            f"{zones}1/type": "cv0-thermal",
            f"{zones}1/temp": "",  # switched off
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": 1984000,
            "sys/class/hwmon/hwmon0/name": "pwmfan",
        },
    )
    monitor = "sys/class/hwmon/hwmon1"
    if name == "orin":
        rails = [("VDD_IN", 5000, 1800), ("VDD_CPU_GPU_CV", 5000, 600), ("VDD_SOC", 5000, 400)]
        release, model, jetpack, tensorrt, sm, cuda = "36", "Orin NX", "6.2.1+b38", "10.3.0.30-1+cuda12.5", 87, (12, 6)
        put(root, {f"{gpu}/17000000.gpu/cur_freq": 918000000})
    else:
        rails = [("VDD_GPU", 12000, 2000), ("VDD_CPU_SOC_MSS", 12000, 1000), ("VIN_SYS_5V0", 5000, 800)]
        release, model, jetpack, tensorrt, sm, cuda = "38", "AGX Thor", "7.0-b128", "10.13.3.9-1+cuda13.0", 110, (13, 0)
        put(root, {f"{gpu}/gpu-gpc-0/cur_freq": 1575000000, f"{gpu}/gpu-nvd-0/cur_freq": 1000000000})
        vin = "sys/class/hwmon/hwmon2"
        put(root, {f"{vin}/name": "ina238", f"{vin}/in1_input": 20000, f"{vin}/curr1_input": 3000})
        put(root, {f"{vin}/power1_input": 61000000})
    put(root, {f"{monitor}/name": "ina3221", "proc/device-tree/model": f"NVIDIA Jetson {model}\0"})
    for channel, (label, volts, amperes) in enumerate(rails, 1):
        for kind, value in (
            (f"in{channel}_label", label),
            (f"in{channel}_input", volts),
            (f"curr{channel}_input", amperes),
        ):
            put(root, {f"{monitor}/{kind}": value})
    put(
        root, {"etc/nv_tegra_release": f"# R{release} (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64"}
    )
    answers = {
        ("nvpmodel", "-q"): "NV Power Mode: MAXN\n0",
        ("cmake", "--version"): "cmake version 3.22.1",
        ("dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"): jetpack,
        ("dpkg-query", "-W", "-f", "${Version}", "libnvinfer10"): tensorrt,
    }

    def run(command: Sequence[str]) -> Finished | None:
        return Finished(0, answers[tuple(command)]) if tuple(command) in answers else Finished(1, "no such package")

    return System(root, run, lambda: Gpu(model, sm, cuda), lambda folder: 10 << 30)


def statuses(record: Mapping[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["status"] for finding in record["findings"]}


def test_doctor_on_the_board_the_bundle_is_for(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device(bundle, "doctor", system=board(tmp_path / "root", "orin")) == 0
    record = record_of(bundle, "doctor")
    assert set(statuses(record).values()) == {"ok"}
    assert record["l4t"] == "36.4.3"
    assert record["board"] == "NVIDIA Jetson Orin NX"
    assert record["power_mode"] == "NV Power Mode: MAXN\n0"
    assert record["clocks_mhz"] == {"cpu policy0": 1984.0, "17000000.gpu": 918.0}
    assert record["temperatures_c"] == {"cpu-thermal": 48.5}
    assert record["power_rails"] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert "JetPack" in capsys.readouterr().out


def test_doctor_on_another_board_fails_with_reasons(bundle: Path, tmp_path: Path) -> None:
    assert device(bundle, "doctor", system=board(tmp_path / "root", "thor")) == 1
    record = record_of(bundle, "doctor")
    found = statuses(record)
    assert (found["TensorRT"], found["GPU"], found["JetPack"], found["CUDA driver"]) == ("fail", "fail", "warn", "ok")
    assert all(finding["advice"] for finding in record["findings"] if finding["status"] in ("fail", "warn"))
    assert record["l4t"] == "38.4.3"


def test_doctor_where_nothing_is_known_or_left(bundle: Path, tmp_path: Path) -> None:
    bare = System(tmp_path / "nowhere", lambda command: None, lambda: None, lambda folder: 100)
    found = statuses(doctor(Workspace.open(bundle, system=bare)))
    assert (found["GPU"], found["JetPack"], found["free memory"], found["free disk"]) == (
        "fail",
        "unknown",
        "unknown",
        "fail",
    )


@pytest.mark.parametrize(
    ("name", "watts", "scope"), [("orin", 9.0, "the rail VDD_IN"), ("thor", 61.0, "the rail VIN,")]
)
def test_power_is_that_of_the_rail_for_everything(tmp_path: Path, name: str, watts: float, scope: str) -> None:
    system = board(tmp_path, name)
    with sensors.Recorder(system, interval=0.005) as recorder:
        pass
    record = recorder.record(frames=4)
    assert record["mean_w"] == pytest.approx(watts)
    assert record["energy_per_frame_j"] == pytest.approx(watts * record["seconds"] / 4)
    assert scope in record["scope"]
    assert record["hottest_c"] == {"cpu-thermal": 48.5}


def test_power_is_integrated_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, moments = board(tmp_path, "orin"), iter((10.0, 12.0))
    monkeypatch.setattr(sensors, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    recorder = sensors.Recorder(system, interval=60)
    with recorder:
        put(tmp_path, {"sys/class/hwmon/hwmon1/curr1_input": 600})  # from 9 W to 3 W within 2 s
    assert recorder.record(frames=3)["energy_per_frame_j"] == pytest.approx(4.0)
    assert recorder.record(frames=3)["mean_w"] == pytest.approx(6.0)


def test_boards_without_a_total_rail_say_what_the_sum_covers(tmp_path: Path) -> None:
    system = board(tmp_path, "thor")
    shutil.rmtree(tmp_path / "sys/class/hwmon/hwmon2")
    with sensors.Recorder(system, interval=60) as recorder:
        pass
    record = recorder.record(frames=1)
    assert record["mean_w"] == pytest.approx(24 + 12 + 4)
    assert "the sum of VDD_GPU, VDD_CPU_SOC_MSS, VIN_SYS_5V0" in record["scope"]


# Build, verify, bench and run, with ONNX Runtime as the engine.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_build_verify_and_bench(bundle: Path, tmp_path: Path, precision: str) -> None:
    chosen = (*ORT, "--precision", precision)
    system = board(tmp_path / "root", "orin")
    assert device(bundle, "verify", *chosen) == 2  # nothing is built yet
    assert device(bundle, "build", *chosen) == 0
    assert device(bundle, "verify", *chosen) == 0
    record = record_of(bundle, f"verify.{precision}")
    assert record["verdict"] == "PASS"
    assert record["label_agreement"] == 1.0
    assert record["samples"] == 2
    assert 0 <= record["outputs"]["logits"]["worst_relative_l2"] <= record["limits"]["relative_l2"]
    arguments = (*chosen, "--warm-up", "0", "--runs", "120")
    assert device(bundle, "bench", *arguments, system=system) == 0
    record = record_of(bundle, f"bench.{precision}")
    assert "not TensorRT" in record["measured"]
    latency = record["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["p99.9"] is None  # 120 runs say nothing of it
    assert record["runs"] == 120
    assert record["frames_per_second"] == pytest.approx(1e3 / record["mean_ms"], rel=0.5)
    assert record["power"]["mean_w"] == pytest.approx(9.0)
    assert record["power"]["energy_per_frame_j"] > 0


def test_percentiles_are_those_of_the_runs() -> None:
    found = bench.percentiles([number / 1e3 for number in range(1001)])
    assert found == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "p99.9": pytest.approx(999.0)}


def test_wrong_model_fails_with_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with write_bundle(tmp_path, members={"model/fp32.onnx": small_model(-1.0)}).open("rb") as stream:
        archive.unpack(stream, tmp_path / "tiny")
    chosen = (*ORT, "--precision", "fp32")
    assert device(tmp_path / "tiny", "build", *chosen) == 0
    assert device(tmp_path / "tiny", "verify", *chosen) == 1
    record = record_of(tmp_path / "tiny", "verify.fp32")
    assert record["verdict"] == "FAIL"
    assert record["outputs"]["logits"]["worst_relative_l2"] == pytest.approx(2.0)
    assert record["original_score"] == 1.0
    assert len(record["reasons"]) == 3
    assert "FAIL: output logits: relative L2 2.00e+00 exceeds 1.00e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: np.where(value > 2, np.nan, value), "NaN or infinite"),
        (lambda value: value * np.nan, "no value is finite"),
        (lambda value: value * (1 + 2e-5), "relative L2"),
    ],
)
def test_comparison_finds(change: Callable[[np.ndarray], np.ndarray], reason: str) -> None:
    value = np.random.default_rng(0).standard_normal((1, 3, 40, 40)).astype(np.float32)
    golden = Golden({}, {"logits": value}, value.argmax(1)[:, None], None)
    comparison = Comparison(3, (40, 40), [{"name": "logits", "meaning": "logits"}])
    comparison.add(golden, {"logits": change(value)})
    assert any(reason in text for text in comparison.judge(LIMITS)["reasons"])
    with pytest.raises(DeviceError, match="no output 'logits'"):
        comparison.add(golden, {"other": value})


def test_build_is_resumed_by_content(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (*ORT, "--precision", "fp32")
    built = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: (bundle / "work/fp32.onnxruntime.engine").write_bytes(b"damaged"),
        lambda: (bundle / "work/fp32.onnxruntime.engine.json").write_text("{"),
        lambda: monkeypatch.setattr("onnxruntime.__version__", "0.0"),
        lambda: None,
    ):
        change()
        assert device(bundle, "build", *chosen) == 0
        built.append(record_of(bundle, "build.fp32")["built"])
    assert built == [True, False, True, True, True, False]
    assert (bundle / "work/timing.onnxruntime.cache").read_bytes() == b"carried"


def test_masks(bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.ppm").write_bytes(f"P6\n{WIDTH} {HEIGHT}\n255\n".encode() + pixels.tobytes())
    np.save(images / "b.npy", pixels[::-1])
    chosen = (*ORT, "--precision", "fp32")
    assert device(bundle, "build", *chosen) == 0
    for form in ("pgm", "npy", "png"):
        assert device(bundle, "run", *chosen, "-o", str(tmp_path / "masks"), "--format", form, str(images)) == 0
    expected = pixels.argmax(2).astype(np.uint8)
    np.testing.assert_array_equal(np.load(tmp_path / "masks/a.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "masks/b.npy"), expected[::-1])
    assert (tmp_path / "masks/a.pgm").read_bytes() == f"P5\n{WIDTH} {HEIGHT}\n255\n".encode() + expected.tobytes()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks/a.png")), expected)
    larger = Image.fromarray(pixels).resize((2 * WIDTH, 2 * HEIGHT))
    larger.save(images / "c.png")
    assert read_image(images / "c.png", (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_masks_of_a_video(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = np.random.default_rng(4).integers(0, 256, (5, 2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    lossless = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{2 * WIDTH}x{2 * HEIGHT}", "-i", "-", "-c:v", "ffv1")
    video = tmp_path / "clip.mkv"
    encode = ["ffmpeg", "-v", "error", *lossless, "-pix_fmt", "bgr0", str(video)]
    subprocess.run(encode, input=frames.tobytes(), check=True)
    np.testing.assert_array_equal(np.stack(list(read_video(video))), frames)
    chosen = (*ORT, "--precision", "fp32")
    assert device(bundle, "build", *chosen) == 0
    assert device(bundle, "run", *chosen, "-o", str(tmp_path / "masks"), "--format", "npy", str(video)) == 0
    assert record_of(bundle, "run.fp32")["masks"] == [f"clip_{number:06}.npy" for number in range(1, 6)]
    small = np.asarray(Image.fromarray(frames[4]).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(np.load(tmp_path / "masks/clip_000005.npy"), small.argmax(2))
    video.write_bytes(b"no video")
    assert device(bundle, "run", *chosen, "-o", str(tmp_path / "masks"), str(video)) == 2
    assert "ffmpeg cannot read" in capsys.readouterr().err


def test_a_video_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nprintf 'P6\\n1 1\\n255\\nabcP6\\n1 1\\n255\\nd'; echo cut off >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    frames = read_video(tmp_path / "clip.mp4")
    np.testing.assert_array_equal(next(frames), [[list(b"abc")]])
    with pytest.raises(DeviceError, match="cut off"):
        next(frames)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match="apt install ffmpeg"):
        next(read_video(tmp_path / "clip.mp4"))


def test_bad_arguments(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = (*ORT, "--precision", "fp32")
    (tmp_path / "bad.ppm").write_bytes(b"P6\n10 10\n255\n short")
    assert device(bundle, "build", *chosen) == 0
    masks = ("-o", str(tmp_path / "masks"))
    for arguments, message in (
        (("build", *ORT), "no precision is named"),
        (("build", *ORT, "--precision", "int8"), "no precision 'int8'"),
        (("build", "--engine", "magic", "--precision", "fp32"), "no engine 'magic'"),
        (("run", *chosen, *masks, str(tmp_path / "none.png")), "does not exist"),
        (("run", *chosen, *masks, str(tmp_path / "bad.ppm")), "no image that can be read"),
        (("run", *chosen, *masks, "--format", "gif", str(tmp_path / "bad.ppm")), "no format 'gif'"),
    ):
        assert device(bundle, *arguments) == 2
        assert message in capsys.readouterr().err
    if "tensorrt" not in sys.modules:
        assert device(bundle, "build", "--precision", "fp32") == 2
        assert "tensorrt" in capsys.readouterr().err


# Files that were changed, full disks, kills.


def test_changed_folders_are_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device(bundle, "check") == 0
    (bundle / "work").mkdir()
    (bundle / "work" / "anything").write_text("results of the device")
    assert device(bundle, "check") == 0
    original = (bundle / "model/fp32.onnx").read_bytes()

    def refused(message: str) -> None:
        assert device(bundle, "check") == 2
        assert message in capsys.readouterr().err

    (bundle / "extra.py").write_text("print()")
    refused("extra.py is not part of the bundle")
    (bundle / "extra.py").unlink()
    (bundle / "model/fp32.onnx").write_bytes(original[:-1] + b"x")
    refused("it was changed")
    (bundle / "model/fp32.onnx").unlink()
    refused("is missing")
    (bundle / "model/fp32.onnx").symlink_to("/etc/hostname")
    refused("is a link")
    (bundle / "manifest.json").write_text("{}")
    refused("is not that of an edgeattn bundle")
    assert main(["check", "--bundle", str(bundle / "nowhere")]) == 2


def test_golden_samples_hold_no_objects(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, labels=np.array([Evil()], dtype=object))
    (tmp_path / "evil.npz").write_bytes(stream.getvalue())
    with pytest.raises(DeviceError, match="no golden sample"):
        read_golden(tmp_path / "evil.npz")
    np.savez_compressed(tmp_path / "bomb.npz", labels=np.zeros(10**6))
    with pytest.raises(DeviceError, match="compressed"):
        read_golden(tmp_path / "bomb.npz")
    assert not (tmp_path / "executed").exists()


def test_full_disk_leaves_nothing_half_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = (*ORT, "--precision", "fp32")
    assert device(bundle, "build", *chosen) == 0
    assert device(bundle, "verify", *chosen) == 0
    before = {path: path.read_bytes() for path in (bundle / "work").iterdir()}

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgeattn.deploy.device.files.os.fsync", full)
    assert device(bundle, "verify", *chosen) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (bundle / "work").iterdir()} == before
    data = (tmp_path / "tiny.tar").read_bytes()
    monkeypatch.setattr(Path, "open", lambda *rest, **more: full(None))
    with pytest.raises(DeviceError, match="No space left"):
        archive.unpack(io.BytesIO(data), tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.tar"]


def killed_at(bundle: Path, place: str, call: int, *arguments: str) -> None:
    """Run a command in a process that kills itself, without warning, where a function is called for the n-th time."""
    code = (
        "import importlib, itertools, os, signal, sys\n"
        f"sys.path.insert(0, {str(bundle.parent / 'package')!r})\n"
        "from edgeattn_device.__main__ import main\n"
        f"module, name = {place!r}.split('.')\n"
        "module, calls = importlib.import_module('edgeattn_device.' + module), itertools.count(1)\n"
        "function = getattr(module, name)\n"
        "def counted(*rest, **more):\n"
        f"    if next(calls) == {call}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return function(*rest, **more)\n"
        "setattr(module, name, counted)\n"
        f"main({list(arguments)!r})\n"
    )
    package = bundle.parent / "package" / "edgeattn_device"
    if not package.exists():
        shutil.copytree(Path(archive.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_while_unpacking(bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    members = len(json.loads((bundle / "manifest.json").read_text())["files"])
    arguments = ("unpack", str(tmp_path / "tiny.tar"), "-o", str(again))
    # A header is computed once for each file when all is checked, and once more when it is written.
    for call in (1, members + 1, members + 3, 2 * members + 2):
        killed_at(bundle, "archive.header", call, *arguments)
        assert not again.exists()
    assert len(list(tmp_path.glob(".edgeattn-tmp-*"))) == 1
    assert main(list(arguments)) == 0
    assert not list(tmp_path.glob(".edgeattn-tmp-*"))
    assert device(again, "check") == 0


def test_killed_at_every_stage_of_a_build(bundle: Path) -> None:
    chosen = (*ORT, "--precision", "fp32")
    # After nothing, before the engine, before the engine's record, while the record is written.
    for place, call in (
        ("build.write_bytes", 1),
        ("build.write_bytes", 2),
        ("build.write_json", 1),
        ("files.write_bytes", 1),
    ):
        killed_at(bundle, place, call, "build", "--bundle", str(bundle), *chosen)
        assert not (bundle / "work" / "fp32.onnxruntime.engine.json").exists()
        assert device(bundle, "verify", *chosen) == 2
    assert device(bundle, "build", *chosen) == 0
    assert device(bundle, "verify", *chosen) == 0
    killed_at(bundle, "workspace.write_json", 1, "verify", "--bundle", str(bundle), *chosen)
    assert record_of(bundle, "verify.fp32")["verdict"] == "PASS"  # the one before
    (bundle / "work" / ".edgeattn-tmp-left").write_text("half")
    assert device(bundle, "verify", *chosen) == 0
    assert not list((bundle / "work").rglob(".edgeattn-tmp-*"))


# The plugin library, and TensorRT.


def test_plugin_library_is_compiled_once(tmp_path: Path) -> None:
    with write_bundle(tmp_path, plugin_nodes=1).open("rb") as stream:
        archive.unpack(stream, tmp_path / "tiny")
    commands: list[Sequence[str]] = []
    outcomes: list[Finished | None] = [Finished(0, "")]

    def run(command: Sequence[str]) -> Finished | None:
        commands.append(command)
        made = tmp_path / "tiny/work/plugins/build"
        if outcomes[0] == Finished(0, "") and "--build" in command:
            put(made, {LIBRARY: "library"})
        return outcomes[0]

    workspace = Workspace.open(tmp_path / "tiny", system=System(tmp_path, run))
    library = plugin_library(workspace, print)
    assert library.read_text() == "library\n"
    sources, build = str(tmp_path / "tiny/plugins"), str(tmp_path / "tiny/work/plugins/build")
    assert commands == [
        ("cmake", "-S", f"{sources}/cpp", "-B", build, f"-DEDGEATTN_KERNELS={sources}/kernels"),
        ("cmake", "--build", build),
    ]
    plugin_library(workspace, print)
    assert len(commands) == 2
    library.write_text("damaged")
    for outcome, message in ((Finished(1, "no such header"), "no such header"), (None, "sudo apt install cmake")):
        outcomes[0] = outcome
        with pytest.raises(DeviceError, match=message):
            plugin_library(workspace, print)


WALK = """
import sys, warnings
from pathlib import Path
from unittest import mock
warnings.simplefilter("ignore")
import numpy.typing
import numpy as np
import tensorrt as trt
from tensorrt_fakes import REAL, constructor, fake
from edgeattn_device import tensorrt_engine
from edgeattn_device.engines import BuildRequest
from edgeattn_device.errors import DeviceError
from edgeattn_device.system import Gpu

asked = {}
def note(what, *values):
    asked.setdefault(what, []).append([str(value) for value in values])

def network(plugins):
    kinds = [trt.LayerType.CONVOLUTION] + [trt.LayerType.PLUGIN_V3] * plugins
    layers = [fake(trt.ILayer, type=kind, num_outputs=0) for kind in kinds]
    image = fake(trt.ITensor, name="image", dtype=trt.DataType.FLOAT, shape=(-1, 3, -1, -1), is_shape_tensor=False)
    return fake(
        trt.INetworkDefinition, num_inputs=1, get_input=lambda index: image, num_layers=len(layers),
        get_layer=lambda index: layers[index], __getitem__=layers.__getitem__,
    )

def builder(logger):
    current = []
    def cache(data):
        note("cache", len(data))
        return fake(trt.ITimingCache, serialize=lambda: b"measured")
    def set_cache(cache, ignore_mismatch):
        accepted = not mismatch or "refused" in asked
        note("set cache" if accepted else "refused")
        current.extend([cache] if accepted else [])
        return accepted
    config = fake(
        trt.IBuilderConfig,
        set_flag=lambda flag: note("set", flag.name),
        clear_flag=lambda flag: note("clear", flag.name),
        create_timing_cache=cache,
        set_timing_cache=set_cache,
        get_timing_cache=lambda: current[-1] if current else None,
        add_optimization_profile=lambda profile: 0,
    )
    def create_network(flags=0):
        known = trt.NetworkDefinitionCreationFlag.__members__.items()
        note("flags", [name for name, flag in known if flags >> int(flag) & 1])
        return network(plugins)
    def build(network, config):
        config.progress_monitor.phase_start("Building", None, 3)
        config.progress_monitor.step_complete("Building", 0)
        config.progress_monitor.phase_finish("Building")
        return None if fails else b"engine"
    def set_shape(name, *shapes):
        note("shapes", name, *[list(shape) for shape in shapes])
    profile = lambda: fake(trt.IOptimizationProfile, set_shape=set_shape)
    return fake(
        REAL.Builder, create_network=create_network, create_builder_config=lambda: config,
        create_optimization_profile=profile, build_serialized_network=build,
    )

def parser(network, logger):
    def error(text):
        return fake(trt.ParserError, node_name=lambda: "conv", node_operator=lambda: "Conv", desc=lambda: text)
    return fake(
        REAL.OnnxParser,
        parse_from_file=lambda path: not refused,
        num_errors=len(refused),
        get_error=lambda index: error(refused[index]),
    )

plugins, refused, fails, mismatch = 1, [], False, False
registry = fake(trt.IPluginRegistry, load_library=lambda path: note("library", Path(path).name))
patches = [
    mock.patch.object(trt, "Builder", constructor(REAL.Builder, builder)),
    mock.patch.object(trt, "OnnxParser", constructor(REAL.OnnxParser, parser)),
    mock.patch.object(trt, "get_plugin_registry", lambda: registry),
    mock.patch.object(tensorrt_engine, "first_gpu", lambda: Gpu("Orin", 87, (12, 6))),
]
for patch in patches:
    patch.start()
backend = tensorrt_engine.backend()
folder = Path(folder)
(folder / "cache").write_bytes(b"carried")
shapes = {"image": [[1, 3, 8, 8], [1, 3, 16, 16], [4, 3, 32, 32]]}
request = BuildRequest(folder / "model.onnx", 1, folder / "lib.so", (shapes,), folder / "cache")
lines = []
built = backend.build(request, lines.append)
result = {
    "asked": {name: [*calls] for name, calls in asked.items()}, "lines": lines,
    "data": built.data.decode(), "cache": built.timing_cache.decode(),
    "notes": built.notes, "identity": backend.identity(), "measured": backend.measured(), "refusals": [],
}
names = ["image", "logits"]
engine = fake(
    trt.ICudaEngine, num_io_tensors=2, get_tensor_name=lambda index: names[index],
    get_tensor_dtype=lambda name: trt.DataType.HALF,
    get_tensor_mode=lambda name: trt.TensorIOMode.INPUT if name == "image" else trt.TensorIOMode.OUTPUT,
    **{name: 4096 for name in ("device_memory_size", "device_memory_size_v2") if hasattr(trt.ICudaEngine, name)},
)
class Runner:
    def __init__(self, load, optimization_profile):
        self.engine, self.active = engine, None
    def activate(self):
        self.active = True
    def deactivate(self):
        self.active = False
    def infer(self, feed):
        assert self.active
        return {"logits": 2 * feed["image"]}
(folder / "engine").write_bytes(b"engine")
with mock.patch.object(tensorrt_engine, "TrtRunner", Runner):
    session = backend.load(folder / "engine", folder / "lib.so")
    outputs = session.run({"image": np.ones(2, np.float16)})
    result["session"] = [
        {name: str(kind) for name, kind in session.inputs.items()}, outputs["logits"].tolist(), session.memory()
    ]
    session.close()
mismatch = True
result["other cache"] = backend.build(request, lines.append).notes
for plugins, refused, fails in ((0, [], False), (1, ["unsupported padding"], False), (1, [], True)):
    try:
        backend.build(request, lines.append)
    except DeviceError as error:
        result["refusals"].append(str(error))
"""


def test_build_through_the_real_bindings(bindings: Any, tmp_path: Path) -> None:
    package = tmp_path / "package" / "edgeattn_device"
    shutil.copytree(Path(archive.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    tests = Path(__file__).parent.parent
    found = bindings.evaluate(WALK, python_path=[package.parent, tests], folder=str(tmp_path))
    assert (found["data"], found["cache"], found["notes"]) == ("engine", "measured", [])
    asked = found["asked"]
    assert asked["library"] == [["lib.so"]]
    assert "STRONGLY_TYPED" in asked["flags"][0][0]
    assert asked["shapes"] == [["image", "[1, 3, 8, 8]", "[1, 3, 16, 16]", "[4, 3, 32, 32]"]]
    assert asked["cache"] == [["7"]]
    assert not {"FP16", "INT8", "BF16", "TF32"} & {flag for (flag,) in asked.get("set", [])}
    assert ["TF32"] in asked["clear"]
    assert found["session"] == [{"image": "float16"}, [2.0, 2.0], {"context": 4096}]
    assert found["lines"][0] == "Building: 3 steps"
    assert found["identity"] == {"TensorRT": bindings.version, "GPU": "Orin", "SM": "87", "CUDA": "12.6"}
    assert found["measured"] == f"TensorRT {bindings.version} on Orin (sm_87)"
    assert "was not used" in found["other cache"][0]
    for refusal, words in zip(found["refusals"], ("made 0", "unsupported padding", "could not build"), strict=True):
        assert words in refusal
