"""Rules about element types that a strongly typed network refuses, or that change on the way."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from edgeattn.export.support.context import HALF_TYPES, NodeContext, type_of
from edgeattn.export.support.operator_rules import is_storable
from edgeattn.export.support.operators import is_imported
from edgeattn.export.support.rule import HEADERS, OBSERVATIONS, PARSER, TABLE, Mark, NodeRule, Rule, Severity

_SAME = {
    **dict.fromkeys(
        (
            *(
                "Add",
                "And",
                "Concat",
                "Div",
                "Equal",
                "Greater",
                "GreaterOrEqual",
                "Less",
                "LessOrEqual",
                "Max",
                "Mean",
            ),
            *("Min", "Mod", "Mul", "Or", "PRelu", "Sub", "Sum", "Xor", "MatMul", "Gemm", "Einsum", "GridSample"),
        ),
        slice(None),
    ),
    "Where": slice(1, 3),
    "Conv": slice(0, 3),
    "ConvTranspose": slice(0, 3),
    "DeformConv": slice(0, 5),
    "InstanceNormalization": slice(0, 3),
    "GroupNormalization": slice(0, 3),
    "Range": slice(0, 3),
    "Clip": slice(0, 3),
}
"""Inputs that have to be of one type, by operator."""


def _types(node: NodeContext, indices: Iterable[int]) -> list[ir.DataType]:
    return [kind for kind in (node.type(index) for index in indices) if kind is not None]


def _mixed(node: NodeContext) -> str | None:
    kinds = dict.fromkeys(_types(node, range(*_SAME[node.operator].indices(len(node.node.inputs)))))
    return f"its inputs are {' and '.join(map(str, kinds))}" if len(kinds) > 1 else None


def _mixed_power(node: NodeContext) -> str | None:
    kinds = _types(node, (0, 1))
    floats = [kind for kind in kinds if kind.is_floating_point()]
    return f"its base is {kinds[0]} and its exponent {kinds[1]}" if len(set(floats)) > 1 else None


def _parser_constants(node: NodeContext) -> str | None:
    kind = node.type(0)
    return f"the importer adds FP32 constants to {kind}" if kind in HALF_TYPES else None


def _gemm_factors(node: NodeContext) -> str | None:
    factors = [name for name in ("alpha", "beta") if node.attribute(name, 1.0) != 1.0]
    if factors == ["beta"] and node.input(2) is None:
        return None
    kind = node.type(0)
    return f"{factors[0]} is multiplied in as FP32 with {kind}" if factors and kind in HALF_TYPES else None


def _mean(node: NodeContext) -> str | None:
    kind = node.type(0)
    return f"the importer writes FP32 bits into its {kind} factor" if kind in HALF_TYPES else None


def _uint8_inside(node: NodeContext) -> str | None:
    if node.operator in ("QuantizeLinear", "Constant") or not is_imported(node.operator, node.version):
        return None
    for value in node.node.outputs:
        if type_of(value) == ir.DataType.UINT8 and not value.is_graph_output():
            return f"{value.name} is UINT8 inside the graph"
    return None


def _unstorable(node: NodeContext) -> str | None:
    if node.operator == "Cast" and not is_storable(ir.DataType(node.attribute("to", 1))):
        return f"it casts to {ir.DataType(node.attribute('to'))}"
    if node.operator == "Constant" and not node.has("value_string") and not node.has("value_strings"):
        for value in node.node.outputs:
            if not is_storable(type_of(value)):
                return f"it holds {type_of(value)}"
    return None


def _double(node: NodeContext) -> str | None:
    if node.operator == "Cast" and node.attribute("to") == ir.DataType.DOUBLE:
        return "it casts to FP64, which becomes FP32"
    return None


RULES: tuple[Rule, ...] = (
    NodeRule(
        id="types-mixed",
        title="inputs of different types",
        severity=Severity.REJECTED,
        remedy="Cast the inputs to one type in the graph; strongly typed networks convert nothing.",
        source=f"{OBSERVATIONS}; {HEADERS}",
        mark=Mark.HEADER,
        operators=frozenset(_SAME),
        find=_mixed,
    ),
    NodeRule(
        id="power-mixed",
        title="Pow of different types",
        severity=Severity.REJECTED,
        remedy="Give the exponent the type of the base.",
        source=f"{PARSER}; {HEADERS}",
        mark=Mark.HEADER,
        before=(10, 8),
        operators=frozenset({"Pow"}),
        find=_mixed_power,
    ),
    NodeRule(
        id="parser-constants",
        title="the importer mixes FP32 constants in",
        severity=Severity.REJECTED,
        remedy="Keep the operator in FP32 with casts around it, or write it in elementary operators.",
        source=f"{OBSERVATIONS}; {PARSER}",
        mark=Mark.HEADER,
        operators=frozenset({"Celu", "MeanVarianceNormalization"}),
        find=_parser_constants,
    ),
    NodeRule(
        id="gemm-factors",
        title="Gemm mixes FP32 factors in",
        severity=Severity.REJECTED,
        remedy="Fold alpha and beta into the weight and the bias.",
        source=PARSER,
        mark=Mark.HEADER,
        before=(10, 10),
        unverified="10.4 to 10.9",
        operators=frozenset({"Gemm"}),
        find=_gemm_factors,
    ),
    NodeRule(
        id="mean-half",
        title="Mean of half precision is wrong",
        severity=Severity.ATTENTION,
        remedy="Write it as Sum and Mul, or keep it in FP32.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Mean"}),
        find=_mean,
    ),
    NodeRule(
        id="uint8-inside",
        title="UINT8 between nodes",
        severity=Severity.REJECTED,
        remedy="Cast the input to a floating-point type first; UINT8 is for inputs and outputs of the network only.",
        source=OBSERVATIONS,
        mark=Mark.OBSERVED,
        find=_uint8_inside,
    ),
    NodeRule(
        id="type-unknown-to-tensorrt",
        title="element type that TensorRT does not have",
        severity=Severity.REJECTED,
        remedy="Use FP32, FP16, BF16, INT32, INT64 or BOOL.",
        source=PARSER,
        mark=Mark.CODE,
        operators=frozenset({"Cast", "Constant"}),
        find=_unstorable,
    ),
    NodeRule(
        id="double",
        title="FP64 becomes FP32",
        severity=Severity.ATTENTION,
        remedy="Cast to FP32 in the model, so that parity is judged in the precision that runs.",
        source=TABLE,
        mark=Mark.DOCUMENTED,
        operators=frozenset({"Cast"}),
        find=_double,
    ),
)
