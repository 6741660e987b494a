"""Errors, atomic files and registries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeattn.foundation import Registry, UserError, atomic_path, sha256_of, write_text


@dataclass(frozen=True)
class Thing:
    name: str


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "file.json", "old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder"):
        write_text(tmp_path / "file" / "below", "text")


def test_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    first = sha256_of(tmp_path)
    write_text(tmp_path / "a", "2")
    second = sha256_of(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, sha256_of(tmp_path)}) == 3


def test_hash_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        sha256_of(tmp_path / "absent")


def test_registry_suggests_near_names() -> None:
    registry: Registry[Thing] = Registry("thing")
    registry.add(Thing("ccnet-digits"))
    registry.add(Thing("cosnet-digits"))
    with pytest.raises(UserError, match=r"unknown thing 'ccnet-digit'. Did you mean ccnet-digits"):
        registry.get("ccnet-digit")
    with pytest.raises(ValueError, match="registered twice"):
        registry.add(Thing("ccnet-digits"))
