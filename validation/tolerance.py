"""How far a form may be from the original: derived from the arithmetic, recorded with its derivation, never widened.

The rounding model is the probabilistic one of Higham and Mary, "A New Approach to Probabilistic Rounding Error
Analysis", SIAM J. Sci. Comput. 41(5), 2019: independent, zero-mean rounding errors of unit u make a sum of n terms
wrong by at most `CONFIDENCE * sqrt(n) * u`, and d operations in sequence add up in quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, isfinite, prod, sqrt
from typing import Any

import onnx
from onnx import helper, inliner, shape_inference

from edgeattn.foundation import UserError
from edgeattn.validation.saturation import Condition, Squashing, squashed_outputs

FP32_RELATIVE_L2 = 1e-5
"""Bar of the project: no FP32 output may be farther than this from the original, whatever the derivation allows."""

FP16_LABEL_AGREEMENT = 0.995
"""Bar of the project: fraction of labels, of pixels or of whole images, that an FP16 form shares with the original."""

BF16_LABEL_AGREEMENT = 1 - 8 * (1 - FP16_LABEL_AGREEMENT)
"""The same for BF16, whose unit roundoff is eight times FP16's: as many times more labels lie within the error."""

INT8_TASK_DROP = 0.01
"""Bar of the project: one point of the task metric between an INT8 form and the FP32 original."""

CONFIDENCE = 4.0
"""The factor lambda of the probabilistic bound; one value exceeds it with probability 2 exp(-lambda^2 / 2) = 7e-4."""

_HALF = onnx.TensorProto.FLOAT16
_FP32_UNIT, _FP16_UNIT, _BF16_UNIT = 2.0**-24, 2.0**-11, 2.0**-8

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
        reduction: terms of the longest sum whose length is known: of a convolution, product, pool, norm, Softmax.
        quantised: activation quantisations on the longest path.
        squashed: outputs that come from a Sigmoid or Softmax.
        accumulation: terms after which running totals are rounded to FP16, counted in `depth`; None for FP32 sums.
    """

    depth: int
    reduction: int
    quantised: int
    squashed: tuple[Squashing, ...] = ()
    accumulation: int | None = None


@dataclass(frozen=True)
class OutputLimit:
    """What a user set for one output, in place of the derived limit of its error.

    Attributes:
        output: name of the output.
        relative_l2: largest relative L2 on any sample; None where not set.
        max_abs: largest absolute difference of any value; None where not set.
    """

    output: str
    relative_l2: float | None
    max_abs: float | None


@dataclass(frozen=True)
class Tolerance:
    """The limits a form is judged by; None where a quantity is recorded but not judged.

    Attributes:
        relative_l2: largest relative L2 of any output on any sample.
        label_agreement: smallest fraction of labels, of pixels or of whole images, that are the original's.
        task_drop: largest difference of the task metric (0..1) from the original's.
        expected_relative_l2: what the rounding model predicts as an upper estimate, judged or not.
        derivation: where the numbers come from.
        outputs: what the user set for single outputs.
    """

    relative_l2: float | None
    label_agreement: float | None
    task_drop: float | None
    expected_relative_l2: float
    derivation: str
    outputs: tuple[OutputLimit, ...] = ()

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Tolerance:
        """Return the tolerance that a record such as `parity.json` holds as plain data."""
        return cls(**{**record, "outputs": tuple(OutputLimit(**entry) for entry in record["outputs"])})

    def of_output(self, name: str) -> OutputLimit:
        """Return the limits of an output's error: the user's where set, the derived one otherwise."""
        given = next((entry for entry in self.outputs if entry.output == name), None)
        return given or OutputLimit(name, self.relative_l2, None)

    def allowed_error(self, name: str, condition: Condition) -> float | None:
        """Return the norm of the error that one sample of an output behind a Sigmoid or Softmax may have.

        None where nothing is judged. A limit that the user set counts as it stands.
        """
        limit = self.of_output(name).relative_l2
        if limit is None or any(entry.output == name for entry in self.outputs):
            return None if limit is None else limit * condition.reference
        return max(limit * condition.reference, limit * condition.logits + CONFIDENCE * condition.floor)


@dataclass(frozen=True)
class UserLimits:
    """Limits that a user asked for, by the name of the output; the empty name stands for all others.

    Attributes:
        relative: largest relative L2 on any sample.
        absolute: largest absolute difference of any value.
    """

    relative: Mapping[str, float]
    absolute: Mapping[str, float]

    @classmethod
    def parse(cls, relative: Iterable[str] = (), absolute: Iterable[str] = ()) -> UserLimits:
        """Read `NAME:NUMBER`, or `NUMBER` for all outputs.

        Raises:
            UserError: a text is no such thing, or an output has two limits of one kind.
        """
        return cls(_numbers(relative, "--rtol"), _numbers(absolute, "--atol"))

    def check(self, outputs: Collection[str]) -> None:
        """Refuse names that are none of the outputs.

        Raises:
            UserError: the message lists the outputs.
        """
        for option, numbers in (("--rtol", self.relative), ("--atol", self.absolute)):
            for name in numbers:
                if name and name not in outputs:
                    raise UserError(
                        f"{option} names the output {name!r}, but the model has {', '.join(outputs)}. "
                        "Give one of these, or a number alone for all."
                    )

    def of_output(self, name: str) -> OutputLimit | None:
        """Return what is set for an output, or None."""
        relative, absolute = (numbers.get(name, numbers.get("")) for numbers in (self.relative, self.absolute))
        return None if relative is None and absolute is None else OutputLimit(name, relative, absolute)


NO_LIMITS = UserLimits({}, {})
"""What a user sets who sets nothing: the derived limits count."""


def _numbers(texts: Iterable[str], option: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not isfinite(value) or value < 0:
            raise UserError(f"{option} {text!r} is no limit. Give NAME:NUMBER or NUMBER, such as mask:1e-4.")
        if name in found:
            raise UserError(f"{option} gives {name or 'all outputs'} two limits. Drop one of them.")
        found[name] = value
    return found


def as_set_by_user(derived: Tolerance, limits: UserLimits, outputs: Iterable[str]) -> Tolerance:
    """Return a tolerance in which the user's limits replace the derived limits of the errors, and which says so.

    Args:
        derived: what the arithmetic allows.
        limits: what the user set.
        outputs: names of the outputs that are judged.
    """
    given = [entry for name in outputs if (entry := limits.of_output(name)) is not None]
    if not given:
        return derived
    sentences = [
        f"Set by the user for output {entry.output}, in place of the derived limit: "
        + " and ".join(
            f"{what} at most {value:g}"
            for what, value in (("relative L2", entry.relative_l2), ("absolute difference", entry.max_abs))
            if value is not None
        )
        + "."
        for entry in given
    ]
    return replace(derived, outputs=tuple(given), derivation=" ".join([derived.derivation, *sentences]))


def arithmetic_of(model: onnx.ModelProto, *, accumulation: int | None = None) -> Arithmetic:
    """Read depth, reduction length and number of quantisations from a graph, local functions included.

    Args:
        model: any form, FP32, FP16 or with Q/DQ; it is not modified.
        accumulation: terms after which the running totals of FP16 sums are rounded; None for FP32 sums.
    """
    inlined = inliner.inline_local_functions(model) if model.functions else model
    graph = shape_inference.infer_shapes(inlined).graph
    depth: dict[str, int] = {}
    quantised: dict[str, int] = {}
    lengths = _reductions(graph)
    half = {info.name for info in (*graph.value_info, *graph.output) if info.type.tensor_type.elem_type == _HALF}
    for node in graph.node:
        roundings = int(node.op_type not in _EXACT)
        if accumulation is not None and node.output[0] in half:
            roundings = max(roundings, ceil(lengths.get(node.output[0], 0) / accumulation))
        for steps, counts in ((depth, roundings), (quantised, int(node.op_type == "QuantizeLinear"))):
            longest = max((steps.get(name, 0) for name in node.input), default=0) + counts
            steps.update(dict.fromkeys(node.output, longest))
    outputs = [output.name for output in graph.output]
    return Arithmetic(
        depth=max((depth.get(name, 0) for name in outputs), default=0),
        reduction=max(lengths.values(), default=1),
        quantised=max((quantised.get(name, 0) for name in outputs), default=0),
        squashed=squashed_outputs(graph),
        accumulation=accumulation,
    )


def _reductions(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the length of every sum that the recorded and inferred shapes tell, by the name of its result."""
    found = {}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        summed = _SUMMED.get(node.op_type)
        if summed is None or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        inputs = [shapes.get(name, ()) for name in node.input]
        try:
            length = summed(attributes, inputs, shapes.get(node.output[0], (0,)))
        except (IndexError, ZeroDivisionError):  # a shape that is not known
            continue
        if length > 0:
            found[node.output[0]] = length
    return found


_Shape = tuple[int, ...]
_Summed = Callable[[Mapping[str, object], list[_Shape], _Shape], int]


def _axis(attributes: Mapping[str, object], default: int) -> int:
    axis = attributes.get("axis", default)
    assert isinstance(axis, int)
    return axis


def _gemm(attributes: Mapping[str, object], inputs: list[_Shape], _: _Shape) -> int:
    return inputs[1][bool(attributes.get("transB"))]


def _einsum(attributes: Mapping[str, object], inputs: list[_Shape], _: _Shape) -> int:
    equation = attributes["equation"]
    assert isinstance(equation, bytes)
    operands, _arrow, result = equation.decode().replace(" ", "").partition("->")
    sizes = {
        letter: size
        for term, shape in zip(operands.split(","), inputs, strict=True)
        for letter, size in zip(term.replace("...", "")[::-1], shape[::-1], strict=False)
    }
    return prod(size for letter, size in sizes.items() if letter not in result)


def _resize(attributes: Mapping[str, object], inputs: list[_Shape], _: _Shape) -> int:
    """Interpolation weights carry the rounding of coordinates as large as the tensor, as much as so many terms do."""
    return 0 if attributes.get("mode", b"nearest") == b"nearest" else max(inputs[0][2:], default=0)


def _over_axes(_: Mapping[str, object], inputs: list[_Shape], output: _Shape) -> int:
    return prod(inputs[0]) // prod(output)


_SUMMED: dict[str, _Summed] = {
    "Conv": lambda _, inputs, __: prod(inputs[1][1:]),
    "ConvTranspose": lambda attributes, inputs, _: (
        prod((inputs[1][0], *inputs[1][2:])) // int(str(attributes.get("group", 1)))
    ),
    "MatMul": lambda _, inputs, __: inputs[1][-2],
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Resize": _resize,
    "Softmax": lambda attributes, inputs, _: inputs[0][_axis(attributes, -1)],
    "LogSoftmax": lambda attributes, inputs, _: inputs[0][_axis(attributes, -1)],
    "LayerNormalization": lambda attributes, inputs, _: prod(inputs[0][_axis(attributes, -1) :]),
    "InstanceNormalization": lambda _, inputs, __: prod(inputs[0][2:]),
    "GroupNormalization": lambda attributes, inputs, _: prod(inputs[0][1:]) // int(str(attributes["num_groups"])),
    "GlobalAveragePool": lambda _, inputs, __: prod(inputs[0][2:]),
    "AveragePool": lambda attributes, _, __: prod(attributes["kernel_shape"]),  # type: ignore[call-overload]
    **{f"Reduce{kind}": _over_axes for kind in ("L1", "L2", "LogSum", "LogSumExp", "Mean", "Prod", "Sum", "SumSquare")},
    **dict.fromkeys(("GRU", "LSTM", "RNN"), lambda _, inputs, __: inputs[1][2] + inputs[2][2]),
}


@dataclass(frozen=True)
class _Original:
    """What a derivation takes from the original: range and root mean square of its outputs, and its task metric."""

    peak: float
    rms: float
    metric: str


def tolerance(
    precision: str, arithmetic: Arithmetic, *, peak: float, rms: float, metric: str = "task metric"
) -> Tolerance:
    """Derive the limits for a form.

    Args:
        precision: "fp32", "fp16" or "bf16" (rounded after each operation), or "int8" (Q/DQ, the rest in FP32 or FP16).
        arithmetic: of the form's graph.
        peak: largest absolute value among the original's outputs.
        rms: root mean square of the original's outputs.
        metric: what the task is judged by, such as "mIoU"; for the derivation's words.

    Raises:
        UserError: the precision has no derivation.
    """
    require_precision(precision)
    derived = _DERIVATIONS[precision](arithmetic, _Original(peak, rms, metric))
    return replace(derived, derivation=" ".join([derived.derivation, *_conditions(arithmetic)]))


def require_precision(precision: str) -> None:
    """Refuse a precision that no tolerance is derived for.

    Raises:
        UserError: the message lists the known ones.
    """
    if precision not in _DERIVATIONS:
        raise UserError(f"no tolerance is derived for precision {precision!r}. Use one of {', '.join(_DERIVATIONS)}.")


def _fp32(arithmetic: Arithmetic, original: _Original) -> Tolerance:
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


def _fp16(arithmetic: Arithmetic, original: _Original) -> Tolerance:
    expected = CONFIDENCE * sqrt(2 * max(arithmetic.depth, 1)) * _FP16_UNIT
    return Tolerance(
        relative_l2=expected,
        label_agreement=FP16_LABEL_AGREEMENT,
        task_drop=None,
        expected_relative_l2=expected,
        derivation=(
            f"{_chain(arithmetic)} each rounding its weights and its result once with unit 2^-11 "
            f"({_sums(arithmetic)}): {CONFIDENCE:g} sqrt(2 x {max(arithmetic.depth, 1)}) 2^-11 = {expected:.2g}. The "
            f"outputs reach {original.peak:.3g} of the 65504 that FP16 holds. Labels: the project's bar of "
            f"{FP16_LABEL_AGREEMENT:.1%}, since only those whose two best scores lie closer than that error may change."
        ),
    )


def _bf16(arithmetic: Arithmetic, original: _Original) -> Tolerance:
    depth = max(arithmetic.depth, 1)
    expected = CONFIDENCE * sqrt(2 * depth) * _BF16_UNIT
    return Tolerance(
        relative_l2=expected,
        label_agreement=BF16_LABEL_AGREEMENT,
        task_drop=None,
        expected_relative_l2=expected,
        derivation=(
            f"{_chain(arithmetic)} each rounding its weights and its result once with unit 2^-8 (sums run in FP32): "
            f"{CONFIDENCE:g} sqrt(2 x {depth}) 2^-8 = {expected:.2g}. Labels: eight times as many lie within "
            f"that error as within FP16's, so {BF16_LABEL_AGREEMENT:.1%} in place of FP16's "
            f"{FP16_LABEL_AGREEMENT:.1%}."
        ),
    )


def _int8(arithmetic: Arithmetic, original: _Original) -> Tolerance:
    crest = original.peak / original.rms if original.rms else 1.0
    steps, depth = max(arithmetic.quantised, 1), max(arithmetic.depth, 1)
    noise, rounding = sqrt(steps) * crest / (127 * sqrt(12)), sqrt(2 * depth) * _FP16_UNIT
    expected = sqrt(noise**2 + rounding**2)
    return Tolerance(
        relative_l2=CONFIDENCE * expected,
        label_agreement=None,
        task_drop=INT8_TASK_DROP,
        expected_relative_l2=expected,
        derivation=(
            f"{steps} activation quantisations in sequence, each with a uniform error of peak / 127 and a peak of "
            f"{crest:.2g} times the RMS as at the outputs: sqrt({steps}) x {crest:.2g} / (127 sqrt(12)) = {noise:.2g}; "
            f"with the FP16 rounding of {depth} operations in sequence, sqrt(2 x {depth}) 2^-11 = {rounding:.2g}, "
            f"{expected:.2g} in all. {CONFIDENCE:g} times that is the limit of any one image. The task: the project's "
            f"bar, within {100 * INT8_TASK_DROP:g} point of the original's {original.metric}."
        ),
    )


def _conditions(arithmetic: Arithmetic) -> Iterator[str]:
    """Yield a sentence for each function that outputs come from and that changes what an error means."""
    for function in dict.fromkeys(entry.function for entry in arithmetic.squashed):
        names = ", ".join(entry.output for entry in arithmetic.squashed if entry.function == function)
        slope = "y (1 - y)" if function == "Sigmoid" else "y sqrt((1 - y)^2 + sum of the other y^2)"
        yield (
            f"Output {names} comes from a {function}, so the limit counts for its logits: an image also passes when "
            f"its error stays below limit x rms(logits) x norm of {slope}, what such an error of the logits becomes, "
            f"plus {CONFIDENCE:g} x 2^-24 for each value, which {function} kernels are accurate to."
        )


def _sums(arithmetic: Arithmetic) -> str:
    if arithmetic.accumulation is None:
        return "sums run in FP32"
    return f"running totals are rounded after every {arithmetic.accumulation} terms, which counts as operations"


def _chain(arithmetic: Arithmetic) -> str:
    return f"{arithmetic.depth} rounding operations in sequence,"


_DERIVATIONS: dict[str, Callable[[Arithmetic, _Original], Tolerance]] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "bf16": _bf16,
    "int8": _int8,
}
