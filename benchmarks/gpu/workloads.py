"""What is timed, and the bars it has to clear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A bound on the time of a contestant over ours.

    Attributes:
        contestant: see `speed.Contestant.name`, or "roofline".
        at_least: least ratio contestant / ours.
        text: what is asked, in words.
    """

    contestant: str
    at_least: float
    text: str


@dataclass(frozen=True)
class Workload:
    """An operation at one size.

    Attributes:
        name: unique.
        operation: name of the `PluginSpec`.
        batch: images.
        static: sizes that are compiled in.
        a, b: maps, see `data.sizes_for`.
        elements: data types; bars hold for float16.
        bars: what has to be met.
    """

    name: str
    operation: str
    static: Mapping[str, int]
    a: tuple[int, int]
    b: tuple[int, int] = (1, 1)
    batch: int = 1
    elements: tuple[str, ...] = ("float16",)
    bars: tuple[Bar, ...] = ()


BAR_ELEMENT = "float16"

_THREE_TIMES_COMPILE = Bar("torch.compile", 3.0, "at least 3 times faster than torch.compile of the original")
_CRISS_CROSS_BARS = (_THREE_TIMES_COMPILE, Bar("roofline", 1 / 3, "at most 3 times the roofline time"))
_CO_ATTENTION_BARS = (
    Bar("scaled_dot_product_attention", 1.3, "at least 1.3 times faster than two scaled_dot_product_attention calls"),
    _THREE_TIMES_COMPILE,
)
_ALL = ("float16", "float32", "bfloat16")
_CRISS_CROSS = {"head_channels": 64, "channels": 512}
_CO_ATTENTION = {"head_channels": 256, "channels": 256}

WORKLOADS = (
    Workload("criss-cross 97x97", "CrissCrossAttention", _CRISS_CROSS, (97, 97), elements=_ALL, bars=_CRISS_CROSS_BARS),
    Workload(
        "co-attention 60x60, both directions",
        "CoAttention",
        _CO_ATTENTION,
        (60, 60),
        (60, 60),
        elements=_ALL,
        bars=_CO_ATTENTION_BARS,
    ),
    Workload("criss-cross 129x257", "CrissCrossAttention", _CRISS_CROSS, (129, 257), bars=_CRISS_CROSS_BARS),
    Workload("co-attention 60x60, five references", "CoAttentionOneWay", _CO_ATTENTION, (60, 60), (300, 60)),
    Workload("pixel attention 97x97", "PixelAttention", _CRISS_CROSS, (97, 97), (97, 97), elements=_ALL),
)
_DRY = {"head_channels": 4, "channels": 6}
DRY_WORKLOADS = (
    Workload("criss-cross 2x3", "CrissCrossAttention", _DRY, (2, 3), bars=_CRISS_CROSS_BARS),
    Workload("co-attention 1x2, both directions", "CoAttention", _DRY, (1, 2), (2, 1), bars=_CO_ATTENTION_BARS),
    Workload("co-attention 1x2, five references", "CoAttentionOneWay", _DRY, (1, 2), (5, 2)),
    Workload("pixel attention 2x2", "PixelAttention", _DRY, (2, 2), (3, 2)),
)
