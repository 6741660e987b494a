"""What the tensors of a model hold on data, and which of them a reduced type cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeattn.export.calibration_statistics import lean_session
from edgeattn.export.precision_types import FP16, ReducedType, element_types

OVERFLOW_MARGIN = 4.0
"""How many times larger than on the calibration data a tensor may be elsewhere: it has to fit the type all the same."""

_PREFIX = "__edgeattn_"


@dataclass(frozen=True)
class TensorRange:
    """What one tensor held.

    Attributes:
        peak: largest magnitude.
        loss: what rounding to the reduced type changes, as relative L2 over all data.
    """

    peak: float
    loss: float


@dataclass(frozen=True)
class MeasuredRanges:
    """What the tensors of a model held on data.

    Attributes:
        kind: the type that the loss was measured for.
        batches: number of batches.
        tensors: by name; floating-point inputs and results of nodes of the main graph.
    """

    kind: ReducedType
    batches: int
    tensors: Mapping[str, TensorRange]

    def defect(self, name: str) -> str | None:
        """Say why the type cannot hold a tensor, or None when it can or the tensor is not known.

        It is too large when `OVERFLOW_MARGIN` times its peak exceeds the largest number. It is too small when rounding
        changes the tensor by more than the type's `loss`, which numbers in the range of the type never do: its digits
        vanish below the smallest numbers. A smaller tensor than on the data loses digits gradually, so there is no
        margin on this side.
        """
        found = self.tensors.get(name)
        if found is None:
            return None
        if not OVERFLOW_MARGIN * found.peak <= self.kind.limit:
            return (
                f"reaches {found.peak:.3g}, and {OVERFLOW_MARGIN:g} times that exceeds the {self.kind.limit:g} of "
                f"{self.kind.label}"
            )
        if found.loss > self.kind.loss:
            return f"is so small (at most {found.peak:.3g}) that {self.kind.label} loses {found.loss:.2%} of it"
        return None

    def severity(self, name: str) -> float:
        """Return a number that orders defects: how far the tensor is beyond the limit."""
        found = self.tensors.get(name)
        return max(found.peak / self.kind.limit, found.loss) if found else 0.0


def measure_ranges(
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, np.ndarray]],
    kind: ReducedType = FP16,
    *,
    progress: Callable[[int], None] | None = None,
) -> MeasuredRanges:
    """Run a model on data and measure every floating-point tensor of its main graph by three numbers.

    Args:
        model: FP32 model, with or without plugin nodes and their functions; it is not changed.
        batches: inputs by name, one batch in memory at a time.
        kind: the type whose rounding is measured.
        progress: called with the number of batches run so far.
    """
    names = [name for name, found in element_types(model).items() if found == TensorProto.FLOAT]
    computed = {info.name for info in model.graph.input} | {name for node in model.graph.node for name in node.output}
    names = [name for name in names if name in computed]
    session = lean_session(_observed(model, names, kind))
    outputs = [f"{_PREFIX}{what}_{name}" for name in names for what in ("peak", "power", "lost")]
    totals = np.zeros((len(names), 3))
    count = 0
    for count, batch in enumerate(batches, start=1):
        found = np.array(session.run(outputs, dict(batch)), np.float64).reshape(-1, 3)
        totals[:, 0] = np.fmax(totals[:, 0], found[:, 0])
        totals[:, 1:] += found[:, 1:]
        if progress is not None:
            progress(count)
    found_ranges = [TensorRange(float(peak), _share(peak, power, lost)) for peak, power, lost in totals]
    return MeasuredRanges(kind, count, dict(zip(names, found_ranges, strict=True)))


def _share(peak: float, power: float, lost: float) -> float:
    """Return the relative L2 that is lost; all of it where the squares of the numbers vanish already."""
    if peak == 0:
        return 0.0
    if power == 0:
        return 1.0
    share = float(np.sqrt(lost / power)) if np.isfinite(power) else np.inf
    return np.inf if np.isnan(share) else share


def _observed(model: onnx.ModelProto, names: Iterable[str], kind: ReducedType) -> onnx.ModelProto:
    """Return a copy of a model that only gives peak, sum of squares, and sum of squares of the rounding of tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.output[:]
    for name in names:
        made = {what: f"{_PREFIX}{what}_{name}" for what in ("abs", "peak", "power", "low", "wide", "error", "lost")}
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [made["abs"]]),
                helper.make_node("ReduceMax", [made["abs"]], [made["peak"]], keepdims=0),
                helper.make_node("ReduceSumSquare", [name], [made["power"]], keepdims=0),
                helper.make_node("Cast", [name], [made["low"]], to=int(kind.dtype)),
                helper.make_node("Cast", [made["low"]], [made["wide"]], to=TensorProto.FLOAT),
                helper.make_node("Sub", [made["wide"], name], [made["error"]]),
                helper.make_node("ReduceSumSquare", [made["error"]], [made["lost"]], keepdims=0),
            ]
        )
        graph.output.extend(
            helper.make_tensor_value_info(made[what], TensorProto.FLOAT, []) for what in ("peak", "power", "lost")
        )
    return copy
