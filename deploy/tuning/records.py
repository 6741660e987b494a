"""`Sensitivity`: the record of an analysis, and its JSON form."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

FIELDS = {
    "precision": "what modules are lowered to; everything else stays FP32",
    "metric": "unit of every loss, against the PyTorch original on the same samples; negative for a gain",
    "original": "the original's own value of the metric in points, or 100 where labels are compared with its own",
    "everything": "all modules lowered at once",
    "modules": "the most harmful first: by the noise that each adds to the outputs when it alone is lowered",
    "modules[].module": "path of the torch module, or name of a node outside all modules",
    "modules[].nodes": "its nodes that round",
    "modules[].layers": "those of them that have an INT8 form",
    "modules[].alone": "only this module is lowered",
    "modules[].without": "all modules but this one are lowered",
    "*.loss": "what is lost of the metric",
    "*.labels": "percent of the labels that are the original's",
    "*.snr": "signal-to-noise ratio of the noisiest output, in dB; the strings inf and -inf where there is no noise, "
    "and where an output is not finite or the form did not run",
    "*.failure": "why the form could not be run; null when it ran",
}
"""The meaning of the members of `sensitivity.PRECISION.json`, which carries them itself."""


@dataclass(frozen=True)
class Effect:
    """Accuracy with some modules lowered.

    Attributes:
        loss: what is lost of the metric, in its unit.
        labels: percent of the labels that are the original's.
        snr: signal-to-noise ratio of the noisiest output, in dB.
        failure: why the form could not be run; None when it ran.
    """

    loss: float
    labels: float
    snr: float
    failure: str | None


@dataclass(frozen=True)
class ModuleSensitivity:
    """One module.

    Attributes:
        module: its path.
        nodes: its nodes that round.
        layers: those of them that have an INT8 form.
        alone: it is lowered, and nothing else.
        without: everything is lowered but it.
    """

    module: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    alone: Effect
    without: Effect


@dataclass(frozen=True)
class Sensitivity:
    """Result of an analysis.

    Attributes:
        model: name of the model.
        precision: what modules were lowered to.
        metric: unit of the losses.
        samples: how many were judged on.
        unlabelled: how many of them have no target.
        original: the original's own value of the metric.
        everything: all modules lowered.
        modules: the most harmful first.
        measured: where the numbers come from.
        notes: sentences that a user should read.
    """

    model: str
    precision: str
    metric: str
    samples: int
    unlabelled: int
    original: float
    everything: Effect
    modules: tuple[ModuleSensitivity, ...]
    measured: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that strict JSON has, with the meaning of the members."""
        plain: dict[str, Any] = _plain(self)
        return {"format": 1, "fields": FIELDS, **plain}


def _plain(value: Any) -> Any:
    """Return a value in the types that strict JSON has."""
    if isinstance(value, (Sensitivity, ModuleSensitivity, Effect)):
        return {member.name: _plain(getattr(value, member.name)) for member in fields(value)}
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    return value
