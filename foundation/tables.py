"""Tables of TOML files that users write, read by the keys that a dataclass declares."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from edgeattn.foundation.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """What reads the value of a key.

    Attributes:
        read: returns the value that the program uses; None where the file's cannot be used.
        wanted: what the value has to be, in words.
    """

    read: Callable[[Any], Any]
    wanted: str


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _size(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    height, width = value
    return (height, width) if _count(height) and _count(width) and 16 <= min(value) <= max(value) <= 16384 else None


def number(value: Any) -> float | None:
    """Return a number as a float; None where it is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


TEXT = Reader(lambda value: value if isinstance(value, str) and value else None, "a text")
TRUTH = Reader(lambda value: value if isinstance(value, bool) else None, "true or false")
COUNT = Reader(_count, "a whole number above 0")
SIZE = Reader(_size, "[height, width] of 16 to 16384 pixels, such as [128, 160]")


def several(reader: Reader, wanted: str) -> Reader:
    """Return a reader of a list without repetitions of what another one reads."""

    def read(value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, list) or not value:
            return None
        members = tuple(reader.read(member) for member in value)
        return members if None not in members and len(set(members)) == len(members) else None

    return Reader(read, wanted)


TEXTS = several(TEXT, "a list of different texts")


def key(reader: Reader, default: Any = MISSING) -> Any:
    """Declare a field of a dataclass as a key: what reads its value, and its default."""
    if default is MISSING:
        return field(metadata={"reader": reader})
    return field(default=default, metadata={"reader": reader})


def read_toml(path: Path, what: str, hint: str) -> dict[str, Any]:
    """Return the content of a file.

    Args:
        path: the file.
        what: what it holds, such as "sweep", for messages.
        hint: where a user finds out more.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8: {error}. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the {what} {path} is not TOML: {error}. {hint}") from error


def read_table(kind: type[T], table: Any, place: str, hint: str) -> T:
    """Read one table by the keys that a dataclass declares.

    Args:
        kind: the dataclass, whose fields are made by `key`.
        table: what the file holds.
        place: where in the file that is, for messages.
        hint: where a user finds out more.

    Raises:
        UserError: it is no table, a key is unknown or missing, or a value cannot be used.
    """
    if not isinstance(table, dict):
        raise UserError(f"{place} is {table!r}, not a table. {hint}")
    keys = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    refuse_unknown(table, tuple(keys), place, hint)
    values: dict[str, Any] = {}
    for name, value in table.items():
        reader = keys[name].metadata["reader"]
        if (values.setdefault(name, reader.read(value))) is None:
            raise UserError(f"{name} of {place} is {value!r}, not {reader.wanted}. {hint}")
    if missing := [name for name, entry in keys.items() if entry.default is MISSING and name not in values]:
        raise UserError(f"{place} lacks the key {missing[0]!r}. {hint}")
    return kind(**values)


def refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], place: str, hint: str) -> None:
    """Raise a `UserError` where a table holds a key that is not known."""
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            question = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            raise UserError(f"unknown key {name!r} in {place}. {question} {hint}")


def user_file(variable: str, default: Path) -> Path | None:
    """Return the user's own file of one kind: what an environment variable names, else the default one if it exists.

    Args:
        variable: name of the environment variable; where it is empty there is no file.
        default: the file where the variable is not set; may begin with "~".

    Raises:
        UserError: the variable names what is not a file.
    """
    if (named := os.environ.get(variable)) is not None:
        if named and not Path(named).is_file():
            raise UserError(f"{variable} names {named}, which is not a file. Correct the variable, or unset it.")
        return Path(named) if named else None
    found = Path(os.path.expanduser(default))  # noqa: PTH111  (Path.expanduser raises where there is no home)
    return found if found.is_file() else None
