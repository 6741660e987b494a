"""The file that declares a sweep: `SWEEP.toml`.

Tables and keys (`edgeattn sweep --example` prints a commented file; only `[[checkpoint]]` with `name` and `model`, and
`[[target]]` with `name`, are required):

- `title`: heading of the comparison page.
- `[matrix]`: `precisions`, `plugins`, `sizes`; see `Matrix`.
- `[[checkpoint]]`, repeated: `name`, `model`, `path`, `layout`, `sizes`, `images`, `calibration`; see `Checkpoint`.
- `[[target]]`, repeated: `name`, `resource`; see `SweepTarget`.
- `[options]`: `samples`, `golden`, `bundle`, `opset`, `fp16_exclude`, `int8_exclude`, `calibration_method`,
  `weights_licence`; see `Options`.
- `[device]`: `engine`, `python`, `runs`, `seconds`, `warm_up`; see `Device`.

Whatever else is in the file is refused with its name and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from edgeattn.deploy.bundle import GOLDEN_COUNT, NOT_STATED
from edgeattn.deploy.device.engines import BACKENDS
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.export.calibration_methods import DEFAULT_METHOD, method_named
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.targets import TARGETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TENSORRT = "tensorrt"
Size = tuple[int, int]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HINT = "`edgeattn sweep --example` shows all keys."


def _kind(reader: Callable[[Any], Any], default: Any = MISSING) -> Any:
    """Declare a key: what reads its value (None says: not of this type), and its default."""
    if default is MISSING:
        return field(metadata={"reader": reader})
    return field(default=default, metadata={"reader": reader})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _duration(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else None


def _size(value: Any) -> Size | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    height, width = value
    return (height, width) if _count(height) and _count(width) and 16 <= min(value) <= max(value) <= 16384 else None


def _several(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of a list without repetitions of what another one reads."""

    def read(value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, list) or not value:
            return None
        members = tuple(reader(member) for member in value)
        return members if None not in members and len(set(members)) == len(members) else None

    return read


_WANTED: dict[Callable[[Any], Any], str] = {
    _text: "a text",
    _truth: "true or false",
    _count: "a whole number above 0",
    _duration: "a number of seconds",
}
_texts, _truths, _sizes = _several(_text), _several(_truth), _several(_size)
_WANTED |= {
    _texts: "a list of different texts",
    _truths: "a list such as [false, true]",
    _sizes: "a list of different [height, width] of 16 to 16384 pixels, such as [[64, 80], [128, 160]]",
}


@dataclass(frozen=True)
class Matrix:
    """What every checkpoint and every target is combined with.

    Attributes:
        precisions: of `PRECISIONS`.
        plugins: without plugin nodes, with them, or both.
        sizes: (height, width) of the inputs; each model's own when None.
    """

    precisions: tuple[str, ...] = _kind(_texts, ("fp32", "fp16"))
    plugins: tuple[bool, ...] = _kind(_truths, (False,))
    sizes: tuple[Size, ...] | None = _kind(_sizes, None)


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights.

    Attributes:
        name: short name for tables and files.
        model: name of the model's declaration.
        path: file of the weights, or "bundled".
        layout: their published layout; told from their names when None.
        sizes: in place of the matrix's.
        images: folder of images that parity is judged on; the model's held-out samples when None.
        calibration: images or .npz for INT8 and ranges; bundled training images when None.
    """

    name: str = _kind(_text)
    model: str = _kind(_text)
    path: str = _kind(_text, BUNDLED)
    layout: str | None = _kind(_text, None)
    sizes: tuple[Size, ...] | None = _kind(_sizes, None)
    images: str | None = _kind(_text, None)
    calibration: str | None = _kind(_text, None)


@dataclass(frozen=True)
class SweepTarget:
    """A deployment target.

    Attributes:
        name: the target's name.
        resource: what workers have that stand for it, such as "jetson-orin"; no device is asked when None.
    """

    name: str = _kind(_text)
    resource: str | None = _kind(_text, None)


@dataclass(frozen=True)
class Options:
    """What holds for all combinations.

    Attributes:
        samples: images that parity is judged on, at most.
        golden: golden samples in a bundle, at most.
        bundle: pack bundles.
        opset: of the graphs; the target's when None.
        fp16_exclude: what stays FP32 in FP16 and BF16 forms.
        int8_exclude: what stays in floating point in INT8 forms.
        calibration_method: how ranges of INT8 are chosen.
        weights_licence: licence of the trained weights.
    """

    samples: int = _kind(_count, 200)
    golden: int = _kind(_count, GOLDEN_COUNT)
    bundle: bool = _kind(_truth, True)
    opset: int | None = _kind(_count, None)
    fp16_exclude: tuple[str, ...] = _kind(_texts, ())
    int8_exclude: tuple[str, ...] = _kind(_texts, ())
    calibration_method: str = _kind(_text, DEFAULT_METHOD)
    weights_licence: str = _kind(_text, NOT_STATED)


@dataclass(frozen=True)
class Device:
    """How bundles are built, verified and timed.

    Attributes:
        engine: "tensorrt" on workers with a target's resource, or "onnxruntime": a rehearsal on any worker.
        python: Python that has what the engine needs; the worker's own when None.
        runs: timed runs at most.
        seconds: of timing at most.
        warm_up: seconds before.
    """

    engine: str = _kind(_text, TENSORRT)
    python: str | None = _kind(_text, None)
    runs: int = _kind(_count, 2000)
    seconds: float = _kind(_duration, 120.0)
    warm_up: float = _kind(_duration, 2.0)


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file declares it; every name in it is known and every path absolute.

    Attributes:
        title: heading of the comparison page.
        matrix: what checkpoints and targets are combined with.
        checkpoints: the trained weights.
        targets: the targets.
        options: what holds for all.
        device: how bundles are tried; they are not when None.
    """

    title: str
    matrix: Matrix
    checkpoints: tuple[Checkpoint, ...]
    targets: tuple[SweepTarget, ...]
    options: Options
    device: Device | None


def example() -> str:
    """Return a commented sweep file, which is valid as it stands."""
    return resources.files("edgeattn.deploy.sweep").joinpath("example.toml").read_text(encoding="utf-8")


def read_sweep(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        UserError: the file cannot be read, a key or name in it is unknown, or a value cannot be used; the message names
            it and, where there is one, the nearest that is known.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the sweep {path} ({error}). Check the path.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}. {_HINT}") from error
    _refuse_unknown(content, ("title", "matrix", "checkpoint", "target", "options", "device"), f"{path}")
    title = content.get("title", path.stem)
    if _text(title) is None:
        raise UserError(f"title in {path} is {title!r}, not a text. {_HINT}")
    device = content.get("device")
    sweep = Sweep(
        title=title,
        matrix=_table(Matrix, content.get("matrix", {}), f"[matrix] in {path}"),
        checkpoints=tuple(
            _absolute(_table(Checkpoint, table, place), path.parent)
            for table, place in _tables(content, "checkpoint", path)
        ),
        targets=tuple(_table(SweepTarget, table, place) for table, place in _tables(content, "target", path)),
        options=_table(Options, content.get("options", {}), f"[options] in {path}"),
        device=None if device is None else _table(Device, device, f"[device] in {path}"),
    )
    _check(sweep, path)
    return sweep


T = TypeVar("T")


def _table(kind: type[T], table: Any, place: str) -> T:
    """Read one table by the keys that a dataclass declares."""
    if not isinstance(table, dict):
        raise UserError(f"{place} is {table!r}, not a table. {_HINT}")
    keys = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(table, tuple(keys), place)
    values: dict[str, Any] = {}
    for name, value in table.items():
        reader = keys[name].metadata["reader"]
        if (values.setdefault(name, reader(value))) is None:
            raise UserError(f"{name} of {place} is {value!r}, not {_WANTED[reader]}. {_HINT}")
    if missing := [name for name, entry in keys.items() if entry.default is MISSING and name not in values]:
        raise UserError(f"{place} lacks the key {missing[0]!r}. {_HINT}")
    return kind(**values)


def _tables(content: Mapping[str, Any], name: str, path: Path) -> list[tuple[Any, str]]:
    tables = content.get(name, [])
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path} declares no {name}. Add a table [[{name}]]. {_HINT}")
    return [(table, f"[[{name}]] number {number} in {path}") for number, table in enumerate(tables, 1)]


def _refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            question = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
            raise UserError(f"unknown key {name!r} in {place}. {question} {_HINT}")


def _absolute(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Take paths from the folder of the sweep's file, and refuse those that lead nowhere."""
    paths: dict[str, Any] = {}
    for name in ("path", "images", "calibration"):
        given = getattr(checkpoint, name)
        if given is None or (name == "path" and given == BUNDLED):
            continue
        path = (folder / given).absolute()
        if not path.exists():
            raise UserError(f"{name} of the checkpoint {checkpoint.name!r} does not exist: {path}. Check the path.")
        paths[name] = str(path)
    return dataclasses.replace(checkpoint, **paths)


def _check(sweep: Sweep, path: Path) -> None:
    """Refuse unknown names and repetitions."""
    if unknown := [name for name in sweep.matrix.precisions if name not in PRECISIONS]:
        near = difflib.get_close_matches(unknown[0], PRECISIONS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Choose from {', '.join(PRECISIONS)}."
        raise UserError(f"unknown precision {unknown[0]!r} in [matrix] in {path}. {hint}")
    for checkpoint in sweep.checkpoints:
        if not _NAME.fullmatch(checkpoint.name):
            raise UserError(
                f"the checkpoint's name {checkpoint.name!r} in {path} becomes part of file names. Use up to 64 "
                "letters, digits, dots, dashes and underscores."
            )
        MODELS.get(checkpoint.model)
    for target in sweep.targets:
        TARGETS.get(target.name)
    for what, names in (
        ("checkpoint", [checkpoint.name for checkpoint in sweep.checkpoints]),
        ("target", [target.name for target in sweep.targets]),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"the {what} {twice[0]!r} is declared twice in {path}. Rename or remove one.")
    method_named(sweep.options.calibration_method)
    _check_device(sweep, path)


def _check_device(sweep: Sweep, path: Path) -> None:
    named = [target for target in sweep.targets if target.resource is not None]
    if sweep.device is None:
        if named:
            raise UserError(
                f"the target {named[0].name} in {path} names the resource {named[0].resource!r}, but there is no table "
                "[device] that says what to do there. Add one, or drop the resource."
            )
        return
    if sweep.device.engine not in BACKENDS:
        raise UserError(
            f"unknown engine {sweep.device.engine!r} in [device] in {path}. Choose {' or '.join(BACKENDS)}."
        )
    if not sweep.options.bundle:
        raise UserError(f"[device] in {path} tries bundles, but bundle = false in [options]. Drop one of the two.")
    if sweep.device.engine == TENSORRT and not named:
        raise UserError(
            f"[device] in {path} wants TensorRT, but no target names the resource of its workers. Add for example "
            'resource = "jetson-orin" to a [[target]].'
        )
