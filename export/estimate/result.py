"""What an estimate says: layers, totals, memory, what a change would gain. Seconds are bands, never measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Band:
    """A time or a difference of times in seconds, at three assumed efficiencies.

    Attributes:
        low: at the best efficiency that a kernel is expected to reach.
        typical: at the usual efficiency.
        high: at the worst efficiency that is usual.
    """

    low: float
    typical: float
    high: float

    def __add__(self, other: Band) -> Band:
        return Band(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def __sub__(self, other: Band) -> Band:
        return Band(self.low - other.low, self.typical - other.typical, self.high - other.high)


def total(bands: Iterable[Band]) -> Band:
    """Return the sum of bands."""
    return sum(bands, Band(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class LayerEstimate:
    """One fused layer.

    Attributes:
        nodes: names of the ONNX nodes in it, in order.
        module: path of the torch module it came from; empty where the graph does not say.
        kind: what it is, such as "convolution"; the kinds are those of `assumptions.toml`.
        precision: "fp32", "fp16", "bf16" or "int8".
        macs: multiplications with addition of its convolutions and matrix products.
        flops: twice `macs`, and the operations of everything else.
        bytes_moved: what it reads and writes of the GPU's memory, weights included.
        weight_bytes: the weights among them.
        seconds: time on the target.
        bound: "compute" or "memory", whichever takes longer at typical efficiency.
    """

    nodes: tuple[str, ...]
    module: str
    kind: str
    precision: str
    macs: int
    flops: int
    bytes_moved: int
    weight_bytes: int
    seconds: Band
    bound: str


@dataclass(frozen=True)
class BlockShare:
    """What one part of the network takes.

    Attributes:
        module: path of the torch module; "(no module)" for nodes that do not say.
        layers: number of fused layers.
        flops: their operations.
        bytes_moved: their traffic.
        seconds: their time.
        share: their part of the typical time of the whole.
    """

    module: str
    layers: int
    flops: int
    bytes_moved: int
    seconds: Band
    share: float


@dataclass(frozen=True)
class Gain:
    """What one change of the model would gain.

    Attributes:
        change: "plugins", "fp16" or "int8".
        present: the model has it already; the gain is then over the same model without it.
        applies: there is anything to change; all figures are 0 where not.
        seconds_saved: time without the change minus time with it; negative for a loss.
        bytes_saved: traffic, likewise.
        activation_bytes_saved: peak activation memory, likewise.
        weight_bytes_saved: weights, likewise.
        note: what was assumed, or why it does not apply.
    """

    change: str
    present: bool
    applies: bool
    seconds_saved: Band
    bytes_saved: int
    activation_bytes_saved: int
    weight_bytes_saved: int
    note: str


@dataclass(frozen=True)
class Roof:
    """The target's peaks that the estimate was made with.

    Attributes:
        bandwidth: bytes per second.
        tensor: operations per second of matrix products, by precision.
        vector: operations per second of everything else.
        notes: how figures that no data sheet states were derived, and which are unverified.
    """

    bandwidth: float
    tensor: dict[str, float]
    vector: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What a model takes on a target, estimated from its graph: nothing in it was measured.

    Attributes:
        model: the model's file or graph name.
        target: name of the target.
        input_sizes: shape of every input.
        layers: fused layers in execution order.
        macs, flops, bytes_moved: sums over layers.
        seconds: sum over layers, which run one after another.
        peak_activation_bytes: memory for intermediate results, workspaces and outputs, when buffers are placed in an
            arena in execution order, gaps included. Inputs belong to the caller and are not in it.
        live_activation_bytes: the part of it that is in use at one time at most; no arrangement of buffers takes less.
        peak_layer: index of the layer at which most is in use.
        input_bytes: the model's inputs.
        weight_bytes: weights in the precision they are used in.
        engine_bytes: estimated size of the engine file, and of its copy in GPU memory.
        required_bytes: memory for running: engine, activations, inputs and the runtime itself.
        available_bytes: memory of the target that an application may count on.
        fits: whether the former is within the latter.
        fit_reason: the sum, in words.
        blocks: parts of the network, the most expensive first.
        gains: what plugins, FP16 and INT8 would gain; empty when not asked for.
        roof: the target's peaks.
        assumptions: everything that was assumed, in sentences.
        notes: what is particular to this model, such as operators without a cost declaration.
    """

    model: str
    target: str
    input_sizes: dict[str, tuple[int, ...]]
    layers: tuple[LayerEstimate, ...]
    macs: int
    flops: int
    bytes_moved: int
    seconds: Band
    peak_activation_bytes: int
    live_activation_bytes: int
    peak_layer: int
    input_bytes: int
    weight_bytes: int
    engine_bytes: int
    required_bytes: int
    available_bytes: int
    fits: bool
    fit_reason: str
    blocks: tuple[BlockShare, ...]
    gains: tuple[Gain, ...]
    roof: Roof
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return {"format": 1, "measured": False, **dataclasses.asdict(self)}
