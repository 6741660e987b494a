"""Python plugins: NVIDIA's own code takes them, and what they say of shapes and launches is what the kernels need."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import PLUGINS
from edgeattn.plugins_trt.compiler import Compiled, Toolchain
from edgeattn.plugins_trt.expressions import evaluate
from edgeattn.plugins_trt.kernel_choice import KernelChoice
from edgeattn.plugins_trt.kernel_library import CompiledKernel, KernelLibrary
from edgeattn.plugins_trt.launch_plugins import LaunchPlugin, launch_plugins, launch_plugins_of
from edgeattn.plugins_trt.qdp import register_plugins
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS
from edgeattn.plugins_trt.variants import KernelVariant, variants_of, workspace_shapes

SM = 87
# The second has channels that FP16's channels-last format would pad.
STATIC = ({"head_channels": 24, "channels": 200}, {"head_channels": 20, "channels": 33})
SIZES = (
    {"batch": 1, "height": 33, "width": 7, "height_a": 5, "width_a": 41, "height_b": 9, "width_b": 11},
    {"batch": 3, "height": 1, "width": 130, "height_a": 8, "width_a": 8, "height_b": 1, "width_b": 200},
)
POSITIONS = {"queries": 77, "keys": 35}
TYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}
CHANNELS_LAST = {"float16": "HWC8", "bfloat16": "HWC8", "float32": "HWC"}
VERSIONS = ("10.16.1.11", "11.4.0.106")

PRELUDE = """
from tensorrt_walk import imitate, walk
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import qdp

def refused(call):
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("it is not refused")

registry = imitate()
"""


def compiled(variant: KernelVariant) -> CompiledKernel:
    """Return a kernel of the library that the tests use; its code is only a text that names it."""
    names = (variant.spec.name, variant.launch.name, variant.element, variant.layout, *variant.static.values())
    title = "_".join(map(str, names)).replace("-", "")
    code = json.dumps([variant.launch.kernel, variant.element, *sorted(variant.constants.items()), variant.warps])
    return CompiledKernel(
        operation=variant.spec.name,
        op_type=variant.spec.op_type,
        launch=variant.launch.name,
        kernel=variant.launch.kernel,
        element=variant.element,
        layout=variant.layout,
        static=dict(variant.static),
        sm=variant.sm,
        ptx_isa=85,
        entry=f"entry_{title}",
        warps=variant.warps,
        shared=1000 + len(title),
        registers=128,
        stack=0,
        spill_stores=0,
        spill_loads=0,
        constants=dict(variant.constants),
        scope=dict(variant.scope),
        parameters=variant.parameters,
        cubin=f"{title}.cubin",
        ptx=f"{title}.ptx",
        source_hash=hashlib.sha256(code.encode()).hexdigest(),
    )


def ptx_of(kernel: CompiledKernel) -> str:
    return f"// the PTX of {kernel.entry}"


def write_library(folder: Path, kernels: list[CompiledKernel]) -> KernelLibrary:
    library = KernelLibrary(folder, tuple(kernels), "3.9.0")
    files = {kernel.cubin: b"code" for kernel in kernels} | {kernel.ptx: ptx_of(kernel).encode() for kernel in kernels}
    library.write(files)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    kernels = [
        compiled(variant)
        for spec in PLUGINS
        for static in STATIC
        for element in ELEMENT_BYTES
        for layout in LAYOUTS
        for variant in (variants_of(spec, element, layout, SM, static) if spec.launches else [])
    ]
    return write_library(tmp_path_factory.mktemp("library"), kernels)


@dataclasses.dataclass(frozen=True)
class Case:
    """One plugin in one network."""

    plugin: LaunchPlugin
    element: str
    layout: str
    static: dict[str, int]
    sizes: dict[str, int]
    dynamic: bool

    @property
    def variant(self) -> KernelVariant:
        variants = variants_of(self.plugin.spec, self.element, self.layout, SM, self.static)
        return next(variant for variant in variants if variant.launch is self.plugin.launch)

    def shapes(self, tensors: tuple[Any, ...]) -> list[list[int]]:
        scope = {**self.sizes, **self.variant.scope}
        return [[evaluate(axis, scope) for axis in tensor.axes] for tensor in tensors]

    def type_of(self, tensor: Any) -> str:
        return TYPES[self.element if tensor.element == "data" else tensor.element]

    def request(self) -> dict[str, Any]:
        reads = self.plugin.reads
        varying = set(self.sizes) if self.dynamic else set()
        return {
            "name": self.plugin.name,
            "shapes": self.shapes(reads),
            "known": [[axis not in varying for axis in tensor.axes] for tensor in reads],
            "types": [self.type_of(tensor) for tensor in reads],
            "layout": self.layout,
        }


def cases() -> Iterator[Case]:
    for plugin in launch_plugins():
        for element in ELEMENT_BYTES:
            for static in STATIC:
                for sizes, dynamic in zip(SIZES, (False, True), strict=True):
                    for layout in LAYOUTS if takes_channels_last(plugin, element, static) else LAYOUTS[:1]:
                        yield Case(plugin, element, layout, static, {**sizes, **POSITIONS}, dynamic)


def takes_channels_last(plugin: LaunchPlugin, element: str, static: dict[str, int]) -> bool:
    channels = [static[tensor.axes[1]] for tensor in (*plugin.reads, *plugin.writes) if tensor.follows_layout]
    return bool(channels) and (element == "float32" or all(count % 8 == 0 for count in channels))


CODE = (
    PRELUDE
    + """
names = qdp.register_plugins(folder)
assert names == qdp.register_plugins(folder, sm=87)
walks = [walk(registry, **case) for case in cases]

def columns(channels=200, kind="HALF", known=True, width=7):
    shapes = [[1, 24, 33, width], [1, 24, 33, width], [1, channels, 33, width]]
    fixed = [[True, known, True, True]] * 3
    return lambda: walk(registry, "CrissCrossAttentionColumns", shapes, fixed, [kind] * 3, "linear")

messages = {
    "channels": refused(columns(channels=999)),
    "type": refused(columns(kind="INT8")),
    "varying": refused(columns(known=False)),
    "large": refused(columns(width=10**6)),
    "library": refused(lambda: qdp.register_plugins(other)),
}
result = [list(names), walks, messages]
"""
)
REFUSALS = {
    "channels": [
        "CrissCrossAttentionColumns has no kernel for float16 linear",
        "channels=999",
        "channels=200",
        "build",
    ],
    "type": ["no kernel for the type DataType.INT8", "float16, bfloat16, float32"],
    "varying": ["head_channels varies", "fixed head_channels"],
    "large": ["one image of value has up to 6600000000 elements", "profile"],
    "library": ["registered in this process already", "/library", "/other"],
}


@pytest.fixture(scope="module", params=VERSIONS)
def answers(
    request: pytest.FixtureRequest, tensorrt_bindings: Any, library: KernelLibrary, tmp_path_factory: Any
) -> Any:
    """All that TensorRT gets to know, from one process."""
    other = write_library(tmp_path_factory.mktemp("other"), [library.kernels[0]])
    return tensorrt_bindings(request.param).evaluate(
        CODE,
        python_path=[Path(__file__).parent],
        folder=str(library.folder),
        other=str(other.folder),
        cases=[case.request() for case in cases()],
    )


@pytest.fixture
def walks(answers: Any) -> list[tuple[Case, Any]]:
    """Every case with what TensorRT gets to know of it."""
    names, results, _ = answers
    assert names == [plugin.name for plugin in launch_plugins()]
    return list(zip(cases(), results, strict=True))


def test_outputs_are_those_of_the_launch(walks: list[tuple[Case, Any]]) -> None:
    for case, found in walks:
        writes = case.plugin.writes
        assert found["names"] == [case.plugin.name]
        assert found["types"] == [case.type_of(tensor) for tensor in writes]
        assert found["shapes"] == case.shapes(writes)
        spec = case.plugin.spec
        sizes = {**case.sizes, **case.static}
        buffers = workspace_shapes(spec, case.variant, sizes)
        outputs = {tensor.name: spec.shape_of(tensor, sizes) for tensor in spec.outputs}
        for tensor, shape in zip(writes, found["shapes"], strict=True):
            if tensor.name in buffers:
                assert prod(shape) == prod(buffers[tensor.name][0])
                assert case.type_of(tensor) == TYPES[buffers[tensor.name][1]]
            else:
                assert tuple(shape) == outputs[tensor.name]


def test_launches_are_those_of_the_variant(walks: list[tuple[Case, Any]]) -> None:
    for case, found in walks:
        sizes = {**case.sizes, **case.static}
        assert found["grid"] == case.variant.grid(sizes), case
        assert found["scalars"] == case.variant.scalars(sizes), case
        assert found["block"] == [32 * case.variant.warps, 1, 1]


def test_every_kernel_is_found(walks: list[tuple[Case, Any]]) -> None:
    for case, found in walks:
        kernel = compiled(case.variant)
        assert found["kernel"] == kernel.entry
        assert found["ptx"] == ptx_of(kernel)
        assert found["shared"] == kernel.shared


def test_formats_are_those_that_need_no_padding(walks: list[tuple[Case, Any]]) -> None:
    for case, found in walks:
        tensors = (*case.plugin.reads, *case.plugin.writes)
        linear = [f"{case.type_of(tensor)} LINEAR" for tensor in tensors]
        last = [
            f"{case.type_of(tensor)} {CHANNELS_LAST[case.element] if tensor.follows_layout else 'LINEAR'}"
            for tensor in tensors
        ]
        both = takes_channels_last(case.plugin, case.element, case.static)
        assert found["combinations"] == ([linear, last] if both else [linear])
    assert {len(found["combinations"]) for _, found in walks} == {1, 2}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_run_is_refused(reason: str, answers: Any) -> None:
    message = answers[2][reason]
    assert all(words in message for words in REFUSALS[reason]), message


def test_lazy_registration_needs_no_registry(tensorrt_bindings: Any, library: KernelLibrary) -> None:
    code = """
import tensorrt as trt
from edgeattn.plugins_trt import qdp
assert trt.get_plugin_registry() is None
names = qdp.register_plugins(folder, lazy=True)
import tensorrt.plugin as trtp
result = [trtp.op.edgeattn.CrissCrossAttentionRows.input_arg_schema, len(names)]
"""
    schema, count = tensorrt_bindings("11.4.0.106").evaluate(code, folder=str(library.folder))
    assert schema.count("TensorDesc") == 6
    assert count == len(list(launch_plugins()))


@pytest.mark.parametrize(("version", "reported"), [("10.13.3.9", "10.13.3.9"), ("10.16.1.11", "10.14.1.48")])
def test_older_tensorrt_is_refused(version: str, reported: str, tensorrt_bindings: Any) -> None:
    code = PRELUDE.replace("from tensorrt_walk import imitate, walk", "imitate = dict") + (
        "import tensorrt as trt\ntrt.__version__ = reported\nresult = refused(lambda: qdp.register_plugins(sm=87))\n"
    )
    message = tensorrt_bindings(version).evaluate(code, reported=reported)
    assert f"TensorRT is {reported}" in message
    assert "10.15 or later" in message
    assert "C++ plugin library" in message


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_missing_tensorrt_is_refused() -> None:
    with pytest.raises(UserError, match="pip install tensorrt"):
        register_plugins(sm=SM)


def test_names_are_unique() -> None:
    names = [plugin.name for plugin in launch_plugins()]
    assert len(set(names)) == len(names)
    assert not set(names) & {spec.op_type for spec in PLUGINS}
    assert len(names) == sum(len(spec.launches) for spec in PLUGINS)


def columns() -> LaunchPlugin:
    return launch_plugins_of(PLUGINS.get("CrissCrossAttention"))[0]


def test_architecture_is_the_only_one_or_has_to_be_named(library: KernelLibrary, tmp_path: Path) -> None:
    assert KernelChoice.of(library.folder, None).sm == SM
    with pytest.raises(UserError, match=r"has nothing for sm_90, only for sm_87"):
        KernelChoice.of(library, 90)
    with pytest.raises(UserError, match="nothing for sm_75"):
        KernelChoice.of(None, 75)
    with pytest.raises(UserError, match="not a kernel library"):
        KernelChoice.of(tmp_path, None)


def test_architecture_is_that_of_the_gpu(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [kernel for item in library.kernels[:2] for kernel in (item, dataclasses.replace(item, sm=86))]
    several = KernelLibrary(library.folder, tuple(two), "3.9.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU is found"):
        KernelChoice.of(several, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    assert KernelChoice.of(several, None).sm == 86


def merge_launch() -> LaunchPlugin:
    return launch_plugins_of(PLUGINS.get("CoAttention"))[1]


def test_kernels_that_differ_only_in_what_a_launch_cannot_see(tmp_path: Path) -> None:
    spec = PLUGINS.get("CoAttention")
    heads = ({"head_channels": 16, "channels": 48}, {"head_channels": 64, "channels": 48})
    kernels = [compiled(item) for static in heads for item in variants_of(spec, "float16", "linear", SM, static)]
    choice = KernelChoice(write_library(tmp_path / "same", kernels), SM)
    assert choice.kernel(merge_launch(), "float16", "linear", {"channels": 48}) == kernels[1]
    other = dataclasses.replace(kernels[3], source_hash="1" * 64)
    choice = KernelChoice(write_library(tmp_path / "other", [*kernels[:3], other]), SM)
    with pytest.raises(UserError, match="include several for float16 linear channels=48: head_channels=16"):
        choice.kernel(merge_launch(), "float16", "linear", {"channels": 48})


def test_a_missing_kernel_is_compiled_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def compile_variants(variants: list[KernelVariant], isas: dict[int, int], **_: Any) -> Any:
        assert isas == {SM: 74}
        asked.extend((variant.launch.name, variant.layout) for variant in variants)
        done = [Compiled(compiled(item), b"", ptx_of(compiled(item)).encode()) for item in variants]
        return done, Toolchain("3.9.0", {}, {})

    monkeypatch.setattr("edgeattn.plugins_trt.kernel_choice.compile_variants", compile_variants)
    choice = KernelChoice.of(None, SM)
    with pytest.raises(UserError, match="no kernel for float16 linear channels=48"):
        choice.kernel(merge_launch(), "float16", "linear", {"channels": 48})
    attend = launch_plugins_of(merge_launch().spec)[0]
    static = {"head_channels": 24, "channels": 48}
    for layout in LAYOUTS:
        kernel = choice.kernel(attend, "float16", layout, static)
        assert choice.ptx(kernel).decode() == ptx_of(kernel)
        choice.kernel(merge_launch(), "float16", layout, {"channels": 48})
    assert asked == [(launch, layout) for layout in LAYOUTS for launch in ("attend", "merge")]


def test_a_launch_that_cannot_see_a_size_is_a_defect() -> None:
    spec = PLUGINS.get("CrissCrossAttention")
    blind = dataclasses.replace(spec.launches[0], reads=("query",))
    with pytest.raises(ValueError, match="CrissCrossAttentionColumns: its grid depend on channels"):
        launch_plugins_of(dataclasses.replace(spec, name="CrissCrossAttention", launches=(blind,)))
