"""Networks that differ from a published one in what they were constructed with, such as the number of classes.

Wherever a model is named, so may be a variant of it: `ccnet-r101:num_classes=21`, `eca-resnet50:k_sizes=3x5x5x5`,
`nonlocal-r50-mmseg:num_classes=150,align_corners=true`. What a checkpoint's shapes tell need not be written: the guess
from a checkpoint names the variant.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgeattn.blocks.recognition import Shapes
from edgeattn.foundation import Registry, UserError
from edgeattn.foundation.tables import user_file
from edgeattn.models.own import DEFAULT_FILE, VARIABLE, read_own_models
from edgeattn.models.spec import ModelSpec

ALIGN_CORNERS = "align_corners"
"""The one argument that is not the network's: how the label rule resizes logits."""

_MARK, _AND, _IS, _TIMES = ":", ",", "=", "x"
_CLASSES = "num_classes"
_WORDS = {"true": True, "false": False}


class ModelRegistry(Registry[ModelSpec]):
    """Declared networks and the user's own models; their variants are found by name too, but are no members."""

    def get(self, name: str) -> ModelSpec:
        """Return the declaration called `name`, or the variant that is written so.

        Raises:
            UserError: there is no such network, it has no such argument, the value is of another kind, or the user's
                file cannot be used.
        """
        return _resolved(name, self._member)

    def __iter__(self) -> Iterator[ModelSpec]:
        yield from super().__iter__()
        yield from self._own().values()

    def __len__(self) -> int:
        return super().__len__() + len(self._own())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._own()

    def _member(self, name: str) -> ModelSpec:
        """Return a declared network or an own model; the user's file is read only for what is not declared."""
        own: Mapping[str, ModelSpec] = {} if name in self._members else self._own()
        return own.get(name) or super().get(name)

    def _own(self) -> Mapping[str, ModelSpec]:
        """Return the models of the user's file, by name."""
        path = user_file(VARIABLE, DEFAULT_FILE)
        if path is None:
            return {}
        own = _read(path, functools.partial(_resolved, find=super().get))
        if taken := [name for name in own if name in self._members]:
            raise UserError(f"[model.{taken[0]}] in {path} has the name of a declared network. Rename it.")
        return own


def _resolved(name: str, find: Callable[[str], ModelSpec]) -> ModelSpec:
    """Return the network called `name`, or the variant that is written so of the one that is found."""
    base, mark, changes = name.partition(_MARK)
    spec = find(base)
    return variant(spec, _parsed(spec, changes)) if mark else spec


_FILES: dict[Path, Mapping[str, ModelSpec]] = {}


def _read(path: Path, base_of: Callable[[str], ModelSpec]) -> Mapping[str, ModelSpec]:
    """Read a user's file once."""
    if path not in _FILES:
        _FILES[path] = read_own_models(path, base_of, with_classes)
    return _FILES[path]


def numbered_classes(count: int) -> tuple[str, ...]:
    """Return names for `count` classes whose names no checkpoint depends on."""
    return tuple(f"class {index}" for index in range(count))


def variant(spec: ModelSpec, changes: Mapping[str, object]) -> ModelSpec:
    """Return the declaration of a network that is constructed with other arguments.

    A network of other shapes has no bundled weights and samples, and no published listing. Other classes than the
    declared ones are numbered.

    Args:
        spec: the declared network.
        changes: value by argument; those that say what is declared anyway are dropped.

    Returns:
        The variant, whose name states the changes; the declaration itself where nothing changes.
    """
    known = _arguments(spec)
    changes = {name: value for name, value in changes.items() if known[name] != value}
    if not changes:
        return spec
    fields: dict[str, object] = {}
    if ALIGN_CORNERS in changes:
        fields["labels"] = functools.partial(spec.labels, **{ALIGN_CORNERS: changes[ALIGN_CORNERS]})
    if changes.get(_CLASSES) and len(spec.classes) == known[_CLASSES]:
        fields["classes"] = numbered_classes(int(str(changes[_CLASSES])))
    if any(name in spec.told for name in changes):
        layouts = tuple(dataclasses.replace(layout, listing=None) for layout in spec.layouts)
        fields |= {"checkpoint": None, "samples": None, "calibration": None, "layouts": layouts}
    own = {name: value for name, value in changes.items() if name != ALIGN_CORNERS}
    fields["arguments"] = {**spec.arguments, **own}
    written = _AND.join(f"{name}{_IS}{_written(value)}" for name, value in changes.items())
    return dataclasses.replace(spec, name=f"{spec.name}{_MARK}{written}", **fields)  # type: ignore[arg-type]


def with_classes(spec: ModelSpec, count: int) -> ModelSpec:
    """Return the variant of a network that tells so many classes apart.

    Raises:
        UserError: the number of its classes is not that of its last layer's rows, and another one.
    """
    if len(spec.classes) == count:
        return spec
    if _arguments(spec).get(_CLASSES) != len(spec.classes):
        raise UserError(f"{spec.name} has {len(spec.classes)} classes, not {count}. Name as many.")
    return variant(spec, {_CLASSES: count})


def variant_of_shapes(spec: ModelSpec, shapes: Shapes) -> ModelSpec:
    """Return the variant of a network that the shapes of a state belong to, as far as they tell.

    Args:
        spec: the declared network.
        shapes: shape by our name of each tensor.
    """
    told = {name: source.read(shapes) for name, source in spec.told.items()}
    return variant(spec, {name: value for name, value in told.items() if value is not None})


def _arguments(spec: ModelSpec) -> dict[str, object]:
    """Return the declared value of each argument that a variant may have otherwise."""
    defaults = {name: entry.default for name, entry in inspect.signature(spec.network).parameters.items()}
    known = {_CLASSES: len(spec.classes), **defaults, **spec.arguments}
    found = {name: known[name] for name in (*spec.told, *spec.free)}
    if any(output.meaning == "logits" for output in spec.outputs):
        found[ALIGN_CORNERS] = spec.align_corners
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _parsed(spec: ModelSpec, text: str) -> dict[str, object]:
    """Return the values that the part behind a network's name states."""
    known, changes = _arguments(spec), dict[str, object]()
    for part in text.split(_AND):
        name, mark, value = part.partition(_IS)
        if not known:
            raise UserError(f"{spec.name} has no variants, but {text!r} follows its name. Write {spec.name} alone.")
        if not mark or name not in known:
            examples = " or ".join(f"{spec.name}{_MARK}{key}{_IS}{_written(kept)}" for key, kept in known.items())
            raise UserError(f"{part!r} names no argument of {spec.name} that may vary. Write for example {examples}.")
        if name in changes:
            raise UserError(f"{name} is given twice for {spec.name}. Write it once.")
        changes[name] = _value(spec, name, value, known[name])
    return changes


def _value(spec: ModelSpec, name: str, text: str, like: object) -> object:
    """Return a written value of the same kind as the declared one."""
    try:
        if isinstance(like, bool):
            return _WORDS[text.lower()]
        numbers = tuple(int(number) for number in text.split(_TIMES))
        if min(numbers) < 1 or len(numbers) != (len(like) if isinstance(like, tuple) else 1):
            raise ValueError(text)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{text!r} is no value for {name} of {spec.name}. Write it like the declared {_written(like)}."
        ) from error
    return numbers if isinstance(like, tuple) else numbers[0]


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return _TIMES.join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


MODELS = ModelRegistry("model")
"""Every declared network."""
