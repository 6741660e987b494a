"""What a form costs on a target: the only place that asks the estimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import onnx

from edgeattn.export.estimate import estimate
from edgeattn.targets import TARGETS


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one form on one target. Nothing of it was measured there.

    Attributes:
        seconds: one inference, at the estimate's typical efficiency.
        conv_macs: multiplications in convolutions.
        conv_macs_int8: those of them in INT8.
    """

    seconds: float
    conv_macs: int
    conv_macs_int8: int

    @property
    def int8_share(self) -> float:
        """Share of the multiplications in convolutions that are INT8."""
        return self.conv_macs_int8 / self.conv_macs if self.conv_macs else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        return asdict(self)


def cost_of(model: onnx.ModelProto, target: str) -> Cost:
    """Estimate a form.

    Args:
        model: the form, in the types that the target gets.
        target: name of the target.

    Raises:
        UserError: the target's figures are unknown.
    """
    found = estimate(model, TARGETS.get(target), gains=False)
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    layers = [layer for layer in found.layers if not convolutions.isdisjoint(layer.nodes)]
    return Cost(
        seconds=found.seconds.typical,
        conv_macs=sum(layer.macs for layer in layers),
        conv_macs_int8=sum(layer.macs for layer in layers if layer.precision == "int8"),
    )
