"""Every TensorRT name in the code exists in all supported versions, and engines are built as TensorRT wants it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("foundation", "targets", "blocks", "plugins_trt", "export", "models", "validation", "deploy", "cli")
MODULES = {"trt": "tensorrt", "trtp": "tensorrt.plugin"}
"""How the code calls TensorRT's modules."""

OPTIONAL = {
    # `Configuration.require` refuses it before 10.9.
    "trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": {"10.3.0"},
}
"""Names that the code uses only where the version has them, with the versions that lack them."""

WITHOUT_PLUGIN_MODULE = {"10.3.0"}


def sources() -> list[Path]:
    return [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]


def chain(node: ast.Attribute) -> str | None:
    """Return "trt.A.B" for such an expression, also for `self.trt.A.B`."""
    names: list[str] = []
    expression: ast.expr = node
    while isinstance(expression, ast.Attribute) and expression.attr not in MODULES:
        names.append(expression.attr)
        expression = expression.value
    root = expression.attr if isinstance(expression, ast.Attribute) else getattr(expression, "id", None)
    return ".".join([root, *reversed(names)]) if root in MODULES and names else None


def used_names(tree: ast.AST) -> Iterator[str]:
    """Yield the TensorRT names in a module, and the attributes of parameters that are annotated as TensorRT's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := chain(node)):
            yield name
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kinds = {
                argument.arg: kind
                for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if isinstance(argument.annotation, ast.Attribute) and (kind := chain(argument.annotation))
            }
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id in kinds:
                    yield f"{kinds[inner.value.id]}.{inner.attr}"


@functools.cache
def all_names() -> list[str]:
    return sorted({name for path in sources() for name in used_names(ast.parse(path.read_text(encoding="utf-8")))})


def test_the_enumeration_sees_every_form() -> None:
    tree = ast.parse(
        "def f(engine: trt.ICudaEngine, other: int):\n"
        "    engine.name; other.bit_length; trt.BuilderFlag.REFIT; self.trtp.register(1); something.trt_like.x"
    )
    assert set(used_names(tree)) == {
        "trt.ICudaEngine",
        "trt.ICudaEngine.name",
        "trt.BuilderFlag",
        "trt.BuilderFlag.REFIT",
        "trtp.register",
    }


def test_tensorrt_is_imported_under_its_usual_names_only() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in MODULES.values():
                        assert MODULES.get(alias.asname or "") == alias.name, f"{path}: import {alias.name}"
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensorrt"), path


def test_every_name_exists_in_every_version(bindings) -> None:
    names = all_names()
    assert {"trt.BuilderFlag.REFIT", "trt.OnnxParser", "trt.IBuilderConfig.get_timing_cache"} & set(names)
    code = """
import numpy.typing, importlib
result = []
for name in names:
    root, *rest = name.split(".")
    try:
        found = importlib.import_module(modules[root])
        for part in rest:
            found = getattr(found, part)
    except (ImportError, AttributeError):
        result.append(name)
"""
    missing = set(bindings.evaluate(code, names=names, modules=MODULES))
    if bindings.version in WITHOUT_PLUGIN_MODULE:
        assert all(name in missing for name in names if name.startswith("trtp."))
        missing = {name for name in missing if not name.startswith("trtp.")}
    assert missing == {name for name, versions in OPTIONAL.items() if bindings.version in versions and name in names}


def test_optional_names_are_used() -> None:
    assert set(OPTIONAL) <= set(all_names())


def test_the_configuration_reaches_tensorrt(engine_walk) -> None:
    asked = engine_walk["first"]["asked"]
    assert asked["network flags"][0] == ["STRONGLY_TYPED"]
    assert set(asked["set"]) == {"REFIT", "VERSION_COMPATIBLE"}
    assert set(asked["clear"]) == {"TF32"}
    assert asked["pool"][0] == ["WORKSPACE", 512 << 20]
    assert asked["level"][0] == 4
    assert asked["hardware"][0] == ("AMPERE_PLUS" if engine_walk["version"] == "10.3.0" else "SAME_COMPUTE_CAPABILITY")
    assert asked["verbosity"][0] == "DETAILED"
    assert asked["library"][0] == "libplugin.so"
    assert asked["serialized"][0] == ["libplugin.so"]
    assert asked["shapes"][:2] == [
        ["image", [1, 3, 8, 8], [1, 3, 16, 16], [4, 3, 32, 32]],
        ["image", [1, 3, 40, 8], [2, 3, 48, 48], [4, 3, 64, 64]],
    ]


def test_no_flag_changes_a_precision(engine_walk) -> None:
    half = engine_walk["half"]
    assert half["asked"]["set"] == ["TF32"]
    assert half["asked"]["network flags"] == [["STRONGLY_TYPED"]]
    assert half["graph"]["file"] == half["asked"]["parsed"][0] == "half.engine.onnx"


def test_types_are_read_back(engine_walk) -> None:
    assert engine_walk["half"]["precision"]["verdict"] == "agrees"
    assert engine_walk["half"]["precision"]["tensors"] == {"FLOAT": 2, "HALF": 1}
    wrong = engine_walk["wrong precision"]
    assert wrong["verdict"] == "differs"
    assert wrong["differences"] == [
        "inner is HALF in the graph and FLOAT in the network.",
        "inner is HALF in the graph and FLOAT in the engine's layers.",
    ]
    assert wrong["unseen"] == ["HALF"]


def test_an_engine_is_built_again_only_when_something_changed(engine_walk) -> None:
    assert engine_walk["first"]["reasons"] == ["there is no engine yet."]
    assert engine_walk["again"] == []
    assert engine_walk["plugin changed"][0].startswith("plugins: libplugin.so was ")
    assert engine_walk["driver changed"] == ["driver was 540.4, CUDA 12.6 and is 550.1, CUDA 12.6."]
    assert engine_walk["tampered"] == ["the engine file is not the one that was recorded."]
    # One cache for each driver: empty, then what the build before it measured.
    assert engine_walk["first"]["asked"]["timing cache read"][0] == 0
    assert len(b"measured") in engine_walk["first"]["asked"]["timing cache read"]


def test_the_files_beside_the_engine(engine_walk) -> None:
    beside = {"model.engine", "model.engine.json", "model.engine.layers.json"}
    assert beside <= set(engine_walk["files"])
    assert not [name for name in engine_walk["files"] if name.startswith(".")]
    record = engine_walk["first"]["record"]
    assert record["key"]["TensorRT"] == engine_walk["version"]
    assert record["key"]["SM"] == 87
    assert set(record["seconds"]) == {"build", "Building", "Timing"}


def test_phases_become_progress(engine_walk) -> None:
    phases = engine_walk["first"]["phases"]
    assert phases[:3] == [["Building", 0, 3], ["  Timing", 0, 2], ["Building", 1, 3]]
    assert phases[-1] == ["Building", 3, 3]


def test_ctrl_c_cancels_cleanly(engine_walk) -> None:
    assert engine_walk["cancelled"] == {"engine kept": True, "caches": ["measured"]}


def test_a_broken_progress_bar_stops_the_build(engine_walk) -> None:
    assert engine_walk["broken progress"] == "the terminal is gone"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("refused", "node 'conv' (Conv): unsupported padding"),
        ("failed", "could not build an engine"),
        ("no plugin layer", "plugin nodes in the graph: 1"),
        ("no builder", "cannot create a builder here"),
    ],
)
def test_failures_say_what_to_do(engine_walk, case: str, words: str) -> None:
    assert words in engine_walk[case]


def test_plugin_layers_are_counted(engine_walk) -> None:
    assert engine_walk["plugin layer"] == "agrees"
