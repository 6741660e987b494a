"""What each operator costs: one declaration per operator, and nothing else in the package knows an operator's name."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


class Role(enum.Enum):
    """How an operator takes part in fusion."""

    PRODUCT = "a convolution or matrix product, which takes the pointwise operators behind it into its layer"
    POINTWISE = "computes each element of its result for itself"
    VIEW = "gives memory another name; costs nothing"
    SWAP = "a Transpose; free where only extents of 1 move, or where products alone read it with the last axes swapped"
    ALONE = "a layer of its own"


@dataclass(frozen=True)
class Call:
    """A node with the shapes around it.

    Attributes:
        op_type: operator.
        inputs: shapes of the inputs; None for one that is left out.
        outputs: shapes of the outputs.
        attributes: attributes by name, as Python values.
    """

    op_type: str
    inputs: Sequence[Shape | None]
    outputs: Sequence[Shape]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def shape(self, index: int) -> Shape:
        """Return the shape of an input that has to be there."""
        shape = self.inputs[index]
        assert shape is not None
        return shape


@dataclass(frozen=True)
class OperatorCost:
    """What one operator costs.

    Attributes:
        kind: kind of layer, which decides the efficiency (see `assumptions.toml`).
        role: how it takes part in fusion.
        macs: multiplications with addition on the matrix units.
        flops: other operations.
        sparse_reads: reads only as many elements of its first input as it writes.
        weight: index of the input that is the weight when it is a constant; None where there is none.
        per_group: input channels that one output channel of it reads; matrix units need at least eight.
    """

    kind: str
    role: Role
    macs: Callable[[Call], int] | None = None
    flops: Callable[[Call], float] | None = None
    sparse_reads: bool = False
    weight: int | None = None
    per_group: Callable[[Call], int] | None = None


LEAST_CHANNELS = 8
"""Input channels of a group below which a convolution does not fill a matrix instruction."""


def _convolution(call: Call) -> int:
    return math.prod(call.outputs[0]) * math.prod(call.shape(1)[1:])


def _transposed_convolution(call: Call) -> int:
    return math.prod(call.shape(0)) * math.prod(call.shape(1)[1:])


def _integer_product(call: Call) -> int:
    return math.prod(call.outputs[0]) * call.shape(0)[-1]


def _general_product(call: Call) -> int:
    depth = call.shape(0)[0 if call.attributes.get("transA", 0) else 1]
    return math.prod(call.outputs[0]) * depth


def _einsum(call: Call) -> int:
    """Multiply the extents of all axes, which is exact for two operands."""
    extents: dict[str, int] = {}
    terms = str(call.attributes["equation"]).replace(" ", "").split("->")[0].split(",")
    for index, term in enumerate(terms):
        shape = call.shape(index)
        letters = [*term.replace("...", "")]
        dots = len(shape) - len(letters)
        place = term.find("...")
        axes = letters if place < 0 else [*letters[:place], *(f".{axis}" for axis in range(dots)), *letters[place:]]
        for axis, extent in zip(axes, shape, strict=True):
            extents[axis] = max(extents.get(axis, 1), extent)
    return math.prod(extents.values())


def _recurrent(gates: int) -> Callable[[Call], int]:
    def macs(call: Call) -> int:
        steps, batch, features = call.shape(0)
        directions, _, _ = call.shape(1)
        hidden = call.shape(2)[-1]
        return steps * batch * directions * gates * hidden * (features + hidden)

    return macs


def _per_output(operations: float) -> Callable[[Call], float]:
    return lambda call: operations * math.prod(call.outputs[0])


def _per_input(operations: float) -> Callable[[Call], float]:
    return lambda call: operations * math.prod(call.shape(0))


def _window(call: Call) -> float:
    return float(math.prod(call.outputs[0]) * math.prod(call.attributes["kernel_shape"]))


def _product(
    kind: str, macs: Callable[[Call], int], *, weight: int = 1, per_group: Callable[[Call], int] | None = None
) -> OperatorCost:
    return OperatorCost(kind, Role.PRODUCT, macs=macs, weight=weight, per_group=per_group)


def _pointwise(operations: float) -> OperatorCost:
    return OperatorCost("pointwise", Role.POINTWISE, flops=_per_output(operations))


def _reduction(operations: float) -> OperatorCost:
    return OperatorCost("reduction", Role.ALONE, flops=_per_input(operations))


def _movement(*, sparse: bool = False) -> OperatorCost:
    return OperatorCost("data movement", Role.ALONE, sparse_reads=sparse)


_VIEW = OperatorCost("view", Role.VIEW)

UNKNOWN = OperatorCost("other", Role.ALONE)
"""An operator without a declaration: one pass over its inputs and outputs."""

COSTS: Mapping[str, OperatorCost] = {
    # Products. A transposed convolution of `group` groups reads (channels in / group) for each output channel.
    "Conv": _product("convolution", _convolution, per_group=lambda call: call.shape(1)[1]),
    "ConvTranspose": _product(
        "convolution",
        _transposed_convolution,
        per_group=lambda call: call.shape(1)[0] // int(call.attributes.get("group", 1)),
    ),
    "MatMul": _product("matrix product", _integer_product),
    "MatMulInteger": _product("matrix product", _integer_product),
    "Gemm": _product("matrix product", _general_product),
    "Einsum": _product("matrix product", _einsum),
    "LSTM": OperatorCost("recurrence", Role.ALONE, macs=_recurrent(4), weight=1),
    "GRU": OperatorCost("recurrence", Role.ALONE, macs=_recurrent(3), weight=1),
    "RNN": OperatorCost("recurrence", Role.ALONE, macs=_recurrent(1), weight=1),
    # Pointwise, with operations for each element; a special function counts as four.
    **{
        name: _pointwise(1)
        for name in (
            *("Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil"),
            *("Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Max", "Mean"),
            *("Min", "Mul", "Neg", "Not", "Or", "Relu", "Round", "Sign", "Sub", "Sum", "Where", "Xor"),
        )
    },
    **{name: _pointwise(2) for name in ("BatchNormalization", "Clip", "LeakyRelu", "PRelu", "ThresholdedRelu")},
    **{name: _pointwise(2) for name in ("DequantizeLinear", "HardSigmoid", "QuantizeLinear")},
    **{name: _pointwise(4) for name in ("Div", "Erf", "Exp", "HardSwish", "Log", "Mod", "Reciprocal", "Sigmoid")},
    **{name: _pointwise(4) for name in ("Celu", "Cos", "Elu", "Pow", "Selu", "Sin", "Sqrt", "Softsign", "Tanh")},
    **{name: _pointwise(8) for name in ("Gelu", "Mish", "Softplus", "Swish")},
    # Views.
    **dict.fromkeys(("Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _VIEW),
    "Transpose": OperatorCost("data movement", Role.SWAP),
    # Reductions, with operations for each input element.
    **{name: _reduction(1) for name in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMean", "ReduceMin")},
    **{name: _reduction(1) for name in ("ArgMax", "ArgMin", "CumSum", "ReduceL1", "ReduceProd", "ReduceSum", "TopK")},
    **{name: _reduction(2) for name in ("ReduceL2", "ReduceSumSquare")},
    **{name: _reduction(5) for name in ("LogSoftmax", "ReduceLogSumExp", "Softmax")},
    **{name: _reduction(8) for name in ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN")},
    "RMSNormalization": _reduction(5),
    **{name: OperatorCost("reduction", Role.ALONE, flops=_window) for name in ("AveragePool", "LpPool", "MaxPool")},
    # Data movement.
    **{name: _movement() for name in ("Concat", "DepthToSpace", "Expand", "Pad", "ScatterElements", "ScatterND")},
    **{name: _movement() for name in ("ConstantOfShape", "EyeLike", "OneHot", "Range", "Shape", "Size", "Tile")},
    **{name: _movement() for name in ("SpaceToDepth", "Split", "Trilu")},
    **{name: _movement(sparse=True) for name in ("Gather", "GatherElements", "GatherND", "Slice")},
    # A linear interpolation in two axes reads four neighbours, which the caches hold.
    **{
        name: OperatorCost("data movement", Role.ALONE, flops=_per_output(8))
        for name in ("GridSample", "Resize", "Upsample")
    },
}
"""Costs of the standard operators, by name."""
