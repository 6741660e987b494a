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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgeattn.deploy.bundle import GOLDEN_COUNT, NOT_STATED
from edgeattn.deploy.device.engines import BACKENDS
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.export.calibration_methods import DEFAULT_METHOD, method_named
from edgeattn.foundation import UserError
from edgeattn.foundation.tables import (
    COUNT,
    SIZE,
    TEXT,
    TEXTS,
    TRUTH,
    Reader,
    key,
    number,
    read_table,
    read_toml,
    refuse_unknown,
    several,
)
from edgeattn.models import MODELS
from edgeattn.targets import TARGETS

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TENSORRT = "tensorrt"
Size = tuple[int, int]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HINT = "`edgeattn sweep --example` shows all keys."


def _duration(value: Any) -> float | None:
    seconds = number(value)
    return seconds if seconds is not None and seconds >= 0 else None


_SECONDS = Reader(_duration, "a number of seconds")
_TRUTHS = several(TRUTH, "a list such as [false, true]")
_SIZES = several(SIZE, "a list of different [height, width] of 16 to 16384 pixels, such as [[64, 80], [128, 160]]")


@dataclass(frozen=True)
class Matrix:
    """What every checkpoint and every target is combined with.

    Attributes:
        precisions: of `PRECISIONS`.
        plugins: without plugin nodes, with them, or both.
        sizes: (height, width) of the inputs; each model's own when None.
    """

    precisions: tuple[str, ...] = key(TEXTS, ("fp32", "fp16"))
    plugins: tuple[bool, ...] = key(_TRUTHS, (False,))
    sizes: tuple[Size, ...] | None = key(_SIZES, None)


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

    name: str = key(TEXT)
    model: str = key(TEXT)
    path: str = key(TEXT, BUNDLED)
    layout: str | None = key(TEXT, None)
    sizes: tuple[Size, ...] | None = key(_SIZES, None)
    images: str | None = key(TEXT, None)
    calibration: str | None = key(TEXT, None)


@dataclass(frozen=True)
class SweepTarget:
    """A deployment target.

    Attributes:
        name: the target's name.
        resource: what workers have that stand for it, such as "jetson-orin"; no device is asked when None.
    """

    name: str = key(TEXT)
    resource: str | None = key(TEXT, None)


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

    samples: int = key(COUNT, 200)
    golden: int = key(COUNT, GOLDEN_COUNT)
    bundle: bool = key(TRUTH, True)
    opset: int | None = key(COUNT, None)
    fp16_exclude: tuple[str, ...] = key(TEXTS, ())
    int8_exclude: tuple[str, ...] = key(TEXTS, ())
    calibration_method: str = key(TEXT, DEFAULT_METHOD)
    weights_licence: str = key(TEXT, NOT_STATED)


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

    engine: str = key(TEXT, TENSORRT)
    python: str | None = key(TEXT, None)
    runs: int = key(COUNT, 2000)
    seconds: float = key(_SECONDS, 120.0)
    warm_up: float = key(_SECONDS, 2.0)


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
    content = read_toml(path, "sweep", _HINT)
    refuse_unknown(content, ("title", "matrix", "checkpoint", "target", "options", "device"), f"{path}", _HINT)
    title = content.get("title", path.stem)
    if TEXT.read(title) is None:
        raise UserError(f"title in {path} is {title!r}, not a text. {_HINT}")
    device = content.get("device")
    sweep = Sweep(
        title=title,
        matrix=read_table(Matrix, content.get("matrix", {}), f"[matrix] in {path}", _HINT),
        checkpoints=tuple(
            _absolute(read_table(Checkpoint, table, place, _HINT), path.parent)
            for table, place in _tables(content, "checkpoint", path)
        ),
        targets=tuple(
            read_table(SweepTarget, table, place, _HINT) for table, place in _tables(content, "target", path)
        ),
        options=read_table(Options, content.get("options", {}), f"[options] in {path}", _HINT),
        device=None if device is None else read_table(Device, device, f"[device] in {path}", _HINT),
    )
    _check(sweep, path)
    return sweep


def _tables(content: Mapping[str, Any], name: str, path: Path) -> list[tuple[Any, str]]:
    tables = content.get(name, [])
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path} declares no {name}. Add a table [[{name}]]. {_HINT}")
    return [(table, f"[[{name}]] number {number} in {path}") for number, table in enumerate(tables, 1)]


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
