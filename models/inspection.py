"""What a checkpoint holds: container, size, the network it fits, the attention blocks inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeattn.blocks.recognition import Shapes, matches, shapes_of
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.spec import MODELS, ModelSpec

_LISTED = 3  # candidates that a refusal names


@dataclasses.dataclass(frozen=True)
class ModelGuess:
    """How well a checkpoint fits a declared network.

    Attributes:
        model: name of the declaration.
        matched: tensors of the network that the checkpoint holds with the same name and shape.
        expected: tensors of the network; counters of batch normalisation do not count.
        unexpected: tensors of the checkpoint that the network lacks or has in another shape.
    """

    model: str
    matched: int
    expected: int
    unexpected: int

    @property
    def certainty(self) -> float:
        """Fraction of all tensors, the network's and the checkpoint's, that agree; 1 is a strict load."""
        return self.matched / (self.expected + self.unexpected)


@dataclasses.dataclass(frozen=True)
class BlockFound:
    """A part of a checkpoint that has the names and shapes of an attention block.

    Attributes:
        prefix: where it lies, such as "head.cca"; empty for the whole checkpoint.
        candidates: the blocks whose state it may be, as "block (layout)"; weights alone may not tell them apart.
        parameters: numbers it holds.
    """

    prefix: str
    candidates: tuple[str, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        container: "safetensors", "torch (zip)" or "torch (before 1.6)".
        file_bytes: size of the file.
        tensors: number of tensors.
        parameters: numbers in them, without counters of batch normalisation.
        types: number of tensors by number type.
        guesses: declared networks that share tensors with it, best first.
        blocks: attention blocks found, outermost first.
    """

    path: str
    container: str
    file_bytes: int
    tensors: int
    parameters: int
    types: dict[str, int]
    guesses: tuple[ModelGuess, ...]
    blocks: tuple[BlockFound, ...]

    @property
    def certain(self) -> tuple[str, ...]:
        """Names of the networks that the checkpoint fits strictly."""
        return tuple(guess.model for guess in self.guesses if guess.certainty == 1)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        record = dataclasses.asdict(self)
        for entry, guess in zip(record["guesses"], self.guesses, strict=True):
            entry["certainty"] = guess.certainty
        return {**record, "certain": list(self.certain), "export": self.export()}

    def export(self) -> str:
        """Return one sentence on what `edgeattn export` would make of the checkpoint."""
        if len(self.certain) == 1:
            spec = MODELS.get(self.certain[0])
            outputs, (height, width) = ", ".join(spec.main_outputs), spec.size
            return f"{spec.name} at {height}x{width}: inputs {', '.join(spec.inputs)}; outputs {outputs}"
        if self.certain:
            return f"nothing until --model chooses one of {', '.join(self.certain)}, which have the same tensors"
        if self.blocks:
            return (
                "nothing by itself: no declared network fits; load it into your own model and give that to "
                "`edgeattn.export.replace_attention`"
            )
        return "nothing: no declared network fits, and no known attention block is in it"


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Describe a checkpoint file; code in the file never runs.

    Args:
        path: a safetensors file or a file of torch.save.

    Raises:
        UserError: the file cannot be read or is no checkpoint.
    """
    file = Path(path)
    state = read_checkpoint(file)
    shapes = shapes_of(state)
    types: dict[str, int] = {}
    for tensor in state.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        types[kind] = types.get(kind, 0) + 1
    return Inspection(
        path=str(file),
        container=_container(file),
        file_bytes=file.stat().st_size,
        tensors=len(state),
        parameters=sum(state[name].numel() for name in shapes),
        types=types,
        guesses=guess_models(shapes),
        blocks=find_blocks(state),
    )


def guess_models(shapes: Shapes) -> tuple[ModelGuess, ...]:
    """Return how well each declared network fits names and shapes, best first, without those that share nothing."""
    guesses = []
    for spec in MODELS:
        expected = _expected(spec)
        matched = sum(_comparable(shapes.get(name)) == _comparable(shape) for name, shape in expected.items())
        if matched:
            guesses.append(ModelGuess(spec.name, matched, len(expected), len(shapes) - matched))
    return tuple(sorted(guesses, key=lambda guess: -guess.certainty))


def guess_model(path: str | Path) -> ModelGuess:
    """Return the one declared network that a checkpoint file fits strictly.

    Args:
        path: a safetensors file or a file of torch.save.

    Raises:
        UserError: no network fits, or several do; the message says how well the nearest ones fit.
    """
    guesses = guess_models(shapes_of(read_checkpoint(path)))
    certain = [guess for guess in guesses if guess.certainty == 1]
    if len(certain) == 1:
        return certain[0]
    if certain:
        raise UserError(f"{path} fits {' and '.join(guess.model for guess in certain)} alike. Choose one with --model.")
    near = ", ".join(
        f"{guess.model} ({guess.matched} of its {guess.expected} tensors, {guess.unexpected} others)"
        for guess in guesses[:_LISTED]
    )
    raise UserError(
        f"{path} fits no declared network strictly. Nearest: {near or 'none shares a tensor with it'}. Choose one with "
        "--model to see every key that does not fit, or see `edgeattn inspect`."
    )


def find_blocks(state: Mapping[str, Tensor]) -> tuple[BlockFound, ...]:
    """Return the parts of a state that look like attention blocks by names and shapes; none lies in another."""
    shapes = shapes_of(state)
    parts: dict[str, dict[str, tuple[int, ...]]] = {"": shapes}
    for name, shape in shapes.items():
        pieces = name.split(".")
        for depth in range(1, len(pieces)):
            parts.setdefault(".".join(pieces[:depth]), {})[".".join(pieces[depth:])] = shape
    seen: dict[frozenset[tuple[str, tuple[int, ...]]], tuple[str, ...]] = {}
    found: list[BlockFound] = []
    for prefix in sorted(parts, key=lambda part: (part.count(".") + bool(part), list(parts).index(part))):
        if any(not block.prefix or f"{prefix}.".startswith(f"{block.prefix}.") for block in found):
            continue
        part = parts[prefix]
        key = frozenset(part.items())
        if key not in seen:
            labels = (f"{match.layout.block.name} ({match.layout.name})" for match in matches(part))
            seen[key] = tuple(dict.fromkeys(labels))
        if seen[key]:
            start = f"{prefix}." if prefix else ""
            found.append(BlockFound(prefix, seen[key], sum(state[f"{start}{name}"].numel() for name in part)))
    order = list(parts)
    return tuple(sorted(found, key=lambda block: order.index(block.prefix)))


def _container(file: Path) -> str:
    """Tell the container of a file that was read by its first bytes."""
    with file.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        return "safetensors"
    return "torch (zip)" if head.startswith(b"PK") else "torch (before 1.6)"


def _expected(spec: ModelSpec) -> Shapes:
    """Return names and shapes of a network's state; no memory is used for the weights."""
    with torch.device("meta"):
        return shapes_of(spec.build().state_dict())


def _comparable(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return (1,) if shape == () else shape
