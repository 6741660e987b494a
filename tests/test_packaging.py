"""The wheel holds everything, and works without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, so that no build folder appears in it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "build", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=240)
    (path,) = folder.glob("edgeattn-*.whl")
    return path


def test_data_is_packed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "edgeattn/models/checkpoints/ccnet-digits.safetensors" in names
    assert "edgeattn/models/checkpoints/cosnet-digits.safetensors" in names
    assert "edgeattn/validation/templates/report.html.j2" in names
    assert {f"edgeattn/{folder}/py.typed" for folder in ("blocks", "export", "plugins_trt", "targets")} <= names
    assert not [name for name in names if name.startswith(("tests/", "typings/", "edgeattn/tests"))]


def test_installed_wheel_runs_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "160"}
    code = (
        "import edgeattn.models.zoo as zoo, edgeattn.cli.main as cli, sys; print(zoo.__file__);"
        "sys.argv = ['edgeattn', 'list', 'models']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "cosnet-digits" in done.stdout
