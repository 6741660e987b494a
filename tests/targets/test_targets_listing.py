"""`edgeattn list targets`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgeattn.cli.main import app
from edgeattn.targets import catalogue
from edgeattn.targets.registry import VARIABLE


@pytest.fixture(name="listing")
def _listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    own = tmp_path / "own.toml"
    own.write_text('[target.my-board]\nbase = "jetpack-6.2-orin-nx-16"\nsummary = "our board"\n', encoding="utf-8")
    monkeypatch.setenv(VARIABLE, str(own))
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["list", "targets"])
    assert result.exit_code == 0, result.output
    return result.output


def row(listing: str, name: str) -> list[str]:
    """Return the words of the line that begins with a name and a figure."""
    (line,) = [line.split() for line in listing.splitlines() if re.match(rf" *{re.escape(name)} +\d", line)]
    return line


def test_every_part_has_one_row_that_is_not_cut(listing: str) -> None:
    for part in [*catalogue().software, *catalogue().hardware]:
        assert row(listing, part.name)
    assert "…" not in listing
    assert len(listing.splitlines()) < 140


def test_figures_and_their_marks(listing: str) -> None:
    assert row(listing, "orin-nx-16") == ["orin-nx-16", "87", "16", "102.4", "30", "15", "2", "163"]
    assert row(listing, "thor-t5000") == ["thor-t5000", "110", "128", "273", "517?", "258", "0", "227?"]
    assert row(listing, "jetpack-6.1") == ["jetpack-6.1", "10.3.0.30", "12.6", "85", "9.3.0", "3.10?", "orin"]


def test_what_is_not_supported_and_what_the_user_declares(listing: str) -> None:
    words = " ".join(listing.replace("│", " ").split())
    for expected in (
        "JetPack 6.0: Orin",
        "JetPack 5: Xavier",
        "JetPack 4: Nano",
        "my-board",
        "our board",
        "targets.toml",
    ):
        assert expected in words
