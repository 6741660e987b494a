"""What a search for the first divergence found, and its JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeattn.foundation import write_text

METHOD = (
    "Both forms are compared at every tensor that both have. With A the reference and B the form under test, the "
    "difference at a tensor is split into two parts: B(x_A) - y_A, the local error, where the nodes of B that lead to "
    "the tensor run on the tensors of A; and B(x_B) - B(x_A), what those nodes make of the errors of their inputs. A "
    "module diverges when its local error exceeds what the rounding of its own operations explains, however small or "
    "large the total error is there. All errors are relative L2, the largest over all samples."
)
"""How the answer comes about, for readers of the record."""


@dataclass(frozen=True)
class Point:
    """One compared tensor, with the nodes that lead to it from the compared tensors before.

    Attributes:
        module: the torch module that is named when the point diverges; the tensor's name where there are no modules.
        call: which call of the module, from 1.
        tensor: name of the tensor in the form that was taken apart.
        modules: modules of all its nodes.
        missing: modules of the other form that left no node in this one and belong here.
        parameters: weights that its nodes read.
        total: relative L2 between both forms.
        inherited: part of it that the inputs' errors explain: the same nodes on both forms' inputs.
        local: relative L2 between both forms when the nodes run on the other form's inputs.
        limit: what the rounding of the nodes explains of `local`.
        derivation: of the limit.
        failure: why the nodes cannot be compared at all; None when they can.
    """

    module: str
    call: int
    tensor: str
    modules: tuple[str, ...]
    missing: tuple[str, ...]
    parameters: tuple[str, ...]
    total: float
    inherited: float
    local: float
    limit: float
    derivation: str
    failure: str | None = None

    @property
    def diverges(self) -> bool:
        """Whether the local error exceeds what explains it. NaN counts as exceeding."""
        return self.failure is not None or not self.local <= self.limit

    @property
    def label(self) -> str:
        """Module and call for tables."""
        return self.module if self.call == 1 else f"{self.module} (call {self.call})"


@dataclass(frozen=True)
class OutputCheck:
    """One output of the form that was taken apart.

    Attributes:
        name: the output.
        total: relative L2 between both forms.
        unmarked: the same when the form runs as one graph, as it is used, without inner tensors as outputs.
        difference: relative L2 between the form in one piece and in pieces.
        allowed: what rounding explains of that difference.
    """

    name: str
    total: float
    unmarked: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether looking inside left the output what it was."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Divergence:
    """Result of a search.

    Attributes:
        reference: name of the form that counts as right.
        candidate: name of the form under test.
        dissected: name of the one of the two that was taken apart.
        aligned_by: "module path" or "tensor name".
        samples: number of samples.
        points: compared tensors, in the order of computation.
        outputs: the network's outputs.
        unaligned: modules of the form that was taken apart whose tensors have no counterpart.
        folding_error: relative L2 that the exact foldings of a torch form make at its outputs; None without one.
        notes: sentences that a reader should know.
        measured: where the numbers come from.
    """

    reference: str
    candidate: str
    dissected: str
    aligned_by: str
    samples: int
    points: tuple[Point, ...]
    outputs: tuple[OutputCheck, ...]
    unaligned: tuple[str, ...]
    folding_error: float | None
    notes: tuple[str, ...]
    measured: str

    @property
    def first(self) -> Point | None:
        """The first point whose error its inputs do not explain; None when there is none."""
        return next((point for point in self.points if point.diverges), None)

    @property
    def culprits(self) -> tuple[Point, ...]:
        """All points whose error their inputs do not explain."""
        return tuple(point for point in self.points if point.diverges)

    @property
    def found(self) -> bool:
        """Whether the forms diverge: somewhere inside, or only when the graph runs in one piece."""
        return self.first is not None or not all(check.agrees for check in self.outputs)

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        first = self.first
        if first is not None:
            return f"{self.candidate} diverges from {self.reference} first in {first.label}: {_reason(first)}."
        if self.found:
            names = ", ".join(check.name for check in self.outputs if not check.agrees)
            return (
                f"no module of {self.candidate} diverges from {self.reference}, but {self.dissected} as one graph "
                f"gives another {names} than module by module: an optimisation across modules changes the result."
            )
        return f"no module of {self.candidate} diverges from {self.reference}: rounding explains every difference."

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that strict JSON has; NaN and infinities as strings."""
        record = asdict(self)
        record["points"] = [{**asdict(point), "diverges": point.diverges} for point in self.points]
        record["outputs"] = [{**asdict(check), "agrees": check.agrees} for check in self.outputs]
        first = self.first.label if self.first else None
        head = {"verdict": self.verdict, "found": self.found, "first": first, "method": METHOD}
        plain: dict[str, Any] = _plain({**head, **record})
        return plain


def _reason(point: Point) -> str:
    if point.failure:
        return point.failure
    missing = f"; {' and '.join(point.missing)} left no node in the graph" if point.missing else ""
    return (
        f"on the same inputs its result is off by {point.local:.2g}, and rounding explains {point.limit:.2g}{missing}"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_divergence(divergence: Divergence, path: str | Path) -> Path:
    """Write `Divergence.as_dict` as JSON, atomically, and return the path.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_text(path, json.dumps(divergence.as_dict(), indent=1, allow_nan=False) + "\n")
