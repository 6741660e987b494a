"""`edgeattn build` up to TensorRT's door: machines, refusals, the prepared graph, records, types, cancellation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edgeattn.cli import build as cli_build
from edgeattn.cli.main import app
from edgeattn.export.engine import (
    BuildCancelled,
    BuildRequest,
    BuildResult,
    Configuration,
    PrecisionOptions,
    build,
    builder,
    machine,
)
from edgeattn.export.engine.graph import changes, prepare
from edgeattn.export.engine.machine import Gpu, Machine
from edgeattn.export.engine.monitor import PhaseLog, run_cancellable
from edgeattn.export.engine.precisions import check_precisions, inspected_precision, layers_of
from edgeattn.export.engine.record import engine_key, read_record, stale_reasons, write_record
from edgeattn.export.engine.timing_cache import cache_path
from edgeattn.export.precision_types import element_types
from edgeattn.export.surgery import attach_plugins
from edgeattn.foundation import UserError
from edgeattn.targets import TARGETS

HERE = Machine("10.3.0", Gpu("Orin", 87, "540.4, CUDA 12.6"))
ORIN = TARGETS.get("jetpack-6.2-orin")
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device == 7 ? "Orin" : "?", length); return 0; }
int cuDeviceGetAttribute(int *value, int number, int device) {
    *value = number == 75 ? 8 : number == 76 ? 7 : -1;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution with a dynamic batch."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, ["batch", 4, 16, 16])
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["image", "weight"], ["result"], "conv")]
    graph = helper.make_graph(nodes, "graph", [image], [result], [numpy_helper.from_array(weight, "weight")])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def driver_library(folder: Path, status: int) -> str:
    """Compile a CUDA driver that knows one device."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = folder / f"libcuda-{status}.so"
    command = ["gcc", "-shared", "-fPIC", f"-DSTATUS={status}", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return str(library)


def test_the_driver_tells_what_the_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\nGCC version: 11\n"
    )
    monkeypatch.setattr(machine, "_CUDA_DRIVER", driver_library(tmp_path, 0))
    monkeypatch.setattr(machine, "_KERNEL_MODULE", version)
    assert machine.local_gpu() == Gpu("Orin", 87, "540.4.0, CUDA 12.6")
    monkeypatch.setattr(machine, "_KERNEL_MODULE", tmp_path / "missing")
    assert machine.local_gpu().driver == "CUDA 12.6"


def test_a_machine_without_gpu_cannot_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CUDA_DRIVER", driver_library(tmp_path, 100))
    with pytest.raises(UserError, match="the NVIDIA driver finds no GPU"):
        machine.local_gpu()
    monkeypatch.setattr(machine, "_CUDA_DRIVER", "libno-such-driver.so")
    with pytest.raises(UserError, match="there is no NVIDIA driver"):
        machine.local_gpu()


def test_without_tensorrt_the_command_says_how_to_get_it(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    output = tmp_path / "x.engine"
    options = ["--axis", "batch=1:1:4", "-o", output]
    here = run("build", model, *options)
    assert isinstance(here.exception, UserError)
    assert "Python has no module 'tensorrt'" in str(here.exception)
    assert "pip install tensorrt" in str(here.exception)
    assert "--print-trtexec" in str(here.exception)
    jetson = str(run("build", model, *options, "--target", ORIN.name).exception)
    assert "sudo apt install nvidia-jetpack" in jetson
    assert jetson.splitlines()[-1].startswith("trtexec --onnx=")
    discrete = next(target for target in TARGETS if target.sm == 89 and target.tensorrt == (10, 13))
    assert f"tensorrt-cu{discrete.cuda[0]}==10.13.*" in str(
        run("build", model, *options, "--target", discrete.name).exception
    )
    assert not output.exists()


def test_a_module_that_does_not_load_is_told_from_a_missing_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"does not load: libnvinfer\.so\.10"):
        machine.import_tensorrt()


def test_engines_are_built_on_the_device_they_are_for(model: Path, tmp_path: Path, monkeypatch) -> None:
    other = Machine("10.13.3.9", Gpu("L4", 89, "580.1, CUDA 13.0"))
    monkeypatch.setattr(build.machines, "local_machine", lambda target=None: other)
    request = BuildRequest(model, tmp_path / "x.engine", ORIN)
    with pytest.raises(
        UserError, match=r"has TensorRT 10\.3 on sm_87, this machine TensorRT 10\.13\.3\.9 on sm_89"
    ) as refusal:
        build.build_engine(request)
    assert str(refusal.value).splitlines()[-1].startswith("trtexec ")


def test_print_trtexec_writes_the_graph_that_the_line_reads(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.engine"
    done = run(
        "build", model, "-o", output, "--target", ORIN.name, "--axis", "batch=1:1:4", "--fp16", "--print-trtexec"
    )
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    assert f"--onnx={output}.onnx" in line
    assert "--stronglyTyped" in line
    assert TensorProto.FLOAT16 in element_types(onnx.load(f"{output}.onnx")).values()
    plain = run(
        "build", model, "-o", tmp_path / "y.engine", "--target", ORIN.name, "--axis", "batch=1:1:4", "--print-trtexec"
    )
    assert f"--onnx={model}" in plain.stdout
    assert not (tmp_path / "y.engine.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--axis", "batch=1:1:4", "--int8"], "INT8 needs typical data"),
        (["--axis", "batch=1:1:4", "--calibration", "x.npz"], "no INT8"),
        ([], "--axis batch=MIN:OPT:MAX"),
        (["--axis", "batch=1:1:4", "--target", "jetpack-99"], "jetpack-99"),
    ],
)
def test_bad_input_is_refused(model: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run("build", model, "-o", tmp_path / "x.engine", *arguments)
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)


def record(**precision: object) -> dict:
    """Return the record of an engine."""
    found = {"verdict": "agrees", "compared": 3, "differences": [], "unseen": [], "unread": 0, "tensors": {"HALF": 3}}
    return {
        "key": {"TensorRT": "10.3.0", "SM": 87},
        "gpu": "Orin",
        "tf32": False,
        "precision": {**found, **precision},
        "notes": ["read me"],
    }


@pytest.mark.parametrize(
    ("precision", "status", "words"),
    [
        ({}, 0, "types agree with the graph: 3 tensors compared"),
        ({"verdict": "differs", "differences": ["x is HALF in the graph and FLOAT in the network."]}, 1, "x is HALF"),
        ({"verdict": "unproven", "unseen": ["HALF"]}, 1, "the graph has tensors of type HALF"),
        ({"verdict": "unproven", "compared": 0}, 1, "no tensor of the engine could be compared"),
    ],
)
def test_the_exit_status_tells_whether_the_types_agree(model, tmp_path, monkeypatch, precision, status, words) -> None:
    def built(request: BuildRequest, progress: object) -> BuildResult:
        return BuildResult(request.output, record(**precision), ("there is no engine yet.",))

    monkeypatch.setattr(cli_build, "build_engine", built)
    done = run("build", model, "-o", tmp_path / "x.engine", "--axis", "batch=1:1:4")
    assert done.exit_code == status
    assert words in done.output
    assert "read me" in done.output


def test_a_cancelled_build_ends_as_shells_expect(model: Path, tmp_path: Path, monkeypatch) -> None:
    def cancelled(request: BuildRequest, progress: object) -> BuildResult:
        raise BuildCancelled

    monkeypatch.setattr(cli_build, "build_engine", cancelled)
    done = run("build", model, "-o", tmp_path / "x.engine", "--axis", "batch=1:1:4")
    assert done.exit_code == 130
    assert "cancelled" in done.output


def test_the_model_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would overwrite the model"):
        BuildRequest(model, model)
    with pytest.raises(UserError, match="is a folder"):
        BuildRequest(model, tmp_path)


def plugin_model(*, bodies: bool) -> onnx.ModelProto:
    """Return a plugin node, with its body or stripped."""
    shape = [1, 4, 8]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        [helper.make_node("PixelAttention", ["q", "k", "v"], ["y"], "core", domain="edgeattn")], "g", values, [output]
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    stripped = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return attach_plugins(stripped) if bodies else stripped


@pytest.mark.parametrize(
    ("plugins", "release", "bodies", "nodes", "changed"),
    [
        (True, (10, 3), 0, 1, True),
        (True, (10, 7), 1, 1, False),
        (False, (10, 3), 0, 0, True),
        (False, (11, 4), 0, 0, True),
    ],
)
def test_plugin_nodes_get_the_form_that_the_version_needs(plugins, release, bodies, nodes, changed) -> None:
    model = plugin_model(bodies=True)
    options = PrecisionOptions()
    prepared = prepare(model, options, plugins=plugins, release=release)
    assert (len(prepared.model.functions), prepared.plugin_nodes) == (bodies, nodes)
    assert changes(model, options, plugins=plugins, release=release) is changed
    assert bool(prepared.notes) is not plugins
    assert len(model.functions) == 1


def test_plugin_nodes_without_library_and_body_are_refused() -> None:
    with pytest.raises(UserError, match="has no body to inline"):
        prepare(plugin_model(bodies=False), PrecisionOptions(), plugins=False, release=(10, 3))


def test_int8_goes_through_the_precision_stage(model: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "data.npz"
    np.savez(calibration, image=np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32))
    options = PrecisionOptions(fp16=True, int8=True, calibration=calibration)
    prepared = prepare(onnx.load(model), options, plugins=False, release=(10, 3))
    types = set(element_types(prepared.model).values())
    assert {TensorProto.INT8, TensorProto.FLOAT16} <= types


def test_what_makes_an_engine_stale(model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "x.engine"
    key = engine_key(model, HERE, Configuration(), PrecisionOptions())
    assert stale_reasons(engine, None, key) == ("there is no engine yet.",)
    engine.write_bytes(b"engine")
    assert stale_reasons(engine, read_record(engine), key) == ("nothing says what the engine was built from.",)
    write_record(engine, {"key": key})
    assert stale_reasons(engine, read_record(engine), key) == ()
    assert json.loads((tmp_path / "x.engine.json").read_text())["format"] == 1
    for other, words in (
        (Machine("10.4.0", HERE.gpu), "TensorRT was 10.3.0 and is 10.4.0."),
        (Machine("10.3.0", Gpu("Orin", 90, HERE.gpu.driver)), "SM was 87 and is 90."),
    ):
        changed = engine_key(model, other, Configuration(), PrecisionOptions())
        assert stale_reasons(engine, read_record(engine), changed) == (words,)
    changed = engine_key(model, HERE, Configuration(refit=True), PrecisionOptions(fp16=True))
    assert stale_reasons(engine, read_record(engine), changed) == (
        "configuration: refit was False and is True.",
        "precision: fp16 was False and is True.",
    )
    loaded = onnx.load(model)
    loaded.doc_string = "changed"
    onnx.save(loaded, model)
    changed = engine_key(model, HERE, Configuration(), PrecisionOptions())
    assert [reason.split()[0] for reason in stale_reasons(engine, read_record(engine), changed)] == ["onnx"]


def test_weights_outside_the_model_count(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(model), outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = engine_key(outside, HERE, Configuration(), PrecisionOptions())
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    after = engine_key(outside, HERE, Configuration(), PrecisionOptions())
    assert before["onnx"] == after["onnx"]
    assert before["external data"] != after["external data"]


def test_timing_caches_are_kept_apart(tmp_path: Path) -> None:
    machines = [
        HERE,
        Machine("10.4.0", HERE.gpu),
        Machine("10.3.0", Gpu("Orin", 90, HERE.gpu.driver)),
        Machine("10.3.0", Gpu("Orin", 87, "540.5, CUDA 12.6")),
    ]
    paths = {cache_path(tmp_path, machine) for machine in machines}
    assert len(paths) == len(machines)
    assert cache_path(tmp_path, HERE).name == "tensorrt-10.3.0_sm-87_driver-540.4-CUDA-12.6.cache"


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "FLOAT"),
        ("Row major linear FP16 format", "HALF"),
        ("Channel major FP16 format where channel % 8 == 0", "HALF"),
        ("Thirty-two wide channel vectorized row major Int8 format", "INT8"),
        ("Row major linear UInt8 format", "UINT8"),
        ("Row major linear BFloat16 format", "BF16"),
        ("Row major linear FP8 format", "FP8"),
        ("Half", "HALF"),
        ("Float", "FLOAT"),
        ("Int64", ""),
        ("Row major linear BOOL", ""),
        ("N/A due to dynamic shapes", ""),
        ("Unknown format", None),
    ],
)
def test_the_inspectors_words_for_types(text: str, precision: str | None) -> None:
    assert inspected_precision(text) == precision


def test_an_engine_that_shows_too_little_is_not_called_right() -> None:
    types = {"x": "HALF", "y": "FLOAT"}
    assert check_precisions(types, types, {}, []).verdict == "unproven"
    unread = [{"Inputs": [{"Name": "x", "Format/Datatype": "?"}], "Outputs": []}]
    assert check_precisions(types, types, {"y": "FLOAT"}, unread).as_dict() == {
        "verdict": "unproven",
        "compared": 2,
        "differences": [],
        "unseen": ["HALF"],
        "unread": 1,
        "tensors": {},
    }
    assert check_precisions(types, {}, {}, []).verdict == "unproven"
    assert layers_of('{"Layers": ["only a name"]}') == []


def test_progress_is_told_by_phases_inside_phases() -> None:
    told: list[tuple[str, int, int]] = []
    log = PhaseLog(lambda *step: told.append(step))
    log.start("outer", None, 0)
    log.start("inner", "outer", 5)
    assert log.step("inner", 0)
    log.cancelled.set()
    assert not log.step("inner", 1)
    log.finish("inner")
    log.finish("unknown")
    assert told == [("outer", 0, 1), ("  inner", 0, 5), ("  inner", 1, 5), ("  inner", 2, 5), ("  inner", 5, 5)]
    assert set(log.seconds) == {"inner"}


def test_what_the_build_raises_reaches_the_caller() -> None:
    def work() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run_cancellable(work, PhaseLog(lambda *step: None))


class Registry:
    """Notes the libraries that it is told to load."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_library(self, path: str) -> None:
        self.loaded.append(path)


def test_a_folder_of_kernels_becomes_python_plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library, kernels, registry, registered = tmp_path / "plugins.so", tmp_path / "kernels", Registry(), []
    library.touch()
    kernels.mkdir()
    monkeypatch.setattr(builder, "register_plugins", registered.append)
    builder._load_into(registry, Configuration(plugins=(library, kernels)).plugins)
    assert (registry.loaded, registered) == ([str(library)], [kernels])
