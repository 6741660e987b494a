"""The house keeps its floors, and its type information reaches users."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "foundation": -1,
    "targets": 0,
    "blocks": 1,
    "plugins_trt": 1,
    "models": 2,
    "export": 2,
    "validation": 3,
    "deploy": 4,
    "cli": 5,
}


def imported_folders(path: Path) -> set[str]:
    """Return the folders of edgeattn that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("edgeattn.")}


@pytest.mark.parametrize("folder", FLOORS)
def test_one_floor_imports_only_floors_below(folder: str) -> None:
    modules = list((ROOT / folder).rglob("*.py"))
    assert modules
    for module in modules:
        for other in imported_folders(module) - {folder}:
            assert FLOORS[other] < FLOORS[folder], f"{module.relative_to(ROOT)} imports edgeattn.{other}"


@pytest.mark.parametrize("folder", FLOORS)
def test_every_package_is_typed_and_linked(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()
    assert (ROOT / "typings" / "edgeattn" / folder).resolve() == ROOT / folder


def test_every_package_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in FLOORS:
        for package in sorted({path.parent for path in (ROOT / folder).rglob("__init__.py")}):
            dotted = ".".join(("edgeattn", *package.relative_to(ROOT).parts))
            assert f'"{dotted}"' in text, f"{dotted} is missing from pyproject.toml, so a wheel would lack it"
