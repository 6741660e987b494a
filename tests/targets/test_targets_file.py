"""Targets files: the user's own, targets that start from others, and messages for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeattn.foundation import UserError
from edgeattn.targets import BUILT_IN, SMS, TARGETS, Catalogue, load
from edgeattn.targets.registry import DEFAULT_FILE, VARIABLE


@pytest.fixture(name="own")
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the user's file, which does not exist yet."""
    path = tmp_path / "own.toml"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def loaded(tmp_path: Path, text: str) -> Catalogue:
    """Return the catalogue with a user's file of this text."""
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return load([BUILT_IN, path])


BOARD = """
[target.my-board]
base = "jetpack-6.2.1-orin-nx-16"
bandwidth_gb_s = 90
"""


def test_the_variable_names_the_users_file(own: Path) -> None:
    own.write_text(BOARD, encoding="utf-8")
    board, base = TARGETS.get("my-board"), TARGETS.get("jetpack-6.2-orin-nx-16")
    assert board.bandwidth_gb_s == 90
    assert board.sources["bandwidth_gb_s"] == str(own)
    assert board.sources["int8_tops"] == base.sources["int8_tops"]
    kept = (
        "summary",
        "tensorrt",
        "cuda",
        "sm",
        "ptx_isa",
        "opset",
        "dla_cores",
        "memory_gib",
        "int8_tops",
        "unverified",
    )
    assert all(getattr(board, field) == getattr(base, field) for field in kept)
    assert "my-board" in {target.name for target in TARGETS}


def test_the_default_file_is_read_and_the_variable_can_switch_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "my-board" not in TARGETS
    file = tmp_path / DEFAULT_FILE.relative_to("~")
    file.parent.mkdir(parents=True)
    file.write_text(BOARD, encoding="utf-8")
    assert "my-board" in TARGETS
    monkeypatch.setenv(VARIABLE, "")
    assert "my-board" not in TARGETS


def test_a_file_that_is_named_has_to_exist(own: Path) -> None:
    with pytest.raises(UserError, match=f"{VARIABLE} names .*not a file") as caught:
        TARGETS.get("jetpack-6.2-orin")
    assert str(own) in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        load([BUILT_IN, own])


def test_architectures_of_the_user(own: Path) -> None:
    own.write_text(
        '[sm.103]\nsummary = "B300"\nminimum_ptx_isa = 88\nshared_memory_kib = 227\nsource = "its data sheet"\n',
        encoding="utf-8",
    )
    assert SMS[103].shared_memory_bytes == 232448
    assert len(SMS) == 9


def test_targets_start_from_each_other_in_any_order(tmp_path: Path) -> None:
    own = loaded(
        tmp_path,
        """
        [target.slow]
        base = "fast"
        int8_tops = 10
        unverified = ["int8_tops"]
        source = "measured"
        [target.fast]
        base = "jetpack-7.2-orin-nx-8"
        summary = "a board"
        """,
    )
    slow = own.get("slow")
    assert (slow.int8_tops, slow.dla_cores, slow.summary, slow.sources["int8_tops"]) == (10, 1, "a board", "measured")
    assert slow.unverified == {"python", "dla_cores", "int8_tops"}
    assert [target.name for target in own.own] == ["slow", "fast"]


def test_an_overridden_figure_is_the_users_to_mark(tmp_path: Path) -> None:
    own = loaded(tmp_path, '[target.mine]\nbase = "jetpack-7.2-orin-nx-8"\npython = "3.12"\ndla_cores = 0\n')
    assert own.get("mine").unverified == frozenset()


def test_what_follows_from_a_figure_follows_from_the_users(tmp_path: Path) -> None:
    own = loaded(
        tmp_path,
        """
        [target.old-driver]
        base = "trt-11.4-ampere"
        cuda = "12.9"
        [target.big]
        base = "trt-11.4-ampere"
        sm = 90
        [target.own-ceiling]
        base = "trt-11.4-ampere"
        cuda = "12.9"
        ptx_isa = 80
        """,
    )
    assert own.get("old-driver").ptx_isa == 88
    assert own.get("old-driver").shared_memory_kib == 99
    assert own.get("big").shared_memory_kib == 227
    assert own.get("own-ceiling").ptx_isa == 80


def test_a_target_declared_whole(tmp_path: Path) -> None:
    own = loaded(
        tmp_path,
        '[target.box]\nsummary = "a box"\ntensorrt = "10.9"\ncuda = "12.8"\nsm = 120\nopset = 20\nmemory_gib = 12\n',
    )
    box = own.get("box")
    assert (box.tensorrt, box.tensorrt_full, box.ptx_isa, box.shared_memory_kib) == ((10, 9), "10.9", 87, 99)
    assert (box.memory_gib, box.bandwidth_gb_s, box.software) == (12, None, None)


def test_hardware_and_software_of_the_user_combine(tmp_path: Path) -> None:
    own = loaded(
        tmp_path,
        """
        [hardware.orin-industrial]
        summary = "Jetson AGX Orin Industrial"
        family = "orin"
        sm = 87
        source = "its data sheet"
        [software.yocto]
        summary = "our image"
        tensorrt = "10.7.0"
        cuda = "12.6"
        opset = 18
        hardware = ["orin-industrial"]
        source = "our build"
        """,
    )
    assert own.get("jetpack-6.2-orin-industrial").tensorrt == (10, 3)
    assert own.get("yocto-orin-industrial").takes_function_bodies
    with pytest.raises(UserError, match=r"ambiguous.* yocto-orin-industrial"):
        own.get("yocto")  # a module is not its family


SM = '[sm.103]\nsummary = "B300"\nminimum_ptx_isa = 88\nshared_memory_kib = 227\nsource = "x"\n'
SOFTWARE = (
    '[software.s]\nsummary = "s"\ntensorrt = "10.3"\ncuda = "12.6"\nopset = 18\nhardware = ["orin"]\nsource = "x"\n'
)
HARDWARE = '[hardware.h]\nsummary = "h"\nfamily = "orin"\nsm = 87\nsource = "x"\n'
TARGET = '[target.t]\nbase = "jetpack-6.2-orin"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # the file
        ("[target.t]\nsm =\n", ["not TOML", "line 2"]),
        ("[boards.b]\nsm = 87\n", ["[boards]", "target"]),
        ("target = 3\n", ["target = 3", "[target.NAME]"]),
        # rows
        ("[target]\nt = 3\n", ["target 't'", "3"]),
        ("[target.My_Board]\n", ["target 'My_Board'", "a-z"]),
        ("[sm.xx]\n", ["sm 'xx'", "87"]),
        ('[cuda."13"]\n', ["cuda '13'", "12.6"]),
        ("[target.my-board-6.2]\n", ['[target."my-board-6.2"]', "quotes"]),
        ("[source]\nx = 3\n", ["source 'x'", "3"]),
        ('[source]\napt = "mine"\n', ["source 'apt'", "another key"]),
        # fields
        (TARGET + "colour = 3\n", ["target 't'", "colour = 3", "memory_gib"]),
        (SOFTWARE.replace('cuda = "12.6"\n', ""), ["software 's'", "cuda is missing"]),
        (HARDWARE.replace("sm = 87\n", ""), ["hardware 'h'", "sm is missing"]),
        (SM.replace('source = "x"\n', ""), ["sm '103'", "source is missing"]),
        ('[target.t]\ncuda = "12.6"\n', ["target 't'", "summary is missing", "base"]),
        ('[target.t]\nsummary = "t"\ntensorrt = "10.3"\nsm = 87\nopset = 18\n', ["target 't'", "cuda is missing"]),
        # values
        (TARGET + "tensorrt = 10.3\n", ["tensorrt = 10.3", "in quotes"]),
        (TARGET + 'tensorrt = "8.6"\n', ["tensorrt = '8.6'", "10.3 or later"]),
        (TARGET + 'tensorrt = "ten"\n', ["tensorrt = 'ten'"]),
        (TARGET + 'cuda = "12"\n', ["cuda = '12'", "12.6"]),
        (TARGET + "cuda = 12.6\n", ["cuda = 12.6", "in quotes"]),
        (TARGET + "opset = 17\n", ["opset = 17", "18 to 22"]),
        (TARGET + "sm = 72\n", ["sm = 72", "80"]),
        (TARGET + "dla_cores = true\n", ["dla_cores = True", "whole number"]),
        (TARGET + "dla_cores = -1\n", ["dla_cores = -1"]),
        (TARGET + "memory_gib = 0\n", ["memory_gib = 0", "above 0"]),
        (TARGET + "int8_tops = nan\n", ["int8_tops = nan"]),
        (TARGET + "fp16_tflops = inf\n", ["fp16_tflops = inf"]),
        (TARGET + 'bandwidth_gb_s = "90"\n', ["bandwidth_gb_s = '90'"]),
        (TARGET + 'summary = ""\n', ["summary = ''"]),
        (TARGET + 'unverified = ["weight"]\n', ["unverified = ['weight']", "memory_gib"]),
        (TARGET + 'unverified = "sm"\n', ["unverified = 'sm'", "a list"]),
        (TARGET + 'sources = "x"\n', ["sources = 'x'", "a table"]),
        (TARGET + 'sources = { weight = "x" }\n', ["weight", "memory_gib"]),
        (SOFTWARE.replace('["orin"]', "[]"), ["hardware = []", "orin"]),
        # references
        (TARGET.replace("6.2", "6.9"), ["target 't'", "base = 'jetpack-6.9-orin'", "edgeattn list targets"]),
        (TARGET.replace("jetpack-6.2-orin", "t"), ["target 't'", "base = 't'", "itself"]),
        ('[target.a]\nbase = "b"\n[target.b]\nbase = "a"\n', ["base = 'a'", "itself"]),
        (SOFTWARE.replace("orin", "oryn"), ["software 's'", "hardware = 'oryn'", "orin"]),
        (HARDWARE.replace("orin", "oryn"), ["hardware 'h'", "family = 'oryn'", "orin"]),
        (HARDWARE + 'software = ["none"]\n', ["hardware 'h'", "software = 'none'", "jetpack-6.2"]),
        (HARDWARE.replace('family = "orin"\n', ""), ["hardware 'h'", "no software runs on it"]),
        (SOFTWARE.replace('"orin"', '"thor-t4000"'), ["software 's'", "none of its hardware"]),
        (TARGET + "sm = 103\n", ["target 't'", "sm = 103", "[sm.103]"]),
        (TARGET + 'cuda = "13.9"\n', ["target 't'", '[cuda."13.9"]']),
        (TARGET + "sm = 100\n", ["target 't'", "sm = 100", "86", "85"]),
        (TARGET + "ptx_isa = 73\n", ["target 't'", "sm = 87", "74", "73"]),
        # names that exist
        (TARGET.replace("[target.t]", '[target."jetpack-7.1-thor"]'), ["jetpack-7.1-thor", "already"]),
        (TARGET.replace("[target.t]", '[target."jetpack-6.2"]'), ["jetpack-6.2", "already"]),
        (SOFTWARE.replace("software.s]", 'software."jetpack-6.2"]'), ["jetpack-6.2", "declares it already"]),
        (SOFTWARE + 'aliases = ["jetpack-6.2"]\n', ["jetpack-6.2-orin", "aliases"]),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, text)
    for word in [str(tmp_path / "own.toml"), *words]:
        assert word in str(caught.value)


def test_the_parts_of_the_cases_above_are_sound(tmp_path: Path) -> None:
    own = loaded(tmp_path, SM + SOFTWARE + HARDWARE + TARGET)
    assert {"s-orin", "s-h", "jetpack-6.2-h", "t"} <= {target.name for target in own.targets}


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load([BUILT_IN, path])
