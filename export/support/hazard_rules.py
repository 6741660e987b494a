"""Rules about what FP16 cannot hold, sizes that only a run can tell, and what DLA leaves to the GPU."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from edgeattn.export.support.attribute_rules import REDUCTIONS
from edgeattn.export.support.context import NodeContext, constant_of, type_of
from edgeattn.export.support.operators import is_imported, on_dla
from edgeattn.export.support.rule import OBSERVATIONS, PARSER, TABLE, Mark, NodeRule, Rule, Severity

FP16_LIMIT = 65504
"""Largest finite FP16 number, and thus the largest count of ones that an FP16 sum can hold."""

_FORMAT = "IEEE 754, binary16"
_SUMS = (REDUCTIONS - {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd"}) | {"CumSum"}


def _half(node: NodeContext) -> bool:
    return node.type(0) == ir.DataType.FLOAT16


def _softmax_keys(node: NodeContext) -> str | None:
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1)
    keys = node.size(0, axis)
    return f"it sums over {keys} entries in FP16" if _half(node) and keys is not None and keys > FP16_LIMIT else None


def _long_sum(node: NodeContext) -> str | None:
    if not _half(node):
        return None
    shape = node.shape(0)
    if shape is None:
        return None
    axes = node.attribute("axes")
    if node.input(1) is not None:
        array = node.constant(1)
        if array is None:
            return None
        axes = array.ravel().tolist()
    sizes = [shape[axis] for axis in axes if -len(shape) <= axis < len(shape)] if axes else list(shape)
    count = prod(size for size in sizes if size is not None)
    return f"it sums {count} numbers in FP16" if count > FP16_LIMIT else None


def _long_product(node: NodeContext) -> str | None:
    inner = node.size(0, -1)
    return f"it sums {inner} products in FP16" if _half(node) and inner is not None and inner > FP16_LIMIT else None


def _exponential_sum(node: NodeContext) -> str | None:
    return "it is expanded to log(sum(exp(x))) in FP16, which overflows above 11" if _half(node) else None


def _half_constant(node: NodeContext) -> str | None:
    for value in node.node.inputs:
        if type_of(value) != ir.DataType.FLOAT16:
            continue
        array = constant_of(value)
        if array is not None and not np.all(np.isfinite(array)):
            wrong = array[~np.isfinite(array)].flat[0]
            return f"{value.name} holds {wrong}"  # type: ignore[union-attr]
    return None


def _narrowed(node: NodeContext) -> str | None:
    if node.attribute("to") != ir.DataType.FLOAT16:
        return None
    array = node.constant(0)
    if array is None or not np.issubdtype(array.dtype, np.number):
        return None
    largest = float(np.max(np.abs(array.astype(np.float64)), initial=0.0, where=np.isfinite(array)))
    return f"it narrows {largest:g} to FP16" if largest > FP16_LIMIT else None


def _not_on_dla(node: NodeContext) -> str | None:
    if not node.dla or on_dla(node.operator) or not is_imported(node.operator, node.version):
        return None
    return f"{node.operator} has no layer on DLA"


RULES: tuple[Rule, ...] = (
    NodeRule(
        id="fp16-softmax",
        title="Softmax over more entries than FP16 can count",
        severity=Severity.ATTENTION,
        remedy="Keep the path from the energies to the Softmax in FP32.",
        source=_FORMAT,
        mark=Mark.ARITHMETIC,
        operators=frozenset({"Softmax", "LogSoftmax"}),
        find=_softmax_keys,
    ),
    NodeRule(
        id="fp16-sum",
        title="sum of more numbers than FP16 can count",
        severity=Severity.ATTENTION,
        remedy="Use ReduceMean, or keep the sum in FP32.",
        source=_FORMAT,
        mark=Mark.ARITHMETIC,
        operators=_SUMS,
        find=_long_sum,
    ),
    NodeRule(
        id="fp16-matmul",
        title="matrix product over more numbers than FP16 can count",
        severity=Severity.ATTENTION,
        remedy="Scale one factor down by the length first, or keep the product in FP32.",
        source=_FORMAT,
        mark=Mark.ARITHMETIC,
        operators=frozenset({"MatMul"}),
        find=_long_product,
    ),
    NodeRule(
        id="fp16-exponentials",
        title="ReduceLogSumExp does not subtract the maximum",
        severity=Severity.ATTENTION,
        remedy="Write it as max + log(ReduceSum(exp(x - max))), or keep it in FP32.",
        source=f"{PARSER}; {OBSERVATIONS}",
        mark=Mark.CODE,
        operators=frozenset({"ReduceLogSumExp"}),
        find=_exponential_sum,
    ),
    NodeRule(
        id="fp16-constant",
        title="FP16 constant that is not a number",
        severity=Severity.ATTENTION,
        remedy="Use a finite number such as -1e4 for masks, or Where with a boolean mask.",
        source=_FORMAT,
        mark=Mark.ARITHMETIC,
        find=_half_constant,
    ),
    NodeRule(
        id="fp16-narrowed",
        title="constant beyond FP16's range",
        severity=Severity.ATTENTION,
        remedy=f"Keep it in FP32, or use a number up to {FP16_LIMIT}.",
        source=_FORMAT,
        mark=Mark.ARITHMETIC,
        operators=frozenset({"Cast"}),
        find=_narrowed,
    ),
    NodeRule(
        id="size-from-data",
        title="size that depends on the data",
        severity=Severity.ATTENTION,
        remedy="Write it with a mask of fixed size; otherwise the caller needs an output allocator, and nothing behind "
        "it can be planned ahead.",
        source=f"{TABLE}; {PARSER}",
        mark=Mark.CODE,
        operators=frozenset({"NonZero", "NonMaxSuppression"}),
        find=lambda node: f"{node.operator} gives as many results as the data demand",
    ),
    NodeRule(
        id="dla",
        title="not on DLA",
        severity=Severity.ADVICE,
        remedy="Leave it to the GPU, or build for DLA with GPU fallback and count the changes between the two.",
        source="NVIDIA, working with DLA",
        mark=Mark.DOCUMENTED,
        unverified="each",
        find=_not_on_dla,
    ),
)
