"""The trtexec line takes only options that the version knows, and says what the configuration says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from edgeattn.export.engine.configuration import Configuration
from edgeattn.export.engine.profiles import InputRange
from edgeattn.export.engine.trtexec import option_table, trtexec_line
from edgeattn.foundation import UserError

TABLES: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "trtexec_options.json").read_text(encoding="utf-8")
)["options"]
RELEASES = {name: (int(name.split(".")[0]), int(name.split(".")[1])) for name in TABLES}


@pytest.fixture
def thorough(tmp_path: Path) -> Configuration:
    library = tmp_path / "lib plugin.so"
    library.write_bytes(b"library")
    profiles = tuple((InputRange("image", (low, 3, 8, 8), (low, 3, 16, 16), (4, 3, 32, 32)),) for low in (1, 2))
    return Configuration(profiles, (library,), 512, 4, True, "ampere-plus", True, False)


def options_of(line: str) -> list[tuple[str, str | None]]:
    command, *words = shlex.split(line)
    assert command == "trtexec"
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return [(name, value if sign else None) for name, sign, value in pairs]


def line_for(configuration: Configuration, release: tuple[int, int]) -> str:
    return trtexec_line(Path("a model.onnx"), Path("x.engine"), Path("x.layers.json"), configuration, release)


@pytest.mark.parametrize("version", TABLES)
def test_every_option_is_known_to_the_version(version: str, thorough: Configuration) -> None:
    for configuration in (thorough, Configuration(tf32=True)):
        names = [name for name, _ in options_of(line_for(configuration, RELEASES[version]))]
        assert set(names) <= set(TABLES[version])


def test_the_table_holds_for_every_version() -> None:
    for name, (since, until) in option_table().items():
        for version, release in RELEASES.items():
            if since <= release and (until is None or release < until):
                assert name in TABLES[version], (name, version)


def test_every_option_of_the_table_is_used(thorough: Configuration) -> None:
    assert {name for name, _ in options_of(line_for(thorough, (10, 3)))} == set(option_table())


def test_the_line_says_what_the_configuration_says(thorough: Configuration) -> None:
    options = options_of(line_for(thorough, (10, 3)))
    assert options[:3] == [("onnx", "a model.onnx"), ("saveEngine", "x.engine"), ("stronglyTyped", None)]
    assert ("memPoolSize", "workspace:512M") in options
    assert ("hardwareCompatibilityLevel", "ampere+") in options
    at = options.index(("profile", "1"))
    # trtexec reads a profile's shapes from the words right behind --profile.
    assert options[at + 1 : at + 4] == [
        ("minShapes", "image:2x3x8x8"),
        ("optShapes", "image:2x3x16x16"),
        ("maxShapes", "image:4x3x32x32"),
    ]
    assert dict(options)["dynamicPlugins"] == dict(options)["setPluginsToSerialize"] == str(thorough.plugins[0])


def test_precision_flags_never_occur(thorough: Configuration) -> None:
    for release in RELEASES.values():
        names = {name for name, _ in options_of(line_for(thorough, release))}
        assert not names & {"fp16", "bf16", "int8", "fp8", "int4", "best"}


def test_strong_typing_is_asked_for_where_it_is_not_the_rule() -> None:
    assert "--stronglyTyped" in line_for(Configuration(), (10, 16))
    assert "--stronglyTyped" not in line_for(Configuration(), (11, 0))
    assert "--noTF32" in line_for(Configuration(), (11, 0))
    assert "--noTF32" not in line_for(Configuration(tf32=True), (11, 0))


def test_a_single_profile_needs_no_number() -> None:
    configuration = Configuration((((InputRange("x", (1,), (2,), (3,))),),))
    assert "--profile" not in [f"--{name}" for name, _ in options_of(line_for(configuration, (10, 3)))]


def test_versions_without_what_was_chosen_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs TensorRT 10\.9"):
        line_for(Configuration(hardware_compatible="same-compute-capability"), (10, 3))
    assert "sameComputeCapability" in line_for(Configuration(hardware_compatible="same-compute-capability"), (10, 13))
    with pytest.raises(UserError, match="strongly typed"):
        line_for(Configuration(), (8, 6))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"workspace_mib": 0}, "too small"),
        ({"builder_level": 6}, "does not exist"),
        ({"hardware_compatible": "pascal"}, "ampere-plus or same-compute-capability"),
        ({"plugins": (Path("/nowhere.so"),)}, "/nowhere.so does not exist"),
    ],
)
def test_impossible_choices_are_refused(choices: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Configuration(**choices)


def test_trtexec_runs_no_python_plugins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trtexec runs no Python plugins"):
        trtexec_line(Path("m.onnx"), Path("m.engine"), Path("m.json"), Configuration(plugins=(tmp_path,)), (10, 16))
