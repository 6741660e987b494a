"""The operator table: which ONNX operators TensorRT's parser imports, since when and for which types."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import onnx_ir as ir

from edgeattn.export.support.versions import Version, parse_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("edgeattn.export.support").joinpath("operators.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def is_imported(operator: str, version: Version) -> bool:
    """Say whether the parser of a version has an importer for an operator, whatever its domain."""
    first = _table()["since"].get(operator)
    return operator in _imported() and (first is None or version >= parse_version(first))


def first_version(operator: str) -> Version | None:
    """Return the first version that imports an operator, or None for one that no known version does."""
    if operator not in _imported():
        return None
    return parse_version(_table()["since"].get(operator, "10.0"))


def is_refused_by_name(operator: str, version: Version) -> bool:
    """Say whether the parser names an operator only to refuse it, before it looks for functions and plugins."""
    section = _table()["refused_by_name"]
    until = section["until_named"].get(operator)
    return operator in section["operators"] or (until is not None and version < parse_version(until))


@cache
def _imported() -> frozenset[str]:
    return frozenset(operator for group in _table()["types"] for operator in group["operators"])


@cache
def documented_types(operator: str) -> frozenset[ir.DataType]:
    """Return the element types that the operator table lists for the data input; empty where it says nothing."""
    found = frozenset(
        ir.DataType[name] for group in _table()["types"] if operator in group["operators"] for name in group["types"]
    )
    if found and operator in _table()["bytes"]["operators"]:
        found |= {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4}
    return found


@cache
def refused_types(operator: str, version: Version) -> frozenset[ir.DataType]:
    """Return the element types of the data input that the operator's importer refuses."""
    return frozenset(
        ir.DataType[name]
        for group in _table()["refused"]
        if operator in group["operators"]
        and version >= parse_version(group.get("since", "0.0"))
        and version < parse_version(group.get("before", "99.0"))
        for name in group["types"]
    )


def returned_outputs(operator: str) -> int | None:
    """Return how many outputs the importer gives, where that is a fixed number worth checking."""
    return _table()["outputs"].get(operator)


def library_plugin(operator: str) -> str | None:
    """Return the plugin of NVIDIA's library that an importer asks for, or that a model names itself."""
    if operator in _table()["library_plugins"]["names"]:
        return operator
    return _table()["library"].get(operator)


def on_dla(operator: str) -> bool:
    """Say whether an operator has a layer on DLA."""
    return operator in _table()["dla"]["operators"]


def opset_range(version: Version) -> tuple[int, int]:
    """Return the oldest and the newest opset that the operator table of a version covers."""
    section = _table()["opsets"]
    newest = [opset for first, opset in section["newest"].items() if version >= parse_version(first)]
    return section["oldest"], max(newest, default=20)
