"""Optimisation profiles: the smallest, the usual and the largest shape of each input, in trtexec's syntax."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from edgeattn.foundation import UserError

Axes = tuple[int | str, ...]
"""Shape of an input; a dynamic axis is its name, or "?" where the model gives it none."""


@dataclass(frozen=True)
class InputRange:
    """The shapes that an engine takes for one input.

    Attributes:
        name: of the input.
        minimum: smallest shape.
        optimum: shape that the engine is made fast for.
        maximum: largest shape.
    """

    name: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, usual and largest shape."""
        return self.minimum, self.optimum, self.maximum


Profile = tuple[InputRange, ...]
"""One optimisation profile: a range for each input with dynamic axes."""


@dataclass(frozen=True)
class ProfileOptions:
    """What a user says about shapes; entries of one position belong to one profile.

    Attributes:
        minimum: smallest shapes in trtexec's syntax, such as "image:1x3x64x64,mask:1x64x64"; the usual ones when empty.
        optimum: usual shapes.
        maximum: largest shapes; the usual ones when empty.
        axes: ranges of named dynamic axes for all inputs, such as "batch=1:1:4"; instead of shapes.
    """

    minimum: tuple[str, ...] = ()
    optimum: tuple[str, ...] = ()
    maximum: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()


def input_axes(model: onnx.ModelProto) -> dict[str, Axes]:
    """Return the shape of every graph input that is not an initializer.

    Raises:
        UserError: an input has no shape: TensorRT's parser would take it for a scalar.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, Axes] = {}
    for info in model.graph.input:
        if info.name in constants:
            continue
        if not info.type.tensor_type.HasField("shape"):
            raise UserError(
                f"the input {info.name!r} of the ONNX model has no shape, and TensorRT would take it for a scalar. "
                "Export the model with shapes; axes that vary get names."
            )
        found[info.name] = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in info.type.tensor_type.shape.dim
        )
    return found


def make_profiles(inputs: Mapping[str, Axes], options: ProfileOptions) -> tuple[Profile, ...]:
    """Return the optimisation profiles of a model.

    Args:
        inputs: see `input_axes`.
        options: what the user says.

    Returns:
        None for a model of fixed shapes, else at least one.

    Raises:
        UserError: dynamic axes without a range, or ranges that are malformed, out of order or do not fit the model.
    """
    dynamic = {name: axes for name, axes in inputs.items() if any(isinstance(axis, str) for axis in axes)}
    given = [*options.minimum, *options.optimum, *options.maximum]
    if given and options.axes:
        raise UserError(
            f"both shapes ({given[0]}) and axes ({options.axes[0]}) are given. Give the one or the other; axes suit "
            "models whose inputs share the names of their axes."
        )
    if not dynamic:
        if options.axes:
            raise UserError(
                f"a range of axes is given ({options.axes[0]}), but the model has no dynamic axis. Drop it."
            )
        for text in given:
            _fit(parse_shapes(text), inputs, require=())
        return ()
    if options.axes:
        return (_from_axes(dynamic, options.axes),)
    if not options.optimum:
        raise UserError(_missing(dynamic))
    return tuple(_from_shapes(inputs, dynamic, options))


def _missing(dynamic: Mapping[str, Axes]) -> str:
    """Say which ranges are missing, with an example for this very model."""
    listed = "; ".join(f"{name} ({' x '.join(map(str, axes))})" for name, axes in dynamic.items())
    names = list(dict.fromkeys(axis for axes in dynamic.values() for axis in axes if isinstance(axis, str)))
    if "?" in names:
        shapes = ",".join(f"{name}:{'x'.join(str(axis) for axis in axes)}" for name, axes in dynamic.items())
        example = f"--opt-shapes {re.sub(r'[^x:,]*[?][^x:,]*', 'N', shapes)}, and --min-shapes and --max-shapes"
    else:
        example = " ".join(f"--axis {name}=MIN:OPT:MAX" for name in names)
    return (
        f"the model has dynamic axes, whose range decides which engine is built: {listed}. "
        f"Say it with {example}, with numbers in place of the capitals."
    )


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Return shapes by input name from trtexec's syntax: `name:1x3x64x64,other:1x5`; names may stand in quotes.

    Raises:
        UserError: another form, or an input that occurs twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, dims = part.strip().rpartition(":")
        name = name.strip("'")
        if not name or not re.fullmatch(r"\d{1,9}(x\d{1,9})*", dims) or name in shapes:
            raise UserError(
                f"the shapes {text!r} are not name:1x3x64x64,other:1x5 with each input once. Write them so."
            )
        shapes[name] = tuple(int(dim) for dim in dims.split("x"))
    return shapes


def _from_shapes(inputs: Mapping[str, Axes], dynamic: Mapping[str, Axes], options: ProfileOptions) -> Iterator[Profile]:
    for word, texts in (("smallest", options.minimum), ("largest", options.maximum)):
        if texts and len(texts) != len(options.optimum):
            raise UserError(
                f"{len(options.optimum)} times usual shapes, but {len(texts)} times {word} shapes are given. "
                "Each profile takes one of each."
            )
    for index, optimum in enumerate(options.optimum):
        triples = [
            _fit(parse_shapes(texts[index] if texts else optimum), inputs, require=tuple(dynamic))
            for texts in (options.minimum, options.optimum, options.maximum)
        ]
        yield tuple(_ordered(InputRange(name, *(shapes[name] for shapes in triples))) for name in dynamic)


def _fit(
    shapes: Mapping[str, tuple[int, ...]], inputs: Mapping[str, Axes], require: Sequence[str]
) -> Mapping[str, tuple[int, ...]]:
    """Check that shapes fit the inputs, and that all required inputs have one."""
    for name, shape in shapes.items():
        if name not in inputs:
            raise UserError(f"a shape is given for {name!r}, but the model's inputs are {', '.join(inputs)}.")
        axes = inputs[name]
        fits = len(axes) == len(shape) and all(isinstance(a, str) or a == s for a, s in zip(axes, shape, strict=True))
        if not fits:
            raise UserError(
                f"the shape {'x'.join(map(str, shape))} of {name!r} does not fit the model, which takes "
                f"{'x'.join(map(str, axes))}. Numbers there are fixed, names may vary."
            )
    if missing := [name for name in require if name not in shapes]:
        raise UserError(f"the input {missing[0]!r} has dynamic axes, but no shape among {', '.join(shapes)}. Add it.")
    return shapes


def _from_axes(dynamic: Mapping[str, Axes], texts: Sequence[str]) -> Profile:
    known = {axis for axes in dynamic.values() for axis in axes if isinstance(axis, str)}
    ranges: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+)=(\d{1,9}):(\d{1,9}):(\d{1,9})", text.strip())
        if not match:
            raise UserError(f"the axis {text!r} is not NAME=MIN:OPT:MAX. Write for example batch=1:1:4.")
        if match[1] not in known or match[1] in ranges:
            names = ", ".join(sorted(known - set(ranges))) or "none that is left"
            raise UserError(f"the axis {match[1]!r} cannot be given here. The model's dynamic axes are {names}.")
        ranges[match[1]] = tuple(int(match[group]) for group in (2, 3, 4))
    if missing := sorted(known - set(ranges)):
        raise UserError(f"the dynamic axis {missing[0]!r} has no range. {_missing(dynamic)}")
    return tuple(
        _ordered(
            InputRange(
                name,
                *(tuple(ranges[axis][end] if isinstance(axis, str) else axis for axis in axes) for end in range(3)),
            )
        )
        for name, axes in dynamic.items()
    )


def _ordered(entry: InputRange) -> InputRange:
    if not all(0 < low <= usual <= high for low, usual, high in zip(*entry.shapes, strict=True)):
        shapes = " <= ".join("x".join(map(str, shape)) for shape in entry.shapes)
        raise UserError(f"the shapes of {entry.name!r} are out of order: {shapes} must hold in every axis, from 1 up.")
    return entry


def shapes_text(profile: Profile, end: int) -> str:
    """Return the smallest (0), usual (1) or largest (2) shapes of a profile in trtexec's syntax."""
    return ",".join(f"{_quoted(entry.name)}:{'x'.join(map(str, entry.shapes[end]))}" for entry in profile)


def _quoted(name: str) -> str:
    return f"'{name}'" if ":" in name or "," in name else name
