"""benchmarks/gpu without a GPU: the dry run, the references, the bars, and the CUDA code against stand-ins."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from gpu import bars, clock, data, driver, operations, tables  # noqa: E402
from gpu.cases import SECTIONS, Case, Section, Settings  # noqa: E402
from gpu.checks import with_kernels  # noqa: E402
from gpu.driver_api import CudaDriver, DriverError, RecordingDriver  # noqa: E402
from gpu.driver_cpp import Content, CppLibrary, CppLibraryError  # noqa: E402
from gpu.ranking import ranking  # noqa: E402
from gpu.results import DRY_NOTICE, Results  # noqa: E402
from gpu.self_test import EXPECTED  # noqa: E402
from gpu.supervisor import Supervisor  # noqa: E402
from gpu.workloads import WORKLOADS  # noqa: E402

from edgeattn.plugins_trt import PLUGINS, PluginSpec  # noqa: E402

HIDE_PACKAGES = """
import sys

HIDDEN = {"onnx", "onnxruntime", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "polygraphy", "rich", "typer",
          "safetensors", "PIL", "matplotlib", "sklearn", "scipy"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
SETTINGS = Settings(dry=False, seed=0, scratch="")
SIZES = {
    **{"batch": 2, "head_channels": 4, "channels": 6, "height": 5, "width": 7, "queries": 9, "keys": 8, "1": 1},
    **{"height_a": 3, "width_a": 5, "height_b": 4, "width_b": 2},
}
plugins = pytest.mark.parametrize("spec", list(PLUGINS), ids=lambda spec: spec.name)


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as on a machine that has torch, Triton and numpy only."""
    (folder / "sitecustomize.py").write_text(HIDE_PACKAGES)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}typings", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "-o", str(folder / "result.json"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_script(tmp_path, "--dry-run", "--tune", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "result.log").read_text()[-3000:]
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["dry_run"] is True
    assert document["finished"] is True
    assert document["notice"] == DRY_NOTICE
    assert document["environment"]["gpu"] is None
    assert document["environment"]["torch"] == torch.__version__
    assert list(document["sections"]) == ["self-test", *(section.name for section in SECTIONS)]
    for name, section in document["sections"].items():
        assert section["planned"], name
        assert {record["case"] for record in section["records"]} == set(section["planned"])
    statuses = {record["case"]: record["status"] for record in document["sections"]["self-test"]["records"]}
    assert statuses == EXPECTED
    skipped = [
        record["case"]
        for name, section in document["sections"].items()
        if name != "self-test"
        for record in section["records"]
        if record["status"] != "ok"
    ]
    built = shutil.which("g++") is not None  # cuda.h comes with Triton
    assert len(skipped) == (1 if built else 2)
    assert skipped[0] == "C++ plugin library"
    with_kernels = {spec.name for spec in PLUGINS if spec.launches}
    checked = document["sections"]["checks"]["records"]
    assert {record["operation"] for record in checked} == with_kernels
    assert {record["layout"] for record in checked} == {"linear", "channels-last"}
    assert all(max(record["relative_l2"]) <= record["limit"] for record in checked)
    launched = [r for r in document["sections"]["driver"]["records"] if "launches" in r]
    assert {record["form"] for record in launched} == {"cubin", "ptx"}
    (planned,) = [r for r in document["sections"]["driver"]["records"] if r.get("form") == "C++ library"]
    assert "not run: there is no g++" in planned["reason"] if not built else planned["workspace_bytes"] > 0
    assert document["sections"]["tuning"]["ranking"]
    assert document["bars"]
    assert {bar["met"] for bar in document["bars"]} == {None}
    assert "nothing above is a measurement" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_script(tmp_path, "--sections", "blocks")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    done = run_script(tmp_path, "--sections", "block")
    assert done.returncode == 2
    assert "'block'" in done.stderr


def inputs_of(spec: PluginSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {tensor.name: [SIZES[symbol] for symbol in tensor.shape] for tensor in spec.inputs}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def largest_error(actual: Any, expected: Any) -> float:
    pairs = zip(operations.as_tuple(actual), operations.as_tuple(expected), strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@plugins
@pytest.mark.parametrize("chunk", [1, 60, 2**27])
def test_references_equal_the_torch_cores(spec: PluginSpec, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "CHUNK", chunk)
    inputs = inputs_of(spec)
    expected = operations.core_of(spec)(*inputs.values())
    assert spec.op_type in operations.REFERENCES
    assert largest_error(operations.reference_of(spec, inputs), expected) < 1e-13


@plugins
@pytest.mark.parametrize("forms", [operations.PUBLISHED, operations.SDPA], ids=["published", "sdpa"])
def test_contestants_compute_the_operation(spec: PluginSpec, forms: dict[str, Any]) -> None:
    inputs = inputs_of(spec)
    if spec.op_type not in forms or (forms is operations.SDPA and "gate_weight" in inputs):
        pytest.skip("no such form")
    expected = operations.reference_of(spec, inputs)
    assert largest_error(forms[spec.op_type](*inputs.values()), expected) < 1e-13
    last = {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in inputs.items()
    }
    assert largest_error(forms[spec.op_type](*last.values()), expected) < 1e-13


def test_sdpa_copies_no_channels_last_map() -> None:
    maps = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    assert operations._sequence(maps).data_ptr() == maps.data_ptr()


def speed_record(contestant: str, microseconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "case": contestant,
        "status": "ok",
        "workload": WORKLOADS[0].name,
        "element": "float16",
        "layout": "linear",
        "mode": None,
        "contestant": contestant,
        "relative_l2": [1e-4],
        "calls": {"median": 2 * microseconds},
        "graph": {"median": microseconds},
        "cost": {"flops": 4e9, "bytes": 8e8, "workspace_bytes": 0},
        "outputs_bytes": 1000,
        "lse_bytes": 20,
        "extra_memory": {"requested": 2020, "allocated": 4096},
        **changes,
    }


MACHINE = {
    "case": bars.MACHINE,
    "status": "ok",
    "bytes_per_second": 4e12,
    "flops_per_second": {"float16": 8e14, "bfloat16": 8e14, "float32": 4e13},
}


def verdicts(*records: dict[str, Any], dry: bool = False) -> dict[str, Any]:
    return {bar["bar"]: bar["met"] for bar in bars.evaluate([MACHINE, *records], dry=dry)}


def test_bars_are_met_or_missed() -> None:
    roofline, compiled = "at most 3 times the roofline time", WORKLOADS[0].bars[0].text
    memory = "peak extra memory at most outputs and one partial result"
    ours, theirs = speed_record("plugin", 590), speed_record("torch.compile", 1800)
    assert verdicts(ours, theirs) == {compiled: True, roofline: True, memory: True}  # the roofline is 200 microseconds
    assert verdicts(ours, theirs, speed_record("torch.compile", 1700, mode="max-autotune"))[compiled] is False
    assert verdicts(speed_record("plugin", 610), theirs) == {compiled: False, roofline: False, memory: True}
    assert verdicts(ours)[compiled] is None
    assert verdicts(speed_record("plugin", 1, extra_memory={"requested": 2021, "allocated": 0}))[memory] is False
    assert verdicts(speed_record("plugin", 1, element="bfloat16")) == {memory: True}
    assert verdicts() == {}


def test_dry_figures_meet_no_bar() -> None:
    records = [speed_record("plugin", 1, workload="criss-cross 2x3"), speed_record("torch.compile", 9)]
    assert set(verdicts(*records, dry=True).values()) == {None}


def test_tables_take_whatever_there_is() -> None:
    records = [MACHINE, speed_record("plugin", 590), {"case": "x", "status": "crashed", "reason": "on purpose"}]
    assert "590.0" in tables.speed(records)
    assert "4.00 TB/s" in tables.speed(records)
    assert "x: crashed: on purpose" in tables.troubles("speed", records)
    assert "NOT MET" in tables.bars(bars.evaluate([MACHINE, speed_record("plugin", 5000)], dry=False))
    for show in tables.BY_SECTION.values():
        assert show([])


def test_ranking_takes_the_best_of_every_launch() -> None:
    def record(tile: int, warps: int, columns: float, rows: float) -> dict[str, Any]:
        return {
            **{"status": "ok", "workload": "w", "element": "float16", "layout": "linear"},
            "constants": {"TILE": tile},
            "warps": {"columns": warps, "rows": warps},
            "stages": {"columns": 2, "rows": 2},
            "launches": {"columns": columns, "rows": rows},
            "graph": {"median": columns + rows},
        }

    best, other = ranking([record(32, 4, 5.0, 9.0), record(32, 8, 7.0, 3.0), record(64, 4, 4.5, 4.5)])
    assert best["constants"] == {"TILE": 32}
    assert best["warps"] == {"columns": 4, "rows": 8}
    assert (best["sum_of_launches"], best["measured_together"]) == (8.0, 10.0)
    assert other["sum_of_launches"] == 9.0


def test_results_are_complete_at_every_moment(tmp_path: Path) -> None:
    results = Results(tmp_path / "result.json", SETTINGS)
    results.begin("checks", [Case("one"), Case("two")])
    results.add("checks", {"case": "one", "status": "failed", "relative_l2": [math.inf], "sizes": {"height": 1}})
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["finished"] is False
    assert document["sections"]["checks"]["planned"] == ["one", "two"]
    assert document["sections"]["checks"]["records"][0]["relative_l2"] == [None]
    results.finish()
    assert json.loads((tmp_path / "result.json").read_text())["finished"] is True


def test_no_time_means_no_process() -> None:
    supervisor = Supervisor(SETTINGS, "/nowhere/log", 2)
    records: list[dict[str, Any]] = []
    supervisor.run(Section("s", "no.such.module", 0, workers=2), [Case("a"), Case("b")], 0.0, records.append)
    assert {(record["case"], record["status"]) for record in records} == {("a", "skipped"), ("b", "skipped")}


class FakeEvent:
    """A CUDA event that counts time in steps of 2 ms."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = math.nan

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.0 * (end.at - self.at)


class FakeGraph:
    """A CUDA graph that is told about replays, and a context manager for its capture."""

    captured = 0

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


class FakeStream:
    cuda_stream = 0

    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)


class FakeContext:
    def __init__(self, thing: Any) -> None:
        assert isinstance(thing, (FakeGraph, FakeStream))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what the clock uses of torch.cuda; every name has to exist there."""
    statistics = {f"{kind}_bytes.all.{what}": 5 for kind in ("requested", "allocated") for what in ("current", "peak")}
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "graph": FakeContext,
        "stream": FakeContext,
        "current_stream": FakeStream,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_stats": lambda: statistics,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
    }
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clock, "device_of", lambda settings: torch.device("cpu"))
    monkeypatch.setattr(clock, "WARM_UP_SECONDS", 0.0)


@pytest.mark.usefixtures("fake_cuda")
def test_clock_rotates_and_counts_calls() -> None:
    seen: list[int] = []

    def call(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.data_ptr())
        return tensor + 1

    one = torch.zeros(100)
    sets = clock.copies_of((one,), 100, SETTINGS)  # 500 bytes each beside a cache of 1000
    assert len({inputs[0].data_ptr() for inputs in sets}) == len(sets) == 5
    clock.warm_up(call, sets, SETTINGS)
    seen.clear()
    timing = clock.time_calls(call, sets, SETTINGS, runs=10)
    assert timing == clock.Timing(median=2000.0, least=2000.0, ninth=2000.0, runs=10)
    assert seen == 2 * [inputs[0].data_ptr() for inputs in sets]
    seen.clear()
    timing = clock.time_graph(call, sets, SETTINGS, repeats=2, runs=7)
    assert timing == clock.Timing(median=200.0, least=200.0, ninth=200.0, runs=7)
    assert len(seen) == 2 + 2 * len(sets)
    assert clock.extra_memory(call, (one,), SETTINGS) == {"requested": 0, "allocated": 0}


FAKE_DRIVER = r"""
#include <stdint.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char** text) { *text = error == 200 ? "bad image" : "other"; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)8; return 0; }
int cuModuleLoadDataEx(void** module, const char* image, unsigned count, int* options, void** values)
{
    if (count != 2 || options[0] != 5 || options[1] != 6) return 1;
    if (image[0] != 'o') { strncpy(values[0], "it starts wrongly", (size_t)values[1]); return 200; }
    *module = (void*)(image[3] == 'k' ? 16 : 24);  /* beyond a zero byte */
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name)
{
    *function = (void*)0x123456789a;
    return module == (void*)16 && strcmp(name, "kernel") == 0 ? 0 : 500;
}
static int shared_limit = 49152;
int cuFuncSetAttribute(void* function, int attribute, int value)
{
    if (function != (void*)0x123456789a || attribute != 8) return 1;
    shared_limit = value;
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** parameters, void** extra)
{
    if (function != (void*)0x123456789a || extra || (int)shared > shared_limit) return 1;
    int64_t* out = *(int64_t**)parameters[2];
    int64_t values[] = {gx, gy, gz, bx, by, bz, shared, (int64_t)stream, *(int64_t*)parameters[0],
                        *(int32_t*)parameters[1]};
    memcpy(out, values, sizeof values);
    return 0;
}
"""


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda whose only kernel writes down how it was launched."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(FAKE_DRIVER)
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")], check=True)
    return library


def test_driver_gets_every_argument(fake_driver: Path) -> None:
    driver = CudaDriver(str(fake_driver))
    module = driver.load(b"o\0\0k")
    function = driver.function(module, "kernel", 100_000)
    out = (ctypes.c_int64 * 10)()
    pointer = 0x7FFF_1234_5678_9ABC
    arguments = [("*fp16", pointer), ("i32", -7), ("*fp32", ctypes.addressof(out))]
    driver.launch(function, (70_000, 3, 5), 128, 99_999, 0x55, arguments)
    assert list(out) == [70_000, 3, 5, 128, 1, 1, 99_999, 0x55, pointer, -7]
    with pytest.raises(DriverError, match="cuLaunchKernel answered 1"):
        driver.launch(function, (1, 1, 1), 32, 100_001, 0, arguments)
    with pytest.raises(DriverError, match=r"answered 200: bad image it starts wrongly"):
        driver.load(b"x")
    with pytest.raises(DriverError, match="cuModuleGetFunction answered 500"):
        driver.function(module, "other", 0)


def test_stand_in_reads_the_same_arguments() -> None:
    driver = RecordingDriver()
    function = driver.function(driver.load(b"..kernel.."), "kernel", 0)
    driver.launch(function, (1, 2, 3), 64, 10, 0, [("*fp16", 2**47 + 1), ("i32", -7)])
    assert driver.launches == [
        {"entry": "kernel", "grid": [1, 2, 3], "threads": 64, "shared": 10, "values": [2**47 + 1, -7]}
    ]
    with pytest.raises(DriverError, match="no kernel other"):
        driver.function(1, "other", 0)


def test_absent_driver_is_an_error() -> None:
    with pytest.raises(DriverError, match=r"libnothing\.so"):
        CudaDriver("libnothing.so")


class FakeCppLibrary:
    """A C++ library that holds one operation for two architectures and computes it where the addresses say."""

    offset = 0.0

    def __init__(self, path: Path) -> None:
        assert path == Path("given.so")
        self.spec = with_kernels()[0]

    def contents(self) -> list[Content]:
        kind = (self.spec.op_type, len(self.spec.inputs), "float32", "linear", driver.DRY_STATIC)
        return [Content(*kind, sm) for sm in (87, 90)]

    def workspace_bytes(self, op_type: str, element: str, layout: str, shapes: Any) -> int:
        assert (op_type, element, layout, len(shapes)) == (
            self.spec.op_type,
            "float32",
            "linear",
            len(self.spec.inputs),
        )
        return 512

    def launch(self, op_type: str, element: str, layout: str, shapes: Any, **places: Any) -> str:
        names = [tensor.name for tensor in self.spec.inputs]
        sizes = self.spec.sizes_of(dict(zip(names, shapes, strict=True)))
        inputs = {
            name: self.tensor(address, shape)
            for name, address, shape in zip(names, places["inputs"], shapes, strict=True)
        }
        expected = operations.reference_of(self.spec, inputs)
        for output, address, values in zip(self.spec.outputs, places["outputs"], expected, strict=True):
            written = self.tensor(address, self.spec.shape_of(output, sizes))
            assert written.isnan().all()
            written.copy_(values + self.offset)
        assert self.tensor(places["workspace"], (128,)).isnan().all()
        assert places["stream"] == FakeStream.cuda_stream
        return "PTX"

    @staticmethod
    def tensor(address: int, shape: tuple[int, ...]) -> torch.Tensor:
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).reshape(shape)


@pytest.mark.usefixtures("fake_cuda")
def test_given_cpp_library_is_checked_for_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(dry=False, seed=0, scratch="", cpp_library="given.so")
    monkeypatch.setattr(driver, "CppLibrary", FakeCppLibrary)
    monkeypatch.setattr(data, "device_of", lambda settings: torch.device("cpu"))
    cases = [case for case in driver.plan(settings, []) if case.name.startswith(driver.CPP_LIBRARY)]
    assert len(cases) == 2
    monkeypatch.setattr(driver, "MAPS", driver.DRY_MAPS)
    assert list(driver.run(cases[0], settings)) == [{"status": "ok", "kernel_sets": 2, "architectures": [87, 90]}]
    (record,) = driver.run(cases[1], settings)
    assert (record["status"], record["form"], record["remark"]) == ("ok", "given C++ library", "PTX")
    assert 0 < max(record["relative_l2"]) < 1e-6
    monkeypatch.setattr(FakeCppLibrary, "offset", 0.1)
    (record,) = driver.run(cases[1], settings)
    assert record["status"] == "failed"


def test_unusable_cpp_library_is_a_failure(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_text("not a library")
    with pytest.raises(CppLibraryError, match=r"other\.so cannot be used"):
        CppLibrary(other)
    settings = Settings(dry=False, seed=0, scratch="", cpp_library=str(other))
    assert driver.cpp_library(settings)["status"] == "failed"
    assert [case.name for case in driver.plan(settings, [])].count(driver.CPP_LIBRARY) == 1
