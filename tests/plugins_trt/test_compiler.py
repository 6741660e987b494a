"""The ahead-of-time compiler really compiles, for GPUs that nobody has here, and refuses what no host could launch."""

from __future__ import annotations

import dataclasses
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PLUGINS, PluginSpec, TensorSpec, compiler
from edgeattn.plugins_trt.compiler import Compiled, Toolchain, cache_folder, compile_variants
from edgeattn.plugins_trt.kernel_library import CompiledKernel
from edgeattn.plugins_trt.ptx import RefusedKernelError, check_launch_needs, strip_scratch_parameters
from edgeattn.plugins_trt.resources import problems, resident_programs
from edgeattn.plugins_trt.selection import all_destinations, preset_operations, variants
from edgeattn.plugins_trt.spec import Launch, Tiling
from edgeattn.plugins_trt.variants import KernelVariant, variants_of
from edgeattn.targets import SMS

pytest.importorskip("triton", reason="the kernel compiler needs Triton")

ISAS = {80: 85, 86: 85, 87: 85, 89: 85, 90: 85, 100: 88, 110: 90, 120: 88}


def variant(name: str, launch: int, sm: int, element: str = "float16", layout: str = "channels-last") -> KernelVariant:
    """Return one variant of an operation at its first preset."""
    spec = PLUGINS.get(name)
    return variants_of(spec, element, layout, sm, spec.presets[0])[launch]


VARIANTS = [
    *(variant("CrissCrossAttention", index % 2, sm) for index, sm in enumerate((80, 86, 87, 89, 90, 100, 110, 120))),
    variant("CrissCrossAttention", 1, 87, element="float32", layout="linear"),
    variant("CoAttentionGated", 0, 90),
    variant("CoAttentionGated", 1, 87, element="bfloat16", layout="linear"),
]


def name_of(given: KernelVariant) -> str:
    return f"{given.spec.name}.{given.launch.name}-{given.element}-sm{given.sm}"


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """All of `VARIANTS`, compiled without a cache."""
    return compile_variants(VARIANTS, ISAS)[0]


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=[name_of(given) for given in VARIANTS])
def test_cubin_and_ptx_are_what_the_variant_says(compiled: list[Compiled], index: int) -> None:
    given, result = VARIANTS[index], compiled[index]
    kernel, ptx = result.kernel, result.ptx.decode()
    isa = ISAS[given.sm]
    assert kernel.ptx_isa == isa
    assert f".version {isa // 10}.{isa % 10}\n" in ptx
    assert re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)[1] == str(given.sm)
    assert re.findall(r"\.visible \.entry (\w+)", ptx) == [kernel.entry]
    declared = [line for line in ptx.splitlines() if line.startswith("\t.param")]
    assert [".u64" in line for line in declared] == [kind.startswith("*") for _, kind in given.parameters]
    assert f".reqntid {32 * kernel.warps}\n" in ptx
    assert not re.search(r"\.loc\s|\.file\s|\.debug|/tmp", ptx)
    assert sections(result.cubin) >= {f".text.{kernel.entry}", f".nv.info.{kernel.entry}"}
    assert parameter_bytes(result.cubin, kernel.entry) == [8 if kind[0] == "*" else 4 for _, kind in given.parameters]
    assert b"/tmp" not in result.cubin
    assert kernel.warps == given.warps
    assert kernel.registers > 16
    assert problems(kernel) == []


def sections(cubin: bytes) -> set[str]:
    """Return the names of the sections of an ELF file for CUDA."""
    return set(_sections(cubin))


def _sections(cubin: bytes) -> dict[str, bytes]:
    assert cubin[:5] == b"\x7fELF\x02"
    assert struct.unpack_from("<H", cubin, 18)[0] == 190  # EM_CUDA
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + index * size) for index in range(count)]
    names = cubin[headers[names_index][4] :]
    return {
        names[name : names.index(b"\0", name)].decode(): cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
    }


def parameter_bytes(cubin: bytes, entry: str) -> list[int]:
    """Return the sizes of a kernel's parameters, from the attributes EIATTR_KPARAM_INFO of its section."""
    content, place, found = _sections(cubin)[f".nv.info.{entry}"], 0, {}
    while place < len(content):
        form, attribute, value = struct.unpack_from("<BBH", content, place)
        place += 4
        if form == 4:  # the value is the length of what follows
            if attribute == 0x17:
                _, ordinal, _, packed = struct.unpack_from("<IHHI", content, place)
                found[ordinal] = packed >> 18
            place += value
    return [found[ordinal] for ordinal in sorted(found)]


def test_compiling_again_gives_the_same_bytes(
    compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    chosen = [2, 4, 7]  # two assemblers
    again, _ = compile_variants([VARIANTS[index] for index in chosen], ISAS, jobs=1)
    assert again == [compiled[index] for index in chosen]
    assert list(tmp_path.iterdir()) == []


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will hold the name of every kernel that is compiled rather than read from the cache."""
    names: list[str] = []
    original = compiler._compile

    def compile_(name: str, *rest: Any) -> Any:
        names.append(name)
        return original(name, *rest)

    monkeypatch.setattr(compiler, "_compile", compile_)
    return names


def test_cache_serves_what_was_compiled_and_a_damaged_entry_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = compilations(monkeypatch)
    given = variant("CoAttentionOneWay", 1, 80, layout="linear")
    progress: list[tuple[str, int, int]] = []
    first, _ = compile_variants([given, given], ISAS, cache=tmp_path, progress=lambda *step: progress.append(step))
    assert len(names) == 1
    assert progress == [("kernels", 0, 1), ("kernels", 1, 1)]
    assert first[0] == first[1]
    assert compile_variants([given], ISAS, cache=tmp_path)[0] == first[:1]
    assert len(names) == 1
    (entry,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content = entry.read_bytes()
    for damaged in (content[:-100], content.replace(b'"registers": ', b'"registers": 1'), b"", b"\xff\xfe"):
        entry.write_bytes(damaged)
        assert compiler._read_cached(tmp_path, entry.stem) is None
    assert compile_variants([given], ISAS, cache=tmp_path)[0] == first[:1]
    assert len(names) == 2
    assert entry.read_bytes() == content


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEATTN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("EDGEATTN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/edgeattn/kernels"


def test_hash_covers_all_that_the_code_depends_on() -> None:
    given = variant("CrissCrossAttention", 0, 87)
    tools = Toolchain("3.9.0", {given.launch.kernel: "a"}, {87: {"version": "12.9", "ptx_isa": 88}})
    request = compiler._request(given, 85, tools)
    requests = [request]
    requests += [{**request, name: 2 * request[name]} for name in ("code", "parameters", "ptx_isa", "warps", "stages")]
    requests += [{**request, "constants": {**request["constants"], "CHANNELS": 1}}]
    others = [
        dataclasses.replace(tools, triton="3.6.0"),
        dataclasses.replace(tools, assemblers={87: {"version": "13.0", "ptx_isa": 88}}),
    ]
    hashes = [compiler._source_hash(other, tools) for other in requests]
    hashes += [compiler._source_hash(request, other) for other in others]
    assert request["code"] == "a"
    assert len({*hashes}) == len(requests) + len(others)


def test_source_that_is_edited_meanwhile_is_refused(toy: Callable[[str, int], KernelVariant], tmp_path: Path) -> None:
    def edit(*_: object) -> None:
        (tmp_path / "toy_kernels.py").write_text(KERNELS.replace("block * tl.sum(block)", "block"))

    with pytest.raises(UserError, match="edited meanwhile"):
        compile_variants([toy("spilling", 80)], ISAS, cache=tmp_path / "cache", progress=edit)
    assert not (tmp_path / "cache").exists()


KERNELS = """
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def descriptor(x, y, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    block = tl.make_tensor_descriptor(x, [BLOCK, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    tl.store(y + tl.arange(0, BLOCK), tl.sum(block.load([0, 0]), 0))


@triton.jit
def dependent(x, y, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    cuda.gdc_wait()
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def wrong(x, y, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    tl.store(y, tl.load(x + tl.arange(0, BLOCK)))


@triton.jit
def extra(x, size, y, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    tl.store(y + size, tl.load(x))


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    offsets = tl.arange(0, 16)[:, None] * 1024 + tl.arange(0, 1024)[None, :]
    block = tl.load(x + offsets)
    tl.store(y + offsets, block * tl.sum(block))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], KernelVariant]]:
    """Return a function that makes the variant of a kernel of `KERNELS` for an architecture."""
    (tmp_path / "toy_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)

    def make(kernel: str, sm: int) -> KernelVariant:
        spec = PluginSpec(
            name="Toy",
            op_type="Toy",
            inputs=(TensorSpec("x", ("size",)),),
            outputs=(TensorSpec("y", ("size",)),),
            body="",
            summary="",
            presets=({},),
            launches=(Launch("only", f"toy_kernels:{kernel}", ("x",), (), ("y",), ("1", "1", "1"), {"BLOCK": "64"}),),
            tilings=(Tiling({}, {"only": 1}, {"only": 1}),),
        )
        return variants_of(spec, "float16", "linear", sm, {})[0]

    return make


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("descriptor", "needs global scratch memory"),
        ("dependent", "needs programmatic dependent launch"),
        ("wrong", "Triton's compiler refuses it"),
        ("extra", "its parameters are x, size, y"),
    ],
)
def test_kernels_that_no_host_could_launch_are_refused(
    toy: Callable[[str, int], KernelVariant], kernel: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        compile_variants([toy(kernel, 90)], ISAS)
    assert str(error.value).startswith("Toy.only (float16, linear) for sm_90 at PTX ISA 8.5")


def test_spills_are_counted_and_a_problem(toy: Callable[[str, int], KernelVariant]) -> None:
    kernel = compile_variants([toy("spilling", 80)], ISAS)[0][0].kernel
    assert kernel.spill_stores > 0
    assert kernel.stack > 0
    assert "spills registers" in problems(kernel)[0]


def test_too_low_an_isa_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"sm_87 .* needs at least PTX ISA 7\.4, but 7\.3 was asked for"):
        compile_variants([VARIANTS[2]], {87: 73})


def test_compiler_that_dies_is_an_error_that_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SMS", {87: dataclasses.replace(SMS[87], minimum_ptx_isa=70)})
    with pytest.raises(UserError) as error:
        compile_variants([VARIANTS[2]], {87: 70})
    for words in ("CrissCrossAttention.columns (float16, channels-last) for sm_87", "ISA 7.0", "needs at least 7.0"):
        assert words in str(error.value)
    assert "PTX version 7.0 does not support target 'sm_87'" in str(error.value)  # LLVM's own words, before it aborts


def test_isa_beyond_the_assembler_becomes_the_assemblers() -> None:
    tools = Toolchain("3.9.0", {}, {87: {"version": "", "ptx_isa": 88}, 110: {"version": "", "ptx_isa": 88}})
    assert compiler._ptx_isa(87, 92, tools) == 88
    with pytest.raises(UserError, match=r"sm_110 .* ends at 8\.8\. Install a newer Triton"):
        compiler._ptx_isa(110, 92, tools)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        compile_variants([VARIANTS[2]], ISAS)


def test_unknown_architecture() -> None:
    with pytest.raises(UserError, match="sm_75"):
        compile_variants([dataclasses.replace(VARIANTS[2], sm=75)], {75: 85})


def test_interrupt_ends_the_workers_and_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*arguments, **options))
        return processes[-1]

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(KeyboardInterrupt):
        compile_variants(VARIANTS, ISAS, jobs=3, cache=tmp_path / "cache", progress=interrupt)
    assert all(process.poll() is not None for process in processes)
    assert 2 <= len(processes) < len(VARIANTS)
    assert list((tmp_path / "temporary").iterdir()) == []
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [compiler._read_cached(tmp_path / "cache", path.stem) is None for path in entries] == [False]


PTX = """
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u32 f_param_1,
	.param .u64 .ptr .global .align 1 f_param_2,
	.param .u64 .ptr .global .align 1 f_param_3
)
{
	ld.param.b64 	%rd1, [f_param_0];
	ld.param.b32 	%r1, [f_param_1];
	ret;
}
"""


def test_appended_parameters_are_stripped() -> None:
    stripped = strip_scratch_parameters(PTX, ["*fp16", "i32"])
    assert re.findall(r"f_param_\d", stripped) == ["f_param_0", "f_param_1", "f_param_0", "f_param_1"]
    assert stripped.split("{")[1] == PTX.split("{")[1]
    assert strip_scratch_parameters(stripped, ["*fp16", "i32"]) == stripped


@pytest.mark.parametrize(
    ("ptx", "types", "message"),
    [
        (PTX.replace("[f_param_1]", "[f_param_3]"), ["*fp16", "i32"], "reads the parameter f_param_3"),
        (PTX, ["*fp16", "*fp16"], "its parameters are u64, u32"),
        (PTX, ["*fp16"], "its parameters are u64, u32"),
        (PTX, ["*fp16", "i32", "*fp16", "*fp16", "i32"], "u32 are passed"),
        (PTX + PTX, ["*fp16", "i32"], "2 kernels"),
        ("", [], "0 kernels"),
    ],
)
def test_parameters_that_nobody_passes_are_refused(ptx: str, types: list[str], message: str) -> None:
    with pytest.raises(RefusedKernelError, match=message):
        strip_scratch_parameters(ptx, types)


PLAIN = {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": [], "launch_pdl": False}


@pytest.mark.parametrize(
    ("ptx", "metadata", "message"),
    [
        ("", {"num_ctas": 2}, "several thread blocks"),
        ("", {"global_scratch_size": 128}, "global scratch"),
        ("", {"profile_scratch_size": 8}, "profiler scratch"),
        ("", {"tensordesc_meta": [{}]}, "tensor descriptors from the host"),
        ("", {"launch_cooperative_grid": True}, "cooperative"),
        ("", {"launch_pdl": True}, "dependent"),
        (".reqnctapercluster 2, 1, 1", {}, "clusters"),
        ("griddepcontrol.wait;", {}, "dependent"),
        ("cp.async.bulk.tensor.2d.shared", {}, "TMA"),
    ],
)
def test_what_a_launch_cannot_provide_is_refused(ptx: str, metadata: dict[str, Any], message: str) -> None:
    check_launch_needs("", PLAIN)
    with pytest.raises(RefusedKernelError, match=message):
        check_launch_needs(ptx, {**PLAIN, **metadata})


def kernel_with(**values: Any) -> CompiledKernel:
    """Return a kernel without problems, with some fields changed."""
    fields = {field.name: 0 for field in dataclasses.fields(CompiledKernel)}
    return CompiledKernel(**{**fields, "sm": 86, "warps": 4, "registers": 128, "shared": 16384, **values})


def test_problems_name_what_is_wrong() -> None:
    limit = SMS[86].shared_memory_bytes
    assert problems(kernel_with(shared=limit)) == []
    assert "99" not in (text := problems(kernel_with(shared=limit + 1))[0])
    assert str(limit + 1) in text
    assert "8 bytes per thread on a stack" in problems(kernel_with(stack=8))[0]
    assert len(problems(kernel_with(stack=8, spill_loads=4, shared=limit + 1))) == 2
    assert problems(kernel_with(), shared_limit=16383)


@pytest.mark.parametrize(
    ("values", "programs"),
    [
        ({}, 4),  # 65536 / (4 * 32 * 128) = 4; 100 KiB / 17 KiB = 5
        ({"registers": 129}, 3),  # rounded up to 136
        ({"shared": 49152}, 2),
        ({"warps": 8}, 2),
    ],
)
def test_resident_programs(values: dict[str, int], programs: int) -> None:
    assert resident_programs(kernel_with(**values)) == programs


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_fp16_kernel_spills_on_any_gpu() -> None:
    wanted = all_destinations()
    assert wanted.keys() == SMS.keys()
    listed = variants(preset_operations(), tuple(wanted), ["float16"])
    isas = {sm: destination.ptx_isa for sm, destination in wanted.items()}
    results, _ = compile_variants(listed, isas, cache=cache_folder())
    found = {
        result.kernel.cubin: sentences
        for result in results
        if (sentences := problems(result.kernel, wanted[result.kernel.sm].shared_memory))
    }
    assert {result.kernel.operation for result in results} == {spec.name for spec in PLUGINS if spec.launches}
    assert found == {}
