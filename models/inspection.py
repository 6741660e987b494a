"""What a checkpoint holds: container, size, the network it fits, the attention blocks inside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeattn.blocks.recognition import Shapes, matches, shapes_of
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import COUNTER, read_checkpoint
from edgeattn.models.published import LayoutFit, fit_network, fit_published, state_shapes
from edgeattn.models.spec import Layout, ModelSpec
from edgeattn.models.variants import MODELS, variant_of_shapes

_LISTED = 3  # candidates that a refusal names
_NEAR = 0.5  # share of the tensors of a network that its variants have too


@dataclasses.dataclass(frozen=True)
class ModelGuess:
    """How well a checkpoint fits a declared network, in the layout that it fits best.

    Attributes:
        model: name of the declaration, or of a variant of it.
        layout: name of the published layout.
        matched: tensors of the layout that the checkpoint holds with the same name and shape.
        expected: tensors of the layout; counters of batch normalisation do not count.
        unexpected: tensors of the checkpoint that the layout lacks or has in another shape.
    """

    model: str
    layout: str
    matched: int
    expected: int
    unexpected: int

    @classmethod
    def of(cls, spec: ModelSpec, fit: LayoutFit) -> ModelGuess:
        """Return the guess that a fit of one of the network's layouts amounts to."""
        return cls(spec.name, fit.layout.name, fit.matched, fit.expected, fit.unexpected)

    @property
    def certainty(self) -> float:
        """Fraction of all tensors, the layout's and the checkpoint's, that agree; 1 is a strict load."""
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
            layout = f"layout {self.guesses[0].layout}"
            return f"{spec.name} at {height}x{width} ({layout}): inputs {', '.join(spec.inputs)}; outputs {outputs}"
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
    """Return how well each declared network fits names and shapes, best first, without those that share nothing.

    Published layouts are compared with their listings; a network is built, without memory, only where none exists, and
    where a network is near whose variant, say with another number of classes, may fit.
    """
    guesses = [guess for spec in MODELS if (guess := ModelGuess.of(spec, _best_fit(spec, shapes))).matched]
    if not any(guess.certainty == 1 for guess in guesses):
        guesses = _different([_as_variant(guess, shapes) for guess in guesses])
    return tuple(sorted(guesses, key=lambda guess: -guess.certainty))


def _different(guesses: Sequence[ModelGuess]) -> list[ModelGuess]:
    """Return the guesses without those whose network an earlier one names too: variants of two may be the same."""
    kept: list[tuple[ModelSpec, ModelGuess]] = []
    for guess in guesses:
        spec = MODELS.get(guess.model)
        if not any(_same(spec, other) for other, _ in kept):
            kept.append((spec, guess))
    return [guess for _, guess in kept]


def _same(one: ModelSpec, other: ModelSpec) -> bool:
    """Say whether two declarations differ in nothing but names."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("network", "arguments", "size", "preprocessing", "outputs", "labels", "classes")
    )


def _as_variant(guess: ModelGuess, shapes: Shapes) -> ModelGuess:
    """Return the guess that a network has other arguments than the declared one, where that fits better."""
    spec = MODELS.get(guess.model)
    if guess.certainty < _NEAR or not spec.told:
        return guess
    layout = spec.layout(guess.layout)
    other = variant_of_shapes(spec, layout.renamed_all(shapes))
    if other is spec:
        return guess
    return max(
        guess, ModelGuess.of(other, fit_network(layout, shapes, state_shapes(other))), key=lambda one: one.certainty
    )


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
        f"{guess.model} as {guess.layout} ({guess.matched} of its {guess.expected} tensors, {guess.unexpected} others)"
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
    order = {prefix: place for place, prefix in enumerate(parts)}
    seen: dict[frozenset[tuple[str, tuple[int, ...]]], tuple[str, ...]] = {}
    found: list[BlockFound] = []
    for prefix in sorted(parts, key=lambda part: (part.count(".") + bool(part), order[part])):
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
    return tuple(sorted(found, key=lambda block: order[block.prefix]))


def _container(file: Path) -> str:
    """Tell the container of a file that was read by its first bytes."""
    with file.open("rb") as stream:
        head = stream.read(9)
    if head[8:] == b"{":
        return "safetensors"
    return "torch (zip)" if head.startswith(b"PK") else "torch (before 1.6)"


def _best_fit(spec: ModelSpec, shapes: Shapes) -> LayoutFit:
    """Return how well a checkpoint fits the layout of a network that it fits best."""
    built: Shapes | None = None
    fits = []
    for layout in spec.layouts:
        if layout.listing is not None:
            fits.append(fit_published(layout, shapes, _listed(layout.listing)))
        else:
            built = state_shapes(spec) if built is None else built
            fits.append(fit_network(layout, shapes, built))
    return max(fits, key=lambda fit: fit.certainty)


@functools.cache
def _listed(listing: str) -> Shapes:
    """Return the shapes of a listing without counters."""
    published = Layout(listing=listing).published_shapes() or {}
    return {name: shape for name, shape in published.items() if name.rpartition(".")[2] != COUNTER}
