"""How far a form may be from the original: derived from the arithmetic, recorded with its derivation, never widened.

The rounding model is the probabilistic one of Higham and Mary, "A New Approach to Probabilistic Rounding Error
Analysis", SIAM J. Sci. Comput. 41(5), 2019: independent, zero-mean rounding errors of unit u make a sum of n terms
wrong by at most `CONFIDENCE * sqrt(n) * u`, and d operations in sequence add up in quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt

import onnx
from onnx import inliner, shape_inference

from edgeattn.foundation import UserError

FP32_RELATIVE_L2 = 1e-5
"""Bar of the project: no FP32 output may be farther than this from the original, whatever the derivation allows."""

FP16_LABEL_AGREEMENT = 0.995
"""Bar of the project: fraction of pixels that an FP16 form labels as the original does."""

INT8_TASK_DROP = 0.01
"""Bar of the project: one point of mIoU between an INT8 form and the FP32 original."""

CONFIDENCE = 4.0
"""The factor lambda of the probabilistic bound; one value exceeds it with probability 2 exp(-lambda^2 / 2) = 7e-4."""

_FP32_UNIT, _FP16_UNIT = 2.0**-24, 2.0**-11

# These only move or select values, compute on shapes, or change the type; they round nothing that counts as a step.
_EXACT = frozenset(
    (
        *("Cast", "CastLike", "Constant", "ConstantOfShape", "Identity", "Shape", "Range", "Equal", "Where"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Gather"),
        *("Expand", "Tile", "Neg", "Relu", "MaxPool", "QuantizeLinear", "DequantizeLinear"),
    )
)


@dataclass(frozen=True)
class Arithmetic:
    """What a graph says about its own rounding errors.

    Attributes:
        depth: rounding operations on the longest path from input to output.
        reduction: terms of the longest sum whose length is known (convolution or matrix product).
        quantised: activation quantisations on the longest path.
    """

    depth: int
    reduction: int
    quantised: int


@dataclass(frozen=True)
class Tolerance:
    """The limits a form is judged by; None where a quantity is recorded but not judged.

    Attributes:
        relative_l2: largest relative L2 of any output on any sample.
        label_agreement: smallest fraction of pixels labelled as the original labels them.
        task_drop: largest difference of mIoU (0..1) from the original.
        expected_relative_l2: what the rounding model predicts as an upper estimate, judged or not.
        derivation: where the numbers come from.
    """

    relative_l2: float | None
    label_agreement: float | None
    task_drop: float | None
    expected_relative_l2: float
    derivation: str


def arithmetic_of(model: onnx.ModelProto) -> Arithmetic:
    """Read depth, reduction length and number of quantisations from a graph, local functions included.

    Args:
        model: any form, FP32, FP16 or with Q/DQ; it is not modified.
    """
    inlined = inliner.inline_local_functions(model) if model.functions else model
    graph = shape_inference.infer_shapes(inlined).graph
    depth: dict[str, int] = {}
    quantised: dict[str, int] = {}
    for node in graph.node:
        for steps, counts in ((depth, node.op_type not in _EXACT), (quantised, node.op_type == "QuantizeLinear")):
            longest = max((steps.get(name, 0) for name in node.input), default=0) + counts
            steps.update(dict.fromkeys(node.output, longest))
    outputs = [output.name for output in graph.output]
    return Arithmetic(
        depth=max((depth.get(name, 0) for name in outputs), default=0),
        reduction=max(_reductions(graph), default=1),
        quantised=max((quantised.get(name, 0) for name in outputs), default=0),
    )


def _reductions(graph: onnx.GraphProto) -> Iterator[int]:
    """Yield the summation length of every convolution and matrix product whose operand shape is known."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        summed = _SUMMED.get(node.op_type)
        shape = shapes.get(node.input[1], ()) if summed else ()
        if summed and len(shape) >= 2 and (length := summed(node, shape)):
            yield length


def _gemm_length(node: onnx.NodeProto, right: tuple[int, ...]) -> int:
    return right[any(attribute.name == "transB" and attribute.i for attribute in node.attribute)]


_SUMMED: dict[str, Callable[[onnx.NodeProto, tuple[int, ...]], int]] = {
    "Conv": lambda _, weight: prod(weight[1:]),
    "MatMul": lambda _, right: right[-2],
    "Gemm": _gemm_length,
}


def tolerance(precision: str, arithmetic: Arithmetic, *, peak: float, rms: float) -> Tolerance:
    """Derive the limits for a form.

    Args:
        precision: "fp32", "fp16" (rounded after each operation) or "int8" (Q/DQ, the rest in FP32 or FP16).
        arithmetic: of the form's graph.
        peak: largest absolute value among the original's outputs.
        rms: root mean square of the original's outputs.

    Raises:
        UserError: the precision has no derivation.
    """
    require_precision(precision)
    return _DERIVATIONS[precision](arithmetic, peak, rms)


def require_precision(precision: str) -> None:
    """Refuse a precision that no tolerance is derived for.

    Raises:
        UserError: the message lists the known ones.
    """
    if precision not in _DERIVATIONS:
        raise UserError(f"no tolerance is derived for precision {precision!r}. Use one of {', '.join(_DERIVATIONS)}.")


def _fp32(arithmetic: Arithmetic, peak: float, rms: float) -> Tolerance:
    expected = CONFIDENCE * sqrt(2 * arithmetic.depth * arithmetic.reduction) * _FP32_UNIT
    limit = min(expected, FP32_RELATIVE_L2)
    return Tolerance(
        relative_l2=limit,
        label_agreement=None,
        task_drop=None,
        expected_relative_l2=expected,
        derivation=(
            f"{_chain(arithmetic)} sums of at most {arithmetic.reduction} terms, unit roundoff 2^-24, on both sides: "
            f"{CONFIDENCE:g} sqrt(2 x {arithmetic.depth} x {arithmetic.reduction}) 2^-24 = {expected:.2g}; the "
            f"project's bar is {FP32_RELATIVE_L2:g}, and the smaller number counts."
        ),
    )


def _fp16(arithmetic: Arithmetic, peak: float, rms: float) -> Tolerance:
    expected = CONFIDENCE * sqrt(2 * max(arithmetic.depth, 1)) * _FP16_UNIT
    return Tolerance(
        relative_l2=expected,
        label_agreement=FP16_LABEL_AGREEMENT,
        task_drop=None,
        expected_relative_l2=expected,
        derivation=(
            f"{_chain(arithmetic)} each rounding its weights and its result once with unit 2^-11 (sums run in FP32): "
            f"{CONFIDENCE:g} sqrt(2 x {max(arithmetic.depth, 1)}) 2^-11 = {expected:.2g}. The outputs reach "
            f"{peak:.3g} of the 65504 that FP16 holds. Labels: the project's bar of {FP16_LABEL_AGREEMENT:.1%}, since "
            "only pixels whose two best scores lie closer than that error may flip."
        ),
    )


def _int8(arithmetic: Arithmetic, peak: float, rms: float) -> Tolerance:
    crest = peak / rms if rms else 1.0
    expected = sqrt(arithmetic.quantised) * crest / (127 * sqrt(12))
    return Tolerance(
        relative_l2=None,
        label_agreement=None,
        task_drop=INT8_TASK_DROP,
        expected_relative_l2=expected,
        derivation=(
            f"{arithmetic.quantised} activation quantisations in sequence, each with a uniform error of peak / 127 "
            f"and a peak of {crest:.2g} times the RMS as at the outputs: sqrt({arithmetic.quantised}) x {crest:.2g} / "
            f"(127 sqrt(12)) = {expected:.2g}. That depends on the calibrated ranges, so it is recorded and not "
            f"judged; judged is the task: within {100 * INT8_TASK_DROP:g} point of the original's mIoU."
        ),
    )


def _chain(arithmetic: Arithmetic) -> str:
    return f"{arithmetic.depth} rounding operations in sequence,"


_DERIVATIONS: dict[str, Callable[[Arithmetic, float, float], Tolerance]] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "int8": _int8,
}
