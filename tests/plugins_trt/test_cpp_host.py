"""The C++ host does what the declarations say: its generated table, and the compiled library without TensorRT or GPU.

The table's tests need a C++ compiler, those of the C functions cuda.h as well, which comes with Triton. The plugin
library's need the headers of CUDA, and those of TensorRT in
`$EDGEATTN_TENSORRT_HEADERS/<version>/`, of which the newest are used, or all with EDGEATTN_EVERY_TENSORRT=1. The
library then runs in a program that plays TensorRT (cpp/driver.cpp). Both run on a driver that plays CUDA
(cpp/fake_cuda.cpp).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, PLUGIN_VERSION, PLUGINS, PluginSpec, TensorSpec
from edgeattn.plugins_trt.cpp_table import CODE, SOURCES, TABLE, write_table
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS
from edgeattn.plugins_trt.variants import KernelVariant, variants_of, workspace_shapes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu.driver_build import HOST, ToolMissingError, build, cuda_headers

HELPERS = Path(__file__).parent / "cpp"
ELEMENTS = tuple(ELEMENT_BYTES)
SPECS = [spec for spec in PLUGINS if spec.launches]
SMS = (80, 87, 90)
ISAS = {80: 80, 87: 85, 90: 90}
# What enums of NvInferRuntimeBase.h and NvInferRuntime.h mean.
FLOAT, HALF, BF16 = 0, 1, 7
LINEAR, HWC8, HWC = 0, 2, 8
TYPES = {"float16": HALF, "bfloat16": BF16, "float32": FLOAT}
CHANNELS_LAST = {"float16": HWC8, "bfloat16": HWC8, "float32": HWC}
WORKSPACE, STREAM = 1 << 40, 77

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def statics(spec: PluginSpec) -> list[dict[str, int]]:
    """The published sizes, and sizes that are not multiples of 8."""
    return [*map(dict, spec.presets[:1]), {name: 12 + 4 * index for index, name in enumerate(spec.static)}]


def sizes_of(spec: PluginSpec, static: Mapping[str, int], first: int = 3) -> dict[str, int]:
    """A different size for every symbol, apart from those that are compiled in."""
    symbols = dict.fromkeys(symbol for tensor in spec.inputs for symbol in tensor.shape if symbol != "1")
    return {symbol: first + 2 * index for index, symbol in enumerate(symbols)} | dict(static)


@cache
def variants(spec: PluginSpec, element: str, layout: str, static: tuple[tuple[str, int], ...], sm: int) -> Any:
    """The kernels of one row. On sm_87, which is in the middle, every tile is twice as large: rows have to differ."""
    factor = 2 if sm == 87 else 1
    return [
        dataclasses.replace(
            variant,
            scope={name: value * (1 if name in variant.static else factor) for name, value in variant.scope.items()},
        )
        for variant in variants_of(spec, element, layout, sm, dict(static))
    ]


def layouts_of(spec: PluginSpec) -> Sequence[str]:
    return LAYOUTS if any(tensor.follows_layout for tensor in spec.inputs) else LAYOUTS[:1]


def rows() -> Iterator[tuple[PluginSpec, list[KernelVariant]]]:
    for spec in SPECS:
        for static, sm, element, layout in itertools.product(statics(spec), SMS, ELEMENTS, layouts_of(spec)):
            yield spec, variants(spec, element, layout, tuple(static.items()), sm)


def name_of(variant: KernelVariant) -> str:
    static = "_".join(str(size) for size in variant.static.values())
    kind = f"{variant.element}_{variant.layout.replace('-', '')}"
    return f"{variant.spec.name}_{variant.launch.name}_{kind}_{static}_sm{variant.sm}"


def compiled(variant: KernelVariant) -> tuple[CompiledKernel, dict[str, bytes]]:
    """A kernel as the compiler would describe it, whose code is what the fake driver understands."""
    name = name_of(variant)
    letters = "".join("p" if kind.startswith("*") else "i" for _, kind in variant.parameters)
    kernel = CompiledKernel(
        operation=variant.spec.name,
        op_type=variant.spec.op_type,
        launch=variant.launch.name,
        kernel=variant.launch.kernel,
        element=variant.element,
        layout=variant.layout,
        static=variant.static,
        sm=variant.sm,
        ptx_isa=ISAS[variant.sm],
        entry=name,
        warps=variant.warps,
        shared=shared_of(variant),
        registers=1,
        stack=0,
        spill_stores=0,
        spill_loads=0,
        constants=variant.constants,
        scope=variant.scope,
        parameters=variant.parameters,
        cubin=f"{name}.cubin",
        ptx=f"{name}.ptx",
        source_hash="0" * 64,
    )
    suffix = "a" if variant.sm == 90 else ""
    isa = ISAS[variant.sm]
    return kernel, {
        kernel.cubin: f"cubin sm_{variant.sm}\n{name}:{letters}\n".encode(),
        kernel.ptx: f"// {name}:{letters}\n.version {isa // 10}.{isa % 10}\n.target sm_{variant.sm}{suffix}\n".encode(),
    }


def shared_of(variant: KernelVariant) -> int:
    return 1024 * (40 + 10 * variant.spec.launches.index(variant.launch))


def write_library(folder: Path, chosen: Sequence[KernelVariant]) -> KernelLibrary:
    made = [compiled(variant) for variant in chosen]
    library = KernelLibrary(folder, tuple(kernel for kernel, _ in made), "3.9.0")
    library.write({name: content for _, files in made for name, content in files.items()})
    return library


def workspace_bytes(row: Sequence[KernelVariant], sizes: Mapping[str, int]) -> list[int]:
    shapes = workspace_shapes(row[0].spec, row[0], sizes)
    return [prod(shape) * ELEMENT_BYTES[element] for shape, element in shapes.values()]


def aligned(sizes: Sequence[int]) -> list[int]:
    """Offsets of the buffers, and the size of all."""
    return [0, *itertools.accumulate(-(-size // 256) * 256 for size in sizes)]


def run(command: Sequence[str | Path], **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


# --- the generated table -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    folder = tmp_path_factory.mktemp("kernels")
    made = write_library(folder, [variant for _, row in rows() for variant in row])
    write_table(made)
    return made


@pytest.fixture(scope="module")
def table(library: KernelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled table as it evaluates for the sizes of `sizes_of`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++)")
    program = tmp_path_factory.mktemp("table") / "dump"
    sources = [HELPERS / "dump_table.cpp", SOURCES / "plan.cpp", SOURCES / "expression.cpp"]
    generated = [library.folder / TABLE, library.folder / CODE]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", f"-I{library.folder}"]
    run([compiler, *options, *sources, *generated, "-o", program])
    sizes: dict[str, int] = {}
    for spec in SPECS:
        sizes |= sizes_of(spec, statics(spec)[0])
    lines = "".join(f"{name} {size}\n" for name, size in sizes.items())
    return {"sizes": sizes, **json.loads(run([program], input=lines))}


def test_table_evaluates_as_the_declarations_do(table: Any) -> None:
    expected: dict[str, list[Any]] = {spec.name: [] for spec in SPECS}
    for spec, row in rows():
        sizes = {**table["sizes"], **row[0].static}
        expected[spec.name].append(
            {
                "element": ELEMENTS.index(row[0].element),
                "layout": LAYOUTS.index(row[0].layout),
                "sm": row[0].sm,
                "isa": ISAS[row[0].sm],
                "portable": int(row[0].sm != 90),
                "static": [row[0].static[name] for name in spec.static],
                "workspace": workspace_bytes(row, sizes),
                "launches": [
                    {
                        "entry": name_of(variant),
                        "threads": 32 * variant.warps,
                        "shared": shared_of(variant),
                        "cubin": f"cubin sm_{variant.sm}",
                        "ptx": compiled(variant)[1][f"{name_of(variant)}.ptx"].decode().splitlines()[0],
                        "grid": variant.grid(sizes),
                        "scalars": variant.scalars(sizes),
                    }
                    for variant in row
                ],
            }
        )
    for signature in table["signatures"]:
        key = json.dumps
        assert sorted(signature["rows"], key=key) == sorted(expected.pop(signature["name"]), key=key)
    assert not expected
    assert (table["namespace"], table["version"]) == (DOMAIN, PLUGIN_VERSION)


def test_only_operations_with_launches_are_in_the_table(table: Any) -> None:
    assert {(signature["op_type"], signature["name"]) for signature in table["signatures"]} == {
        (spec.op_type, spec.name) for spec in SPECS
    }


def one_row(spec: PluginSpec = SPECS[0]) -> list[KernelVariant]:
    return list(variants(spec, "float16", "linear", tuple(statics(spec)[0].items()), 87))


def hash_in(folder: Path) -> str:
    (digest,) = re.findall(r'kTable\{"([0-9a-f]{64})"', (folder / TABLE).read_text())
    return str(digest)


def test_text_and_hash_follow_the_content_only(tmp_path: Path) -> None:
    first = write_library(tmp_path / "first", one_row())
    second = write_library(tmp_path / "second", one_row())
    for made in (first, second):
        write_table(made)
    for name in (TABLE, CODE):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    cubin = second.folder / second.kernels[0].cubin
    cubin.write_bytes(cubin.read_bytes() + b"other code")
    write_table(second)
    assert hash_in(first.folder) != hash_in(second.folder)
    assert f'.incbin "{cubin.name}"' in (second.folder / CODE).read_text()


def test_libraries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    row = one_row()
    with pytest.raises(UserError, match="holds no kernels"):
        write_table(write_library(tmp_path / "empty", []))
    with pytest.raises(UserError, match=f"lacks the launch {row[-1].launch.name} of {row[0].spec.name}"):
        write_table(write_library(tmp_path / "part", row[:-1]))
    library = write_library(tmp_path / "other", row)
    renamed = dataclasses.replace(library.kernels[0], operation="Gone")
    with pytest.raises(UserError, match="has kernels of Gone"):
        write_table(dataclasses.replace(library, kernels=(renamed, *library.kernels)))
    swapped = dataclasses.replace(library.kernels[0], parameters=library.kernels[0].parameters[::-1])
    with pytest.raises(UserError, match="another declaration"):
        write_table(dataclasses.replace(library, kernels=(swapped, *library.kernels[1:])))
    unscoped = tuple(dataclasses.replace(kernel, scope={}) for kernel in library.kernels)
    with pytest.raises(UserError, match="another declaration"):
        write_table(dataclasses.replace(library, kernels=unscoped))
    (library.folder / library.kernels[0].ptx).write_text(".version 8.5\n.target sm_86\n")
    with pytest.raises(UserError, match="is not PTX for sm_87"):
        write_table(library)


# --- the C functions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Functions:
    """A library with the C functions, and the folder of the fake libcuda.so.1."""

    library: Path
    folder: Path

    def call(self, tmp_path: Path, *commands: Any, **settings: Any) -> tuple[list[Any], list[Any]]:
        """Return the answers to commands (see call_c_api.py) and the calls of the fake CUDA driver."""
        log = tmp_path / "calls.json"
        log.write_text("")
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "FAKE_CUDA_LOG": str(log)}
        environment |= {name: str(value) for name, value in settings.items()}
        text = "".join(f"{json.dumps(command)}\n" for command in commands)
        answers = run([sys.executable, HELPERS / "call_c_api.py", self.library], input=text, env=environment)
        return [*map(json.loads, answers.splitlines())], [*map(json.loads, log.read_text().splitlines())]


def fake_driver(folder: Path) -> None:
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", cuda_headers()]
    run(["g++", *options, "-shared", "-fPIC", HELPERS / "fake_cuda.cpp", "-o", folder / "libcuda.so.1"])


@pytest.fixture(scope="module")
def functions(library: KernelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Functions:
    folder = tmp_path_factory.mktemp("functions")
    try:
        built = build(library, folder / "objects", optimise=False)
    except ToolMissingError as error:
        pytest.skip(str(error))
    fake_driver(folder)
    return Functions(built, folder)


def arguments_of(
    spec: PluginSpec, sizes: Mapping[str, int], element: str = "float16", layout: str = "linear"
) -> list[Any]:
    return [spec.op_type, element, layout, [spec.shape_of(tensor, sizes) for tensor in spec.inputs]]


def addresses_of(spec: PluginSpec, **changes: Any) -> dict[str, Any]:
    """The addresses that `expected_launches` expects."""
    return {
        "inputs": [4096 * (index + 1) for index in range(len(spec.inputs))],
        "outputs": [1048576 * (index + 1) for index in range(len(spec.outputs))],
        "workspace": WORKSPACE,
        "stream": STREAM,
        **changes,
    }


EXPORTED = {f"edgeattn_{name}" for name in ("contents", "last_error", "last_remark", "launch", "workspace_bytes")}


def exports_of(library: Path) -> set[str]:
    return {line.split()[-1] for line in run(["nm", "-D", "--defined-only", library]).splitlines()}


def test_c_functions_need_neither_tensorrt_nor_cuda_to_load(functions: Functions) -> None:
    assert exports_of(functions.library) == EXPORTED
    assert not re.search(r"nvinfer1|\bcu[A-Z]|cuda", run(["nm", "-D", "-u", "-C", functions.library]))
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    run(["g++", "-x", "c", *strict, SOURCES / "c_api.h"])
    cmake = (SOURCES / "CMakeLists.txt").read_text()
    assert " ".join(HOST) in cmake


def test_c_functions_tell_what_the_library_holds(functions: Functions, tmp_path: Path) -> None:
    (contents,), calls = functions.call(tmp_path, ["contents"])
    expected = [
        {
            "op_type": spec.op_type,
            "input_count": len(spec.inputs),
            "element": row[0].element,
            "layout": row[0].layout,
            "static": dict(row[0].static),
            "sm": row[0].sm,
        }
        for spec, row in rows()
    ]
    key = json.dumps
    assert sorted(map(key, contents)) == sorted(map(key, expected))
    assert not calls


@pytest.mark.parametrize(("sm", "first"), [(87, 3), (90, 31)])
def test_c_functions_launch_what_is_declared(functions: Functions, tmp_path: Path, sm: int, first: int) -> None:
    check_functions(functions, tmp_path, SPECS, sm=sm, first=first)


def check_functions(functions: Functions, tmp_path: Path, specs: Sequence[PluginSpec], *, sm: int, first: int) -> None:
    commands: list[Any] = []
    answers: list[Any] = []
    launches: list[Any] = []
    for spec in specs:
        for static, element, layout in itertools.product(statics(spec), ELEMENTS, layouts_of(spec)):
            sizes = sizes_of(spec, static, first=first)
            kind = arguments_of(spec, sizes, element, layout)
            commands += [["workspace_bytes", *kind], ["launch", *kind, addresses_of(spec)]]
            by_sm = {sm: variants(spec, element, layout, tuple(static.items()), sm) for sm in SMS}
            answers += [max(aligned(workspace_bytes(row, sizes))[-1] for row in by_sm.values()), ""]
            launches += expected_launches(by_sm[sm], sizes)
    answered, calls = functions.call(tmp_path, *commands, FAKE_CUDA_SM=sm)
    assert answered == answers
    assert launches_in(calls) == launches


def test_c_functions_say_what_is_wrong(functions: Functions, tmp_path: Path) -> None:
    spec = next(spec for spec in SPECS if spec.static and spec.workspaces)
    sizes = sizes_of(spec, statics(spec)[0])
    name, element, layout, shapes = arguments_of(spec, sizes)
    axes = len(shapes[0])
    other = arguments_of(spec, {**sizes, spec.static[0]: 1000})[-1]
    addresses = addresses_of(spec)
    last = spec.inputs[-1].name
    wrong = {
        "nothing: no such operation. This library holds: ": ("nothing", element, layout, shapes),
        f"it has {len(shapes) + 7} inputs, but takes": (name, element, layout, [*shapes, *[[1]] * 7]),
        "the data type 'float64' is none of float16, bfloat16, float32": (name, "float64", layout, shapes),
        "the layout 'NHWC' is none of linear, channels-last": (name, element, "NHWC", shapes),
        f"{spec.inputs[0].name} has shape": (name, element, layout, [shapes[0][:-1], *shapes[1:]]),
        f"but needs {axes} axes": (name, element, layout, [[*shapes[0], 1], *shapes[1:]]),
        "every axis needs a positive size": (name, element, layout, [[*shapes[0][:-1], 0], *shapes[1:]]),
        f"no kernel for float16, linear, {spec.static[0]}=1000": (name, element, layout, other),
    }
    nulls = {
        f"{name}: the address of {last} is null": addresses | {"inputs": [*addresses["inputs"][:-1], 0]},
        f"the address of {spec.outputs[0].name} is null": addresses | {"outputs": [0] * len(spec.outputs)},
        "the address of the workspace is null": addresses | {"workspace": 0},
    }
    commands = [[function, *kind] for kind in wrong.values() for function in ("workspace_bytes", "launch")]
    commands = [[*command, addresses] if command[0] == "launch" else command for command in commands]
    commands += [["launch", name, element, layout, shapes, places] for places in nulls.values()]
    commands.append(["launch", name, element, layout, shapes, addresses])
    answers, calls = functions.call(tmp_path, *commands)
    assert answers.pop() == ""
    messages = [answer["error"] for answer in answers]
    for text, message in zip([text for text in wrong for _ in range(2)] + [*nulls], messages, strict=True):
        assert text in message
    assert len(launches_in(calls)) == len(spec.launches)  # those of the last command


def test_c_functions_pass_the_reasons_of_the_driver_on(functions: Functions, tmp_path: Path) -> None:
    spec = SPECS[0]
    sizes = sizes_of(spec, statics(spec)[0])
    launch = ["launch", *arguments_of(spec, sizes), addresses_of(spec)]
    ((too_old,), calls) = functions.call(tmp_path, launch, FAKE_CUDA_SM=75)
    assert f"{spec.op_type}: no kernel for this sm_75 device" in too_old["error"]
    assert not launches_in(calls)
    ((refused,), _) = functions.call(tmp_path, launch, FAKE_CUDA_REFUSES_LAUNCHES=1)
    entry = name_of(variants(spec, "float16", "linear", tuple(statics(spec)[0].items()), 87)[0])
    assert f"launching the kernel {entry}" in refused["error"]
    ((remark,), calls) = functions.call(tmp_path, launch, FAKE_CUDA_SM=120, FAKE_CUDA_ISA=90)
    assert remark == "this sm_120 device runs PTX 8.5 for sm_87, which the driver compiles"
    assert len(launches_in(calls)) == len(spec.launches)
    ((_,), calls) = functions.call(tmp_path, launch, FAKE_CUDA_CONTEXT=0)
    assert [calls[0]["call"], calls[-1]["call"]] == ["push", "pop"]  # the context of the stream
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libcuda.so.1").write_text("not a library")
    ((absent,), _) = functions.call(tmp_path, launch, LD_LIBRARY_PATH=broken)
    assert "no NVIDIA driver: " in absent["error"]


# --- the compiled library ----------------------------------------------------------------------------------------


def header_folders() -> list[Path]:
    folder = os.environ.get("EDGEATTN_TENSORRT_HEADERS")
    found = [path.parent for path in Path(folder).glob("*/NvInferRuntime.h")] if folder else []
    found.sort(key=lambda path: [int(part) for part in path.name.split(".")])
    return found if os.environ.get("EDGEATTN_EVERY_TENSORRT") else found[-1:]


@pytest.fixture(
    scope="module",
    params=header_folders()
    or [pytest.param(None, marks=pytest.mark.skip("EDGEATTN_TENSORRT_HEADERS names no headers"))],
    ids=lambda path: path.name if path else "none",
)
def headers(request: pytest.FixtureRequest) -> list[Path]:
    """Folders of the headers of TensorRT and CUDA."""
    try:
        cuda = cuda_headers()
    except ToolMissingError as error:
        pytest.skip(str(error))
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no cmake or no C++ compiler (g++)")
    return [request.param, cuda]


@dataclasses.dataclass
class Host:
    """The compiled library with the program that plays TensorRT.

    Attributes:
        library: the shared object.
        folder: holds the driver program and the fake libcuda.so.1.
        kernels: the kernel library.
    """

    library: Path
    folder: Path
    kernels: KernelLibrary

    def play(self, tmp_path: Path, *commands: str, **settings: Any) -> tuple[list[Any], list[str], list[Any]]:
        """Return results and messages of commands, and the calls of the fake CUDA driver.

        Args:
            tmp_path: where the calls are recorded.
            commands: see driver.cpp.
            settings: environment variables for the fakes.
        """
        log = tmp_path / "calls.json"
        log.write_text("")
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "FAKE_CUDA_LOG": str(log)}
        environment |= {name: str(value) for name, value in settings.items()}
        text = "".join(f"{command}\n" for command in commands)
        replies = run([self.folder / "driver", self.library], input=text, env=environment).splitlines()
        parsed = [json.loads(reply) for reply in replies]
        messages = [message for reply in parsed for _, message in reply["log"]]
        return [reply["result"] for reply in parsed], messages, [*map(json.loads, log.read_text().splitlines())]


@pytest.fixture(scope="module")
def host(headers: list[Path], library: KernelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("host")
    tensorrt, cuda = headers
    configure = ["cmake", "-S", SOURCES, "-B", folder / "build", f"-DEDGEATTN_KERNELS={library.folder}"]
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    run([*configure, *ninja, f"-DTensorRT_ROOT={tensorrt}", f"-DCUDA_INCLUDE_DIR={cuda}", "-DCMAKE_BUILD_TYPE=Debug"])
    run(["cmake", "--build", folder / "build"])
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", tensorrt, "-isystem", cuda]
    run(["g++", *options, HELPERS / "driver.cpp", "-rdynamic", "-ldl", "-o", folder / "driver"])
    fake_driver(folder)
    return Host(folder / "build" / "libedgeattn_plugins.so", folder, library)


def tensor_text(tensor: TensorSpec, sizes: Mapping[str, int], element: str, layout: str) -> str:
    kind = CHANNELS_LAST[element] if layout == "channels-last" and tensor.follows_layout else LINEAR
    axes = ",".join("1" if symbol == "1" else str(sizes[symbol]) for symbol in tensor.shape)
    return f"{TYPES[element]}:{kind}:{axes}"


def call_text(spec: PluginSpec, sizes: Mapping[str, int], element: str = "float16", layout: str = "linear") -> str:
    """Inputs and outputs as the driver program reads them."""
    tensors = (tensor_text(tensor, sizes, element, layout) for tensor in (*spec.inputs, *spec.outputs))
    return f"{len(spec.inputs)} {' '.join(tensors)}"


def test_library_loads_without_tensorrt_and_exports_its_functions(host: Host) -> None:
    undefined = run(["nm", "-D", "-u", "-C", host.library])
    assert not re.search(r"nvinfer1|getPluginRegistry|getInferLib|\bcu[A-Z]|cuda", undefined)
    assert exports_of(host.library) == {"getCreators", "setLoggerFinder", *EXPORTED}
    dynamic = run(["objdump", "-p", host.library])
    assert re.findall(r"SONAME\s+(\S+)", dynamic) == ["libedgeattn_plugins.so.1"]
    assert "libcuda" not in dynamic
    assert re.search(r"STACK.*\n.*flags rw-$", dynamic, re.MULTILINE)


def test_plugin_library_has_the_c_functions(host: Host, tmp_path: Path) -> None:
    check_functions(Functions(host.library, host.folder), tmp_path, SPECS[:1], sm=87, first=5)


def test_cmake_builds_the_c_functions_without_tensorrt(host: Host, tmp_path: Path) -> None:
    settings = ["-DEDGEATTN_TENSORRT=OFF", f"-DCUDA_INCLUDE_DIR={cuda_headers()}", "-DCMAKE_BUILD_TYPE=Debug"]
    kernels = write_library(tmp_path / "kernels", one_row())
    write_table(kernels)
    run(["cmake", "-S", SOURCES, "-B", tmp_path / "build", f"-DEDGEATTN_KERNELS={kernels.folder}", *settings])
    run(["cmake", "--build", tmp_path / "build"])
    built = tmp_path / "build" / "libedgeattn_kernels.so"
    assert exports_of(built) == EXPORTED
    spec = SPECS[0]
    launch = ["launch", *arguments_of(spec, sizes_of(spec, statics(spec)[0])), addresses_of(spec)]
    answers, calls = Functions(built, host.folder).call(tmp_path, launch)
    assert answers == [""]
    assert len(launches_in(calls)) == len(spec.launches)


def test_every_plugin_is_created_cloned_and_serialised(host: Host, tmp_path: Path) -> None:
    (creators,), _, _ = host.play(tmp_path, "creators")
    op_types = list(dict.fromkeys(spec.op_type for spec in SPECS))
    shared = {"version": PLUGIN_VERSION, "namespace": DOMAIN, "fields": 0, "interface": "PLUGIN CREATOR_V3ONE"}
    assert creators == [{"name": op_type, **shared} for op_type in op_types]
    digest = hash_in(host.kernels.folder)
    for spec in SPECS:
        description = {
            "name": spec.op_type,
            "version": PLUGIN_VERSION,
            "namespace": DOMAIN,
            "outputs": len(spec.outputs),
            "timing": digest,
            "limit": len(ELEMENTS) * len(LAYOUTS),
            "kinds": ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"],
        }
        steps = (f"create {spec.op_type}", "clone", "describe", "serialise", "describe", "attach", "describe")
        results, messages, calls = host.play(tmp_path, *steps)
        assert results == [True, True, description, digest, description, True, description]
        assert not messages
        assert not calls


def test_engine_of_another_table_is_refused(host: Host, tmp_path: Path) -> None:
    name = SPECS[0].op_type
    results, messages, _ = host.play(
        tmp_path, f"load {name} kernel_table {'0' * 64}", f"load {name} other text", f"load {name} kernel_table 0"
    )
    assert results == [False, False, False]
    assert f"edgeattn: {name}: the engine was built with the kernel table {'0' * 64}, but this plugin" in messages[0]
    assert "kernel table unknown" in messages[1]
    assert len(messages) == 3


@each_spec
def test_types_and_shapes_are_those_of_the_declaration(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    inputs, outputs = len(spec.inputs), len(spec.outputs)
    symbolic = " ".join(",".join(tensor.shape) for tensor in spec.inputs)
    sizes = sizes_of(spec, statics(spec)[0])
    numbers = " ".join(",".join(map(str, spec.shape_of(tensor, sizes))) for tensor in spec.inputs)
    results, messages, _ = host.play(
        tmp_path,
        f"create {spec.op_type}",
        *(f"types {outputs} {' '.join([str(kind)] * inputs)}" for kind in TYPES.values()),
        f"shapes {outputs} {symbolic}",
        f"shapes {outputs} {numbers}",
        f"types {outputs} {' '.join([str(FLOAT)] * (inputs - 1))} {HALF}",
        f"shapes {outputs} {symbolic},1",
        f"shapes {outputs} {symbolic} extra,input,more,axes",
    )
    assert results[1:4] == [[kind] * outputs for kind in TYPES.values()]
    assert results[4] == [list(tensor.shape) for tensor in spec.outputs]
    assert results[5] == [[*map(str, spec.shape_of(tensor, sizes))] for tensor in spec.outputs]
    assert results[6:8] == [None, None]
    assert "inputs have different types" in messages[0]
    assert f"{spec.inputs[-1].name} has {len(spec.inputs[-1].shape) + 1} axes" in messages[1]
    other = [len(item.inputs) for item in SPECS if item.op_type == spec.op_type]
    if inputs + 1 not in other:
        assert results[8] is None
        assert f"it has {inputs + 1} inputs, but takes {' or '.join(map(str, other))}" in messages[2]


def combinations(spec: PluginSpec, sizes: Mapping[str, int]) -> list[Any]:
    """Types and formats of all tensors that the library of this test has kernels for."""
    tensors = (*spec.inputs, *spec.outputs)
    found = [[[TYPES[element], LINEAR] for _ in tensors] for element in ELEMENTS]
    channels = {sizes[tensor.shape[1]] for tensor in tensors if tensor.follows_layout}
    for element in ELEMENTS if channels else ():
        if element == "float32" or all(count % 8 == 0 for count in channels):
            last = CHANNELS_LAST[element]
            found.append([[TYPES[element], last if tensor.follows_layout else LINEAR] for tensor in tensors])
    return sorted(found)


@each_spec
def test_formats_are_those_that_have_kernels(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    for static in statics(spec):
        fixed = sizes_of(spec, static)
        dynamic = {symbol: size if symbol in spec.static else -1 for symbol, size in fixed.items()}
        unknown = dict.fromkeys(fixed, -1)
        inputs = [tensor_text(tensor, dynamic, "float16", "linear") for tensor in spec.inputs]
        outputs = [tensor_text(tensor, unknown, "float16", "linear") for tensor in spec.outputs]
        texts = [call_text(spec, fixed), call_text(spec, dynamic), " ".join([str(len(inputs)), *inputs, *outputs])]
        results, messages, _ = host.play(tmp_path, f"create {spec.op_type}", *(f"formats {text}" for text in texts))
        expected = combinations(spec, fixed)
        assert [sorted(result) for result in results[1:]] == [expected] * 3
        assert not messages


@each_spec
def test_sizes_without_kernels_are_refused_with_the_remedy(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    if not spec.static:
        pytest.skip("the operation compiles no sizes in")
    other = {name: 1000 + index for index, name in enumerate(spec.static)}
    unknown = dict.fromkeys(spec.static, -1)
    texts = [call_text(spec, sizes_of(spec, static)) for static in (other, unknown)]
    results, messages, _ = host.play(tmp_path, f"create {spec.op_type}", *(f"formats {text}" for text in texts))
    assert results[1:] == [[], []]
    pairs = [f"{name}={size}" for name, size in other.items()]
    remedy = f"`edgeattn plugins build --operation {spec.op_type} --size {','.join(pairs)}`"
    (half,) = [text for text in messages if f"no kernel for float16, linear, {', '.join(pairs)}. This" in text]
    assert remedy in half
    assert f"Fix {spec.static[0]} in the model" in messages[-1]
    assert len(messages) == len(set(messages))


@each_spec
def test_workspace_is_enough_for_every_architecture(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    commands, expected = [], []
    for static, element, layout in itertools.product(statics(spec), ELEMENTS, layouts_of(spec)):
        if static != statics(spec)[0] and layout != "linear" and element != "float32":
            continue  # not a multiple of 8 channels
        sizes = sizes_of(spec, static, first=31)
        commands.append(f"workspace {call_text(spec, sizes, element, layout)}")
        needed = [workspace_bytes(variants(spec, element, layout, tuple(static.items()), sm), sizes) for sm in SMS]
        expected.append(max(aligned(sizes)[-1] for sizes in needed))
    results, messages, _ = host.play(tmp_path, f"create {spec.op_type}", *commands)
    assert results[1:] == expected
    assert not messages


def expected_launches(row: Sequence[KernelVariant], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    spec = row[0].spec
    addresses = {tensor.name: 4096 * (index + 1) for index, tensor in enumerate(spec.inputs)}
    addresses |= {tensor.name: 1048576 * (index + 1) for index, tensor in enumerate(spec.outputs)}
    offsets = aligned(workspace_bytes(row, sizes))
    addresses |= {buffer.name: WORKSPACE + offsets[index] for index, buffer in enumerate(spec.workspaces)}
    return [
        {
            "call": "launch",
            "entry": name_of(variant),
            "grid": variant.grid(sizes),
            "block": [32 * variant.warps, 1, 1],
            "shared": shared_of(variant),
            "stream": STREAM,
            "arguments": [
                *(addresses[name] for name in variant.launch.reads),
                *variant.scalars(sizes),
                *(addresses[name] for name in variant.launch.writes),
            ],
        }
        for variant in row
    ]


def launches_in(calls: list[Any]) -> list[Any]:
    return [call for call in calls if call["call"] == "launch"]


@each_spec
def test_launches_are_those_of_the_declaration(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    commands, expected = [f"create {spec.op_type}"], []
    for sm, factor in ((87, 3), (90, 31)):
        del commands[1:], expected[:]
        for static, element, layout in itertools.product(statics(spec), ELEMENTS, layouts_of(spec)):
            if static != statics(spec)[0] and layout != "linear" and element != "float32":
                continue
            sizes = sizes_of(spec, static, first=factor)
            commands += [f"resize {call_text(spec, sizes, element, layout)}", f"enqueue {WORKSPACE} {STREAM}"]
            expected += expected_launches(variants(spec, element, layout, tuple(static.items()), sm), sizes)
        results, messages, calls = host.play(tmp_path, *commands, FAKE_CUDA_SM=sm)
        assert results == [True, *[0] * (len(commands) - 1)]
        assert launches_in(calls) == expected
        assert not messages
        assert {(call["kind"], call["sm"], call["result"]) for call in calls if call["call"] == "load"} == {
            ("cubin", sm, 0)
        }
        attributes = [call for call in calls if call["call"] == "attribute"]
        asked = {call["entry"]: call["shared"] for call in launches_in(calls) if call["shared"] > 49152}
        dynamic_shared_memory = 8
        assert {(call["entry"], call["value"]) for call in attributes} == set(asked.items())
        assert {call["attribute"] for call in attributes} <= {dynamic_shared_memory}


def choice(host: Host, tmp_path: Path, **settings: Any) -> tuple[list[Any], list[str], list[tuple[str, int, int]]]:
    """What the first operation loads on a device, with its results and messages."""
    spec = SPECS[0]
    text = call_text(spec, sizes_of(spec, statics(spec)[0]))
    steps = (f"create {spec.op_type}", f"resize {text}", f"enqueue {WORKSPACE} {STREAM}")
    results, messages, calls = host.play(tmp_path, *steps, **settings)
    loads = [(call["kind"], call["sm"], call["result"]) for call in calls if call["call"] == "load"]
    return results[1:], messages, list(dict.fromkeys(loads))


def test_other_architectures_run_the_newest_ptx_that_the_driver_takes(host: Host, tmp_path: Path) -> None:
    # PTX of sm_90a runs on sm_90 only.
    results, messages, loads = choice(host, tmp_path, FAKE_CUDA_SM=120, FAKE_CUDA_ISA=90)
    assert results == [0, 0]
    assert loads == [("ptx", 87, 0)]
    assert "this sm_120 device runs PTX 8.5 for sm_87, which the driver compiles." in messages[0]
    too_new = 222  # CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    results, messages, loads = choice(host, tmp_path, FAKE_CUDA_SM=89, FAKE_CUDA_ISA=82)
    assert results == [0, 0]
    assert loads == [("ptx", 87, too_new), ("ptx", 80, 0)]
    assert (
        "refuses PTX 8.5 for sm_87: CUDA_ERROR_UNSUPPORTED_PTX_VERSION (as the fake driver says): ptxas" in messages[0]
    )
    results, _, loads = choice(host, tmp_path, FAKE_CUDA_SM=90, FAKE_CUDA_ISA=90, FAKE_CUDA_REFUSES_CUBINS=1)
    assert results == [0, 0]
    assert [load[:2] for load in loads] == [("cubin", 90), ("ptx", 90)]


def test_device_without_any_kernel_is_an_error_with_every_reason(host: Host, tmp_path: Path) -> None:
    results, messages, loads = choice(host, tmp_path, FAKE_CUDA_SM=75)
    assert results == [1, 1]
    assert loads == []
    assert "no kernel for this sm_75 device" in messages[0]
    assert "sm_80 sm_87 sm_90 (not for newer ones)" in messages[0]
    assert "edgeattn plugins build" in messages[0]
    results, messages, loads = choice(host, tmp_path, FAKE_CUDA_SM=89, FAKE_CUDA_ISA=74)
    assert results == [1, 1]
    assert "refuses PTX 8.5 for sm_87" in messages[0]
    assert "; it refuses PTX 8.0 for sm_80" in messages[0]


def test_every_context_loads_its_own_code(host: Host, tmp_path: Path) -> None:
    spec = SPECS[0]
    text = call_text(spec, sizes_of(spec, statics(spec)[0]))
    enqueue = f"enqueue {WORKSPACE} {STREAM}"
    steps = (f"create {spec.op_type}", f"resize {text}", enqueue, "context 2", enqueue, "context 1", enqueue)
    results, messages, calls = host.play(tmp_path, *steps, f"resize {text}", enqueue)
    assert results == [True, 0, 0, True, 0, True, 0, 0, 0]
    assert not messages
    loads = [call["context"] for call in calls if call["call"] == "load"]
    assert loads == [1] * len(spec.launches) + [2] * len(spec.launches)
    assert len(launches_in(calls)) == 4 * len(spec.launches)


def test_thread_without_context_takes_that_of_the_stream(host: Host, tmp_path: Path) -> None:
    spec = SPECS[0]
    text = call_text(spec, sizes_of(spec, statics(spec)[0]))
    steps = (f"create {spec.op_type}", f"resize {text}", f"enqueue {WORKSPACE} {STREAM}")
    results, _, calls = host.play(tmp_path, *steps, FAKE_CUDA_CONTEXT=0)
    assert results == [True, 0, 0]
    kinds = [call["call"] for call in calls if call["call"] != "attribute"]
    launches = len(spec.launches)
    assert kinds == ["push", *["load"] * launches, *["launch"] * launches, "pop"]


@each_spec
def test_shapes_that_kernels_cannot_run_are_errors(spec: PluginSpec, host: Host, tmp_path: Path) -> None:
    sizes = sizes_of(spec, statics(spec)[0])
    fine = call_text(spec, sizes).split()
    first, others = fine[1], fine[2:]
    dims = first.split(":")[2].split(",")
    longest = max(range(2, len(dims)), key=lambda axis: int(dims[axis]))

    def changed(axis: int, size: int) -> str:
        return f"resize {fine[0]} {HALF}:0:{','.join([*dims[:axis], str(size), *dims[axis + 1 :]])} "

    steps = (
        f"create {spec.op_type}",
        changed(0, sizes["batch"] + 1) + " ".join(others),
        changed(longest, 0) + " ".join(others),
        f"resize {call_text(spec, {**sizes, spec.inputs[0].shape[longest]: 2**31})}",
        f"resize {call_text(spec, {**sizes, 'batch': 2**31})}",
        f"enqueue {WORKSPACE} {STREAM}",
        f"resize {' '.join(fine[:-1])} {fine[-1].replace(f'{HALF}:', f'{FLOAT}:', 1)}",
        f"resize {call_text(spec, sizes)}",
    )
    results, messages, calls = host.play(tmp_path, *steps)
    assert results == [True, 1, 1, 1, 1, 1, 1, 0]
    assert f"but batch is {sizes['batch'] + 1} in an earlier input" in messages[0]
    assert "every axis needs a positive size" in messages[1]
    assert "more than 2^31 - 1 elements" in messages[2]
    assert "of the grid; CUDA takes 1 to" in messages[3]
    assert "enqueue without a successful onShapeChange" in messages[4]
    assert "has another type or format than its kernels take" in messages[5]
    assert not launches_in(calls)


def test_failed_launch_names_kernel_and_sizes(host: Host, tmp_path: Path) -> None:
    results, messages, _ = choice(host, tmp_path, FAKE_CUDA_REFUSES_LAUNCHES=1)
    assert results == [0, 1]
    spec = SPECS[0]
    row = variants(spec, "float16", "linear", tuple(statics(spec)[0].items()), 87)
    grid = "x".join(map(str, row[0].grid(sizes_of(spec, statics(spec)[0]))))
    assert f"launching the kernel {name_of(row[0])} ({row[0].launch.name}, grid {grid}" in messages[0]
    assert "batch=3" in messages[0]


def test_machine_without_driver_is_told_so(host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libcuda.so.1").write_text("not a library")
    results, messages, _ = choice(host, tmp_path, LD_LIBRARY_PATH=broken)
    assert results == [1, 1]
    assert "no NVIDIA driver: " in messages[0]


def test_logger_of_another_major_version_is_not_called(host: Host, headers: list[Path], tmp_path: Path) -> None:
    other = 110000 if headers[0].name.startswith("10") else 101600
    results, messages, _ = host.play(tmp_path, f"load {SPECS[0].op_type} other text", FAKE_TENSORRT_VERSION=other)
    assert results == [False]
    assert not messages  # they went to standard error


def test_check_headers_reports_each_version(headers: list[Path], tmp_path: Path) -> None:
    (tmp_path / headers[0].name).symlink_to(headers[0])
    script = [sys.executable, SOURCES / "check_headers.py", tmp_path, "--cuda", headers[1]]
    assert run(script) == f"TensorRT {headers[0].name}: no warnings\n"
