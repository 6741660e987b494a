"""Commands are imported when they run: help is quick, and shows what their modules say."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from edgeattn.cli.lazy import lazy_group
from edgeattn.cli.main import COMMANDS, app


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\nfrom edgeattn.cli.main import main\nsys.argv = ['edgeattn', '--help']\n"
        "try: main()\nfinally: print({'torch', 'onnx', 'numpy', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    for name, place in COMMANDS.items():
        module, attribute = place.split(":")
        declared = getattr(importlib.import_module(module), attribute)
        words = declared.info.help if isinstance(declared, typer.Typer) else declared.__doc__
        first, second = str(words).split()[:2]
        assert f" {name} " in done.stdout
        assert f"{first} {second}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert f"edgeattn {name}" in shown.output or f"root {name}" in shown.output


def test_typing_errors_get_a_suggestion() -> None:
    shown = CliRunner().invoke(app, ["exprt"])
    assert shown.exit_code == 2
    assert "Did you mean 'export'" in shown.output


def test_a_command_that_is_not_there_is_a_defect() -> None:
    group = typer.Typer(cls=lazy_group({"gone": "edgeattn.cli.console:gone"}))
    group.callback()(lambda: None)
    with pytest.raises(AttributeError, match="declares no gone"):
        typer.main.get_command(group)
