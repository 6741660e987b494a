"""A group of commands whose modules are imported by the command that runs, so that help and errors come at once.

Typer has its own private copy of click, whose classes are `Any` here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def lazy_group(commands: Mapping[str, str]) -> type[TyperGroup]:
    """Return a class of groups.

    Args:
        commands: where each command is declared, by its name, in the order of the help: "module:function", or
            "module:app" for a group of commands.
    """

    class LazyGroup(TyperGroup):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.commands = {name: _listed(name, place) for name, place in commands.items()}

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args[0] not in commands:
                return super().resolve_command(ctx, args)
            return args[0], _load(args[0], commands[args[0]]), args[1:]

    return LazyGroup


def _listed(name: str, place: str) -> Any:
    """Return what the list of commands shows of one."""
    return TyperCommand(name, help=_summary(place))


def _load(name: str, place: str) -> Any:
    module, attribute = place.split(":")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name)(found)
        found = app
    command = typer.main.get_command(found)
    command.name = name
    return command


def _summary(place: str) -> str:
    """Read a function's documentation, or the help of a group, from the source, without importing it."""
    module, attribute = place.split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _names(node.targets, attribute):
            return next(str(ast.literal_eval(given.value)) for given in node.value.keywords if given.arg == "help")
    raise AttributeError(f"{module} declares no {attribute}")


def _names(targets: Sequence[ast.expr], attribute: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == attribute for target in targets)
