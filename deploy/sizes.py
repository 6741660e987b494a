"""Sizes that a network of fixed height and width takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeattn.foundation import UserError
from edgeattn.models import ModelSpec


def refuse_size(spec: ModelSpec, size: tuple[int, int], extra_sizes: Sequence[tuple[int, int]] = ()) -> None:
    """Refuse sizes that a network whose height and width cannot vary does not take.

    Args:
        spec: the model.
        size: (height, width) of the exported graph; another than the model's own is tried, without memory.
        extra_sizes: further (height, width) that the same graph is to take.

    Raises:
        UserError: the message says which size to take, and why.
    """
    if not spec.fixed_size:
        return
    reason = f"height and width of {spec.name} cannot vary: {spec.fixed_size}"
    if extra_sizes:
        raise UserError(f"extra sizes are given, but {reason}. Drop --extra-size.")
    if size != spec.size and not _takes(spec, size):
        own, given = ("x".join(map(str, pair)) for pair in (spec.size, size))
        raise UserError(f"{spec.name} does not take the size {given}; {reason}. Export it at {own}.")


def fixed_size_note(spec: ModelSpec, size: tuple[int, int]) -> str | None:
    """Return what a user of a dynamic graph should know of its sizes; None where all vary."""
    if not spec.fixed_size:
        return None
    return f"only the batch varies; height and width stay {size[0]}x{size[1]}: {spec.fixed_size}."


def _takes(spec: ModelSpec, size: tuple[int, int]) -> bool:
    """Say whether the network runs at a size; only shapes are computed."""
    with torch.device("meta"), torch.no_grad():
        try:
            spec.build()(*(torch.empty(1, 3, *size) for _ in spec.inputs))
        except (UserError, RuntimeError, ValueError):
            return False
    return True
