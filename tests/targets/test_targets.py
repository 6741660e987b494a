"""The table of targets: names, figures against what is known of them, and what is not supported."""

from __future__ import annotations

import pytest

from edgeattn.foundation import UserError
from edgeattn.targets import BUILT_IN, SMS, TARGETS, catalogue
from edgeattn.targets.registry import VARIABLE
from edgeattn.targets.schema import FIGURES, read


@pytest.fixture(autouse=True)
def _no_file_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


@pytest.mark.parametrize(
    ("name", "tensorrt", "cuda", "sm", "ptx_isa"),
    [
        ("jetpack-6.1-orin", "10.3.0.30", (12, 6), 87, 85),
        ("jetpack-6.2-orin", "10.3.0.30", (12, 6), 87, 85),
        ("jetpack-7.0-thor", "10.13.3.9", (13, 0), 110, 90),
        ("jetpack-7.1-thor", "10.13.3.9", (13, 0), 110, 90),
        ("jetpack-7.2-orin", "10.16.2.10", (13, 2), 87, 92),
        ("jetpack-7.2-thor", "10.16.2.10", (13, 2), 110, 92),
        ("jetpack-7.2-trt-11.4-thor", "11.4.1", (13, 2), 110, 92),
        ("trt-10.3-ampere", "10.3.0.26", (12, 5), 80, 85),
        ("trt-10.8-rtx-5090", "10.8.0.43", (12, 8), 120, 87),
        ("trt-10.9-l40s", "10.9.0.34", (12, 8), 89, 87),
        ("trt-10.12-a10", "10.12.0.36", (12, 9), 86, 88),
        ("trt-11.1-b200", "11.1.0.106", (13, 3), 100, 93),
        ("trt-11.4-h200", "11.4.0.106", (13, 4), 90, 94),
    ],
)
def test_software(name: str, tensorrt: str, cuda: tuple[int, int], sm: int, ptx_isa: int) -> None:
    target = TARGETS.get(name)
    assert (target.tensorrt_full, target.cuda, target.sm, target.ptx_isa) == (tensorrt, cuda, sm, ptx_isa)
    assert target.tensorrt == tuple(int(part) for part in tensorrt.split(".")[:2])


@pytest.mark.parametrize(
    ("name", "gib", "bandwidth", "int8", "fp16", "dla"),
    [
        ("jetpack-6.2-orin-agx-64", 64, 204.8, 85, 42.6, 2),
        ("jetpack-6.2-orin-agx-32", 32, 204.8, 53, 27, 2),
        ("jetpack-6.2-orin-nx-16", 16, 102.4, 30, 15, 2),
        ("jetpack-6.2-orin-nx-16-super", 16, 102.4, 38, 19, 2),
        ("jetpack-6.2-orin-nx-8", 8, 102.4, 25, 12.5, 1),
        ("jetpack-6.2-orin-nx-8-super", 8, 102.4, 38, 19, 1),
        ("jetpack-6.2-orin-nano-8", 8, 68, 20.5, 10, 0),
        ("jetpack-6.2-orin-nano-8-super", 8, 102, 33, 17, 0),
        ("jetpack-6.2-orin-nano-4", 4, 34, 10, 5, 0),
        ("jetpack-6.2-orin-nano-4-super", 4, 51, 17, 8, 0),
        ("jetpack-7.1-thor-t5000", 128, 273, 517, 258, 0),
        ("trt-11.4-h200", 141, 4800, 1979, 989, 0),
        ("jetpack-6.2-orin", None, None, None, None, None),
        ("jetpack-7.1-thor", None, None, None, None, 0),
    ],
)
def test_hardware(name: str, gib: float, bandwidth: float, int8: float, fp16: float, dla: int) -> None:
    target = TARGETS.get(name)
    figures = (target.memory_gib, target.bandwidth_gb_s, target.int8_tops, target.fp16_tflops, target.dla_cores)
    assert figures == (gib, bandwidth, int8, fp16, dla)


@pytest.mark.parametrize(
    ("sm", "minimum_ptx_isa", "kib"),
    [
        (80, 70, 163),
        (86, 71, 99),
        (87, 74, 163),
        (89, 78, 99),
        (90, 80, 227),
        (100, 86, 227),
        (110, 90, 227),
        (120, 87, 99),
    ],
)
def test_architectures(sm: int, minimum_ptx_isa: int, kib: int) -> None:
    assert SMS[sm].minimum_ptx_isa == minimum_ptx_isa
    assert SMS[sm].shared_memory_bytes == 1024 * kib
    assert ("shared_memory_kib" in SMS[sm].unverified) is (sm == 110)


def test_shared_memory_is_that_of_the_architecture_or_of_the_smallest_member_of_a_family() -> None:
    assert TARGETS.get("jetpack-6.2-orin").shared_memory_kib == 163
    assert TARGETS.get("trt-10.3-a100-40").shared_memory_kib == 163
    assert TARGETS.get("trt-10.3-ampere").shared_memory_kib == TARGETS.get("trt-10.3-a10").shared_memory_kib == 99
    assert "shared_memory_kib" in TARGETS.get("jetpack-7.2-thor-t5000").unverified


@pytest.mark.parametrize(
    ("cuda", "ptx_isa"),
    [("12.2", 82), ("12.4", 84), ("12.6", 85), ("12.8", 87), ("12.9", 88), ("13.0", 90), ("13.2", 92)],
)
def test_ptx_isa_of_cuda(cuda: str, ptx_isa: int) -> None:
    (row,) = [row for row in read(BUILT_IN)[1] if (row.table, row.name) == ("cuda", cuda)]
    assert row.values["ptx_isa"] == ptx_isa


def test_every_target_is_complete() -> None:
    for target in TARGETS:
        assert 18 <= target.opset <= 22
        assert target.tensorrt >= (10, 3)
        assert target.ptx_isa >= SMS[target.sm].minimum_ptx_isa
        for figure in FIGURES:
            assert (figure in target.sources) is (getattr(target, figure) is not None), (target.name, figure)
        for figure in target.unverified:
            assert getattr(target, figure) is not None, (target.name, figure)


def test_every_combination_that_the_table_promises_exists() -> None:
    stacks = {target.software for target in TARGETS}
    assert {f"trt-10.{minor}" for minor in range(3, 17)} | {f"trt-11.{minor}" for minor in range(5)} <= stacks
    for module in ("nano-4", "nano-8", "nx-8", "nx-16", "agx-32", "agx-64"):
        for jetpack in ("6.1", "6.2", "7.2"):
            assert f"jetpack-{jetpack}-orin-{module}" in TARGETS
    assert "jetpack-6.2-orin-nx-8-super" in TARGETS
    assert "jetpack-6.1-orin-nx-8-super" not in TARGETS  # JetPack 6.2 brought the mode
    assert "jetpack-7.0-thor-t4000" not in TARGETS  # JetPack 7.1 brought the module
    assert "trt-10.7-b200" not in TARGETS
    assert "trt-10.8-b200" in TARGETS
    assert len(TARGETS) == len(list(TARGETS))


def test_sources_of_the_table_are_keys_and_all_of_them_are_used() -> None:
    texts, rows = read(BUILT_IN)
    used = {source for row in rows for source in row.values.get("sources", {}).values()}
    used |= {row.values["source"] for row in rows if row.table != "unsupported"}
    assert used == set(texts)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("jetpack-6.2", "jetpack-6.2-orin"),
        ("jetpack-6.2.1", "jetpack-6.2-orin"),
        ("jetpack-6.2.2-orin-nx-16", "jetpack-6.2-orin-nx-16"),
        ("jetpack-7.1", "jetpack-7.1-thor"),
        ("jetpack-6.2-agx-orin-64", "jetpack-6.2-orin-agx-64"),
        ("jetpack-7.2-agx-thor", "jetpack-7.2-thor-t5000"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert TARGETS.get(alias) == TARGETS.get(name)
    assert TARGETS.get(alias).name == name
    assert alias in TARGETS


def test_whether_jetpack_7_2_drives_the_dla_is_in_doubt_where_there_is_one() -> None:
    assert "dla_cores" in TARGETS.get("jetpack-7.2-orin-nx-16").unverified
    for name in (
        "jetpack-7.2-orin-nano-8",
        "jetpack-7.2-thor",
        "jetpack-7.2-trt-11.4-orin-agx-64",
        "jetpack-6.2-orin-nx-16",
    ):
        assert "dla_cores" not in TARGETS.get(name).unverified


def test_targets_are_hashable() -> None:
    assert len(set(TARGETS)) == len(TARGETS)


@pytest.mark.parametrize(
    ("name", "bodies", "python"),
    [
        ("jetpack-6.2-orin", False, False),
        ("trt-10.6-ada", False, False),
        ("trt-10.7-ada", True, False),
        ("jetpack-7.1-thor", True, False),
        ("trt-10.14-ada", True, False),
        ("trt-10.15-ada", True, True),
        ("trt-11.4-ada", True, True),
    ],
)
def test_what_a_target_takes(name: str, bodies: bool, python: bool) -> None:
    assert TARGETS.get(name).takes_function_bodies is bodies
    assert TARGETS.get(name).takes_python_plugins is python


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jetpack-6.0", ["8.6", "opset", "jetpack-6.2"]),
        ("jetpack-6.0-orin-nx-16", ["8.6", "jetpack-6.2"]),
        ("jetpack-5.1", ["8.5", "IPluginV3", "jetpack-6.2"]),
        ("jetpack-5.1.2-orin", ["8.5", "Xavier"]),
        ("jetpack-4.6-nano", ["8.2", "jetpack-6.2"]),
        ("trt-8.6-ampere", ["10.3", "trt-10.3-ampere"]),
        ("trt-10.0", ["10.3"]),
    ],
)
def test_unsupported(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TARGETS.get(name)
    for word in [name, "not supported", *words]:
        assert word in str(caught.value)
    assert name not in TARGETS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jetpack-7.2", ["jetpack-7.2-orin", "jetpack-7.2-thor"]),
        ("jetpack-6", ["jetpack-6.1-orin", "jetpack-6.2-orin"]),
        ("trt-11.4", ["trt-11.4-hopper", "trt-11.4-blackwell-rtx"]),
        ("trt-11.4-blackwell", ["trt-11.4-blackwell-dc", "trt-11.4-blackwell-rtx"]),
        ("jetpack-6.2-orin-nano", ["jetpack-6.2-orin-nano-4", "jetpack-6.2-orin-nano-8"]),
    ],
)
def test_ambiguous(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TARGETS.get(name)
    for word in [f"{name!r} is ambiguous", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("h200-trt-11.4", "trt-11.4-h200"), ("jetpack-6.2-orin-nx16", "jetpack-6.2-orin-nx-16"), ("?", "HARDWARE")],
)
def test_unknown(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        TARGETS.get(name)
    assert f"unknown target {name!r}" in str(caught.value)
    assert near in str(caught.value)
    assert len(str(caught.value)) < 250


def test_names_that_are_not_supported_do_not_hide_any_that_are() -> None:
    for target in TARGETS:
        assert TARGETS.get(target.name) is target
    for alias, name in catalogue().aliases.items():
        assert TARGETS.get(alias).name == name
