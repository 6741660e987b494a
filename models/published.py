"""Which published layout a checkpoint has, and loading it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.blocks.recognition import Shapes, shapes_of
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import CheckpointMismatchError, LoadReport, load_checkpoint
from edgeattn.models.spec import Layout, ModelSpec
from edgeattn.models.variants import variant_of_shapes


@dataclass(frozen=True)
class LayoutFit:
    """How well names and shapes fit a layout. Counters of batch normalisation do not count.

    Attributes:
        layout: the layout.
        matched: tensors that are there with the wanted name and shape.
        expected: tensors that the layout wants.
        unexpected: tensors that it does not want, or wants in another shape.
    """

    layout: Layout
    matched: int
    expected: int
    unexpected: int

    @property
    def certainty(self) -> float:
        """Fraction of all tensors, wanted and given, that agree; 1 is a strict load."""
        return self.matched / ((self.expected + self.unexpected) or 1)

    @property
    def described(self) -> str:
        """The counts in words."""
        return f"{self.matched} of its {self.expected} tensors, {self.unexpected} others"


@dataclass(frozen=True)
class PublishedLoad:
    """A model that was filled from a checkpoint.

    Attributes:
        layout: name of the layout that the checkpoint has.
        report: what became of every key.
    """

    layout: str
    report: LoadReport

    def as_dict(self) -> dict[str, object]:
        """Return everything as plain data, for JSON."""
        return {"layout": self.layout, **self.report.as_dict()}


def fit_published(layout: Layout, given: Shapes, wanted: Shapes) -> LayoutFit:
    """Compare published names and shapes with those that a layout is known to have.

    Args:
        layout: the layout; what it leaves out may be given or not.
        given: shape by name in the checkpoint.
        wanted: shape by published name.
    """
    needed = {name: shape for name, shape in wanted.items() if not layout.leaves_out(name)}
    ignored = sum(map(layout.leaves_out, given))
    matched = sum(_comparable(given.get(name)) == _comparable(shape) for name, shape in needed.items())
    return LayoutFit(layout, matched, len(needed), len(given) - ignored - matched)


def fit_network(layout: Layout, given: Shapes, wanted: Shapes) -> LayoutFit:
    """Compare published names and shapes with a network, through the key map of a layout.

    Args:
        layout: the layout.
        given: shape by published name in the checkpoint.
        wanted: shape by name in the network.
    """
    renamed: dict[str, tuple[int, ...]] = {}
    ignored = 0
    for name, shape in given.items():
        if ours := layout.renamed(name):
            renamed.setdefault(ours, shape)  # a second name of one place stays unexpected
        else:
            ignored += 1
    matched = sum(_comparable(renamed.get(name)) == _comparable(shape) for name, shape in wanted.items())
    return LayoutFit(layout, matched, len(wanted), len(given) - ignored - matched)


def state_shapes(spec: ModelSpec) -> Shapes:
    """Return names and shapes of a network's state; no memory is used for the weights."""
    with torch.device("meta"):
        return shapes_of(spec.build().state_dict())


def load_published(
    spec: ModelSpec, model: nn.Module, state: Mapping[str, Tensor], layout: str | None = None
) -> PublishedLoad:
    """Fill a network from a checkpoint in whichever published layout it has, strictly: all of it or nothing.

    Args:
        spec: declares the layouts.
        model: the network, or its original, which has the same names.
        state: tensors by published name, from `read_checkpoint`.
        layout: name of the layout; the one whose names fit when None.

    Returns:
        The layout's name and the report of every key.

    Raises:
        CheckpointMismatchError: no layout fits; the message lists every key that keeps the nearest one from it.
        UserError: there is no such layout, or several fit and would fill the network differently.
    """
    candidates = spec.layouts if layout is None else (spec.layout(layout),)
    shapes = shapes_of(state)
    expected = shapes_of(model.state_dict())
    fits = sorted((fit_network(entry, shapes, expected) for entry in candidates), key=lambda fit: -fit.certainty)
    strict = [fit.layout for fit in fits if fit.certainty == 1]
    chosen = _only(spec, strict, shapes) if strict else fits[0].layout
    try:
        return PublishedLoad(chosen.name, load_checkpoint(model, state, key_map=chosen.key_map))
    except CheckpointMismatchError as error:
        message = _with_layouts(str(error), spec, fits, forced=layout) + _variant_hint(spec, chosen, shapes)
        raise CheckpointMismatchError(message, error.report) from error


def _only(spec: ModelSpec, strict: list[Layout], given: Iterable[str]) -> Layout:
    """Return the one of the layouts that fit; those that give every tensor the same place are one."""
    names = list(given)
    places = {tuple(layout.renamed(name) for name in names): layout for layout in reversed(strict)}
    if len(places) == 1:
        return strict[0]
    known = ", ".join(layout.name for layout in reversed(places.values()))
    raise UserError(
        f"the checkpoint has the names of several layouts of {spec.name}, which fill it differently: {known}. Say "
        "which one it is with --layout."
    )


def _with_layouts(message: str, spec: ModelSpec, fits: list[LayoutFit], *, forced: str | None) -> str:
    """Add to the refusal of a checkpoint which layout it speaks of, and how near the others are."""
    nearest, *others = fits
    if forced is not None:
        further = [entry.name for entry in spec.layouts if entry.name != forced]
        return f"{message} The layout was given as {forced}." + (
            f" {spec.name} is also published as {', '.join(further)}." if further else ""
        )
    if not others:
        return message
    listed = "; ".join(f"{fit.layout.name} ({fit.described})" for fit in others)
    return f"{message} The nearest layout is {nearest.layout.name}. The others of {spec.name}: {listed}."


def _variant_hint(spec: ModelSpec, layout: Layout, shapes: Shapes) -> str:
    """Return what to add to a refusal where a variant of the network has these shapes, such as other classes."""
    other = variant_of_shapes(spec, layout.renamed_all(shapes))
    if other is spec or fit_network(layout, shapes, state_shapes(other)).certainty < 1:
        return ""
    return f" Its shapes are those of {other.name}: give that as the model."


def _comparable(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return a shape in which () and (1,) are one."""
    return (1,) if shape == () else shape
