"""The user's own models: declared networks with other classes, sizes or preprocessing, in a TOML file.

    [model.parts]
    base = "ccnet-r101"                   # a declared network or a variant of one
    classes = ["background", "screw", "nut"]
    size = [512, 512]
    colour_order = "RGB"
    scale = 0.00392156862745098           # a network input is (pixel * scale - mean) / std
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    summary = "CCNet on machine parts"

Only `base` is required. The number of classes says how many rows the last layer has.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeattn.foundation import UserError
from edgeattn.foundation.tables import SIZE, TEXT, TEXTS, Reader, key, number, read_table, read_toml, refuse_unknown
from edgeattn.models.spec import ModelSpec

VARIABLE = "EDGEATTN_MODELS"
"""Environment variable that names the user's own file; empty for none."""

DEFAULT_FILE = Path("~/.config/edgeattn/models.toml")
"""The user's own file where the variable is not set."""

_HINT = 'See "Use it on your checkpoint" in the README.'
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _colours(value: Any) -> str | None:
    return value if value in ("RGB", "BGR") else None


def _scale(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and 0 < found < float("inf") else None


def _triple(reads: Callable[[Any], float | None]) -> Callable[[Any], tuple[float, ...] | None]:
    def read(value: Any) -> tuple[float, ...] | None:
        found = [reads(entry) for entry in value] if isinstance(value, list) else []
        return tuple(entry for entry in found if entry is not None) if len(found) == 3 and None not in found else None

    return read


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """One table of the file; what it leaves out is as in the base.

    Attributes:
        base: a declared network, or a variant of one.
        summary: one line for listings.
        size: (height, width) that the model was trained at.
        classes: class names by label.
        colour_order: "RGB" or "BGR".
        scale: factor on the 0..255 pixel values.
        mean: per channel, in the colour order, after scaling.
        std: per channel, in the colour order, after scaling.
    """

    base: str = key(TEXT)
    summary: str | None = key(TEXT, None)
    size: tuple[int, int] | None = key(SIZE, None)
    classes: tuple[str, ...] | None = key(TEXTS, None)
    colour_order: str | None = key(Reader(_colours, '"RGB" or "BGR"'), None)
    scale: float | None = key(Reader(_scale, "a number above 0"), None)
    mean: tuple[float, float, float] | None = key(Reader(_triple(number), "a list of three numbers"), None)
    std: tuple[float, float, float] | None = key(Reader(_triple(_scale), "a list of three numbers above 0"), None)


def read_own_models(
    path: Path, base_of: Callable[[str], ModelSpec], with_classes: Callable[[ModelSpec, int], ModelSpec]
) -> dict[str, ModelSpec]:
    """Return the declarations of a file by name.

    Args:
        path: the file.
        base_of: finds a declared network or variant by name.
        with_classes: returns the variant of a network that has so many classes; raises `UserError` where none has.

    Raises:
        UserError: the file cannot be read, or something in it cannot be used.
    """
    content = read_toml(path, "models file", _HINT)
    refuse_unknown(content, ("model",), str(path), _HINT)
    tables = content.get("model", {})
    if not isinstance(tables, dict):
        raise UserError(f"model in {path} is no table. Write [model.NAME] above the keys of a model. {_HINT}")
    found = {}
    for name, table in tables.items():
        place = f"[model.{name}] in {path}"
        if not _NAME.fullmatch(name):
            raise UserError(f"{place}: use up to 64 letters, digits, dots, dashes and underscores as a name.")
        own = read_table(OwnModel, table, place, _HINT)
        try:
            found[name] = _declared(name, own, base_of(own.base), with_classes)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return found


def _declared(
    name: str, own: OwnModel, base: ModelSpec, with_classes: Callable[[ModelSpec, int], ModelSpec]
) -> ModelSpec:
    """Return the base with what the table says, and without bundled weights and data, which are not the user's."""
    spec = base if own.classes is None else with_classes(base, len(own.classes))
    turned = own.colour_order is not None and own.colour_order != spec.preprocessing.colour_order
    if turned and (own.mean is None or own.std is None):
        raise UserError(
            f"colour_order is {own.colour_order}, but that of {base.name} is {spec.preprocessing.colour_order}. Give "
            "mean and std in the new order too."
        )
    given = {
        field.name: getattr(own, field.name)
        for field in dataclasses.fields(spec.preprocessing)
        if hasattr(own, field.name)
    }
    fields = {"summary": own.summary or f"own model, after {base.name}", "size": own.size, "classes": own.classes}
    return dataclasses.replace(
        spec,
        name=name,
        preprocessing=dataclasses.replace(spec.preprocessing, **_present(given)),
        checkpoint=None,
        samples=None,
        calibration=None,
        **_present(fields),
    )


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
