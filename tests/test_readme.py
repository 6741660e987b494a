"""The README's commands run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from edgeattn.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_edgeattn_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every `edgeattn` line in order, on fewer samples where a command judges samples."""
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("edgeattn ")]
    assert len(commands) >= 4
    for command in commands:
        arguments = shlex.split(command)
        few = ["--samples", "6"] if arguments[1] in ("export", "compare") else []
        monkeypatch.setattr(sys, "argv", arguments + few)
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 0, command
    assert (tmp_path / "runs/ccnet/report.html").exists()


def test_python_example() -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    plain = names["plain_form"]
    assert not any(node.domain == "edgeattn" for node in plain.graph.node)  # type: ignore[attr-defined]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_continuous_integration_calls_the_readme_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
