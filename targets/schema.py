"""The form of a targets file: which tables and fields it may hold, and messages for what it may not.

The table `source` holds texts that rows refer to by key. A row of the other tables is a name and fields, which `FIELDS`
lists. Software and hardware combine into targets by themselves; rows of `target` are for users, who start from another
target (`base`) and override figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError
from edgeattn.foundation.tables import read_toml

OLDEST_TENSORRT = (10, 3)
"""Oldest TensorRT that anything here is exported for."""


@dataclass(frozen=True)
class Field:
    """One field of a row.

    Attributes:
        read: returns the value that the program uses; raises ValueError or TypeError when the file's is not usable.
        expects: what the value has to be, in words.
        required: whether every row has to have it.
    """

    read: Callable[[Any], Any]
    expects: str
    required: bool = False


@dataclass(frozen=True)
class Row:
    """A checked row of a targets file.

    Attributes:
        file: the file it is in.
        table: name of its table.
        name: name within the table.
        values: usable values, by field; fields that the file leaves out are absent.
    """

    file: Path
    table: str
    name: str
    values: Mapping[str, Any]

    def error(self, problem: str) -> UserError:
        """Return the error that names this row."""
        return UserError(f"{self.file}: {self.table} {self.name!r}: {problem}")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return tuple(_text(item) for item in value)


def _release(value: Any) -> str:
    if not re.fullmatch(r"\d{1,4}(\.\d{1,6}){1,3}", value):
        raise ValueError
    return str(value)


def version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as "10.3.0.30"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _tensorrt(value: Any) -> str:
    if version(_release(value)) < OLDEST_TENSORRT:
        raise ValueError
    return str(value)


def _version(value: Any) -> tuple[int, int]:
    if not re.fullmatch(r"\d{1,4}\.\d{1,4}", value):
        raise ValueError
    return version(value)


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return read


def _rate(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError
    return float(value)


def _figures(value: Any) -> frozenset[str]:
    if not set(_texts(value)) <= set(FIGURES):
        raise ValueError
    return frozenset(value)


def _sources(value: Any) -> dict[str, str]:
    if not set(value) <= set(FIGURES):
        raise ValueError
    return {figure: _text(text) for figure, text in value.items()}


_RATE = "a number above 0"
_SUMMARY = Field(_text, "a text in quotes", required=True)
_ALIASES = Field(_texts, 'a list of names, such as ["jetpack-6.2.1"]')
_SOFTWARE_FIGURES = {
    "tensorrt": Field(_tensorrt, 'a TensorRT version in quotes, 10.3 or later, such as "10.3.0.30"', required=True),
    "cuda": Field(_version, 'a CUDA version in quotes, major and minor, such as "12.6"', required=True),
    "opset": Field(_integer(18, 22), "an ONNX opset from 18 to 22", required=True),
    "cudnn": Field(_text, 'a cuDNN version in quotes, such as "9.3.0"'),
    "python": Field(_text, 'a Python version or range in quotes, such as "3.10"'),
}
_HARDWARE_FIGURES = {
    "sm": Field(_integer(80, 999), "a CUDA architecture without the dot, such as 87 (80 at least)", required=True),
    "shared_memory_kib": Field(_integer(48, 1024), "a whole number of KiB, 48 to 1024"),
    "dla_cores": Field(_integer(0, 16), "a whole number, 0 to 16"),
    "memory_gib": Field(_rate, _RATE),
    "bandwidth_gb_s": Field(_rate, _RATE),
    "int8_tops": Field(_rate, _RATE),
    "fp16_tflops": Field(_rate, _RATE),
}
_PTX_ISA = Field(_integer(70, 999), "a PTX ISA without the dot, such as 85 for 8.5")
FIGURES: Mapping[str, Field] = {**_SOFTWARE_FIGURES, **_HARDWARE_FIGURES, "ptx_isa": _PTX_ISA}
"""The fields of a target that have a source and may be unverified."""

_ORIGIN = {
    "source": Field(_text, "a text in quotes, or a key of the table [source]"),
    "sources": Field(_sources, f"a table from figures ({', '.join(FIGURES)}) to texts in quotes"),
    "unverified": Field(_figures, f"a list of figures ({', '.join(FIGURES)})"),
}


def _required(field: Field) -> Field:
    return Field(field.read, field.expects, required=True)


def _optional(fields: Mapping[str, Field]) -> dict[str, Field]:
    return {name: Field(field.read, field.expects) for name, field in fields.items()}


FIELDS: Mapping[str, Mapping[str, Field]] = {
    "cuda": {"ptx_isa": _required(_PTX_ISA), "source": _required(_ORIGIN["source"])},
    "sm": {
        "summary": _SUMMARY,
        "minimum_ptx_isa": _required(_PTX_ISA),
        "shared_memory_kib": _required(_HARDWARE_FIGURES["shared_memory_kib"]),
        "source": _required(_ORIGIN["source"]),
        "unverified": _ORIGIN["unverified"],
    },
    "software": {
        "summary": _SUMMARY,
        "aliases": _ALIASES,
        "hardware": Field(_texts, 'a list of hardware, such as ["orin"]', required=True),
        **_SOFTWARE_FIGURES,
        **_ORIGIN,
        "source": _required(_ORIGIN["source"]),
    },
    "hardware": {
        "summary": _SUMMARY,
        "aliases": _ALIASES,
        "family": Field(_text, 'the name of a family, such as "orin"'),
        "software": Field(_texts, 'a list of software, such as ["jetpack-6.2"]'),
        **_HARDWARE_FIGURES,
        **_ORIGIN,
        "source": _required(_ORIGIN["source"]),
    },
    "target": {
        "base": Field(_text, 'the name of a target to start from, such as "jetpack-6.2-orin-nx-16"'),
        "summary": Field(_text, "a text in quotes"),
        **_optional(FIGURES),
        **_ORIGIN,
    },
    "unsupported": {
        "summary": _SUMMARY,
        "names": Field(_texts, 'a list of beginnings of names, such as ["jetpack-5"]', required=True),
        "reason": Field(_text, "a text in quotes", required=True),
        "instead": Field(_text, "a text in quotes", required=True),
        "source": _required(_ORIGIN["source"]),
    },
}
"""The fields of a row, by table."""

_NAMES = {"cuda": r"\d{1,4}\.\d{1,4}", "sm": r"\d{2,3}"}
"""Patterns of row names, where they are not names as those of targets."""


def read(file: Path) -> tuple[dict[str, str], list[Row]]:
    """Read and check one targets file.

    Args:
        file: TOML file.

    Returns:
        The texts of the table `source` by key, and the rows of the other tables in the order of the file.

    Raises:
        UserError: the file cannot be read, is not TOML, or holds a table, row or field that is not usable.
    """
    content = read_toml(file, "targets file", "Correct that line.")
    texts: dict[str, str] = {}
    rows = []
    for table, members in content.items():
        if table != "source" and table not in FIELDS:
            raise UserError(f"{file}: unknown table [{table}]. The tables are source, {', '.join(FIELDS)}.")
        if not isinstance(members, dict):
            raise UserError(
                f"{file}: {table} = {members!r} is not a table. Write its rows as [{table}.NAME], each with its fields."
            )
        for name, fields in members.items():
            if table == "source":
                texts[name] = _checked(Row(file, table, name, {}), "text", fields, Field(_text, "a text in quotes"))
            else:
                rows.append(_row(file, table, name, fields))
    return texts, rows


def _row(file: Path, table: str, name: str, fields: Any) -> Row:
    row = Row(file, table, name, {})
    if not re.fullmatch(_NAMES.get(table, r"[a-z0-9]+([.-][a-z0-9]+)*"), name):
        raise row.error(
            "the name cannot be used. "
            + ("Write it as " + {"cuda": "12.6", "sm": "87"}[table] if table in _NAMES else "Use a-z, 0-9, . and -")
            + "."
        )
    if not isinstance(fields, dict):
        raise row.error(f"it is {fields!r}, not a table. Write [{table}.{name}], with a line for each field.")
    known = FIELDS[table]
    for field in fields:
        if field not in known:
            dotted = f'"{name}.{field}"'
            hint = f" A name with a dot needs quotes: [{table}.{dotted}]." if isinstance(fields[field], dict) else ""
            raise row.error(f"unknown field {field} = {fields[field]!r}. The fields are {', '.join(known)}.{hint}")
    for field, form in known.items():
        if form.required and field not in fields:
            raise row.error(f"the field {field} is missing. Add it: {form.expects}.")
    values = {field: _checked(row, field, value, known[field]) for field, value in fields.items()}
    return Row(file, table, name, values)


def _checked(row: Row, field: str, value: Any, form: Field) -> Any:
    try:
        return form.read(value)
    except (ValueError, TypeError, AttributeError):
        raise row.error(f"{field} = {value!r} cannot be used. Write {form.expects}.") from None
