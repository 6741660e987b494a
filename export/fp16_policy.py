"""Which nodes of a graph stay FP32 when the rest becomes FP16 or BF16, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgeattn.blocks import Fp32Step
from edgeattn.export.attention_islands import ELEMENTWISE_OPS, LAYOUT_OPS, softmax_islands
from edgeattn.export.metadata import CLASS_HIERARCHY, parsed_list
from edgeattn.export.precision_types import (
    FP16,
    ReducedType,
    allows_half,
    constant_array,
    constant_defect,
    is_float,
)
from edgeattn.export.ranges import MeasuredRanges

_STEP_CLASS = f"{Fp32Step.__module__}.{Fp32Step.__qualname__}"
_SUM = "sums over many elements may exceed 65504"
_NORM = "normalises by a sum over many elements"
_SQUARE = "squares exceed 65504 from 256 on"
_GRID = "sampling positions need more digits than FP16 has"
_ENERGY = "on the closed path from attention energies to Softmax"
FP32_OPS: dict[str, str] = {
    **dict.fromkeys(
        [
            "CumSum",
            "GlobalAveragePool",
            "GlobalLpPool",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMean",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ],
        _SUM,
    ),
    **dict.fromkeys(
        [
            "GroupNormalization",
            "InstanceNormalization",
            "LRN",
            "LayerNormalization",
            "LpNormalization",
            "MeanVarianceNormalization",
            "RMSNormalization",
        ],
        _NORM,
    ),
    **dict.fromkeys(["AffineGrid", "GridSample", "RoiAlign"], _GRID),
    "Attention": _ENERGY,
    "Exp": "exceeds 65504 from 11.1 on",
    "Pow": _SQUARE,
    "Range": "index arithmetic",
}
"""Operators of the standard domain that always stay FP32, with the reason."""

_BF16_WORDS = {
    _SUM: "sums over many elements lose digits",
    _SQUARE: "squares double the relative error",
    FP32_OPS["Exp"]: "turns the absolute error of its input into a relative one",
}
"""What is true of BF16, which has the range of FP32, in place of what is true of FP16."""

_SUM_STARTS = (_SUM, _SQUARE, FP32_OPS["Exp"])
_SUM_TAIL = frozenset(
    [
        "Add",
        "Clip",
        "Div",
        "Expand",
        "Identity",
        "Log",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Reciprocal",
        "Reshape",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Unsqueeze",
    ]
)
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
TYPELESS_OPS = frozenset({"Shape", "Size"})
"""Operators that read a tensor of any type without looking at its numbers."""


@dataclass
class Fp16Plan:
    """What stays FP32.

    Attributes:
        reasons: for each node that stays FP32, why.
        notes: sentences about constants, scales and activations that the type cannot hold, each naming the offender.
    """

    reasons: dict[ir.Node, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, node: ir.Node, reason: str) -> None:
        """Keep a node in FP32, unless it stays there already."""
        self.reasons.setdefault(node, reason)


def plan_fp16(
    graph: ir.Graph,
    opset: int,
    *,
    chosen: Collection[str],
    keep_io: bool,
    kind: ReducedType = FP16,
    ranges: MeasuredRanges | None = None,
) -> Fp16Plan:
    """Decide for every node of the main graph whether it stays FP32.

    Args:
        graph: main graph with the type of every value; floating-point constants are initializers.
        opset: version of the standard operators.
        chosen: names of nodes that the user keeps in FP32.
        keep_io: the graph's floating-point inputs and outputs stay FP32.
        kind: what the rest becomes.
        ranges: of the tensors on data, for the same type; None for the policy alone.

    Returns:
        The plan. Nodes without floating-point inputs or outputs are in it only when a rule names them.
    """
    plan = Fp16Plan()
    rules = _rules(graph, opset, chosen, kind)
    for node in graph:
        if node.domain == "" and node.op_type in (*_QUANTISERS, *TYPELESS_OPS):
            if node.name in chosen and node.op_type in _QUANTISERS:
                plan.keep(node, "asked for")
            continue
        for applies, reason in rules:
            if applies(node):
                plan.keep(node, reason)
                break
        else:
            _check_constants(node, opset, plan, kind)
    if ranges is not None:
        _check_ranges(graph, plan, ranges)
    _check_scales(graph, plan, kind)
    _extend_sums(graph, plan)
    _close_gaps(graph, plan, keep_io=keep_io)
    _place_quantisers(graph, plan, keep_io=keep_io)
    if kind != FP16:
        plan.reasons = {node: _BF16_WORDS.get(reason, reason) for node, reason in plan.reasons.items()}
    return plan


def _rules(
    graph: ir.Graph, opset: int, chosen: Collection[str], kind: ReducedType
) -> tuple[tuple[Callable[[ir.Node], bool], str], ...]:
    """Return the rules for single nodes, the most telling first."""
    islands = softmax_islands(graph)
    data = _data_nodes(graph)
    rules: list[tuple[Callable[[ir.Node], bool], str]] = [
        (lambda node: node.name in chosen, "asked for"),
        (_in_fp32_step, "the block's policy"),
        (lambda node: node in islands, _ENERGY),
        (lambda node: any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values()), "control flow"),
        (lambda node: node not in data, "index, mask or constant arithmetic"),
    ]
    rules += [(_is_operator(op_type), reason) for op_type, reason in FP32_OPS.items()]
    rules += [
        (lambda node: node.op_type == "Mul" and node.inputs[0] is node.inputs[1], _SQUARE),
        (_widens_integers, f"integers beyond {kind.integers} are not exact in {kind.label}"),
        (lambda node: _typed_by_attribute(node), "its type is fixed by an attribute"),
        (lambda node: not _has_half_form(node, opset, kind), f"the operator has no {kind.label} form"),
    ]
    return tuple(rules)


def _in_fp32_step(node: ir.Node) -> bool:
    """Say whether a node comes from a step that its block marked."""
    return _STEP_CLASS in parsed_list(node.metadata_props.get(CLASS_HIERARCHY, "[]"))


def _is_operator(op_type: str) -> Callable[[ir.Node], bool]:
    return lambda node: node.op_type == op_type and node.domain == ""


def _data_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute with the numbers (not only the shapes) of the graph's inputs."""
    data: set[ir.Node] = set()
    values = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        captures = any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values())
        if node.op_type not in TYPELESS_OPS and (captures or not values.isdisjoint(node.inputs)):
            data.add(node)
            values.update(node.outputs)
    return data


def _widens_integers(node: ir.Node) -> bool:
    """Say whether a node casts integers of more than 8 bits to float."""
    exact = (ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.UINT8, ir.DataType.INT8)
    return node.op_type == "Cast" and is_float(node.outputs[0]) and getattr(node.inputs[0], "dtype", None) not in exact


def _typed_by_attribute(node: ir.Node) -> bool:
    dtype = node.attributes.get("dtype")
    return dtype is not None and dtype.value == ir.DataType.FLOAT


def _has_half_form(node: ir.Node, opset: int, kind: ReducedType) -> bool:
    """Say whether every floating-point result and at least one floating-point input may have the reduced type."""
    results, inputs = (
        [allows_half(node, i, opset, output=output, kind=kind) for i, value in enumerate(values) if is_float(value)]
        for output, values in ((True, node.outputs), (False, node.inputs))
    )
    return all(results) and (any(inputs) or not inputs)


def _check_constants(node: ir.Node, opset: int, plan: Fp16Plan, kind: ReducedType) -> None:
    """Keep a node in FP32, and note it, when the reduced type cannot hold one of its constants."""
    for index, value in enumerate(node.inputs):
        if value is None or not is_float(value) or not allows_half(node, index, opset, output=False, kind=kind):
            continue
        array = constant_array(value)
        defect = constant_defect(array, kind) if array is not None else None
        if defect is not None:
            plan.keep(node, f"constant {value.name}: {defect}")
            plan.notes.append(f"{node.name} stays FP32: in its constant {value.name}, {defect} in {kind.label}.")


def _check_ranges(graph: ir.Graph, plan: Fp16Plan, ranges: MeasuredRanges) -> None:
    """Keep in FP32 what makes and what reads a tensor that the reduced type cannot hold on the data.

    A quantised tensor holds what it was quantised from.
    """
    flagged: dict[ir.Value, str] = {}
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        producer = value.producer()
        source: ir.Value | None = value
        if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
            quantiser = producer.inputs[0].producer()
            source = quantiser.inputs[0] if quantiser is not None and quantiser.op_type == "QuantizeLinear" else None
        defect = ranges.defect(str(source.name)) if source is not None and is_float(value) else None
        if defect is not None:
            flagged[value] = f"on the calibration data {source.name} {defect}"  # type: ignore[union-attr]
    before = len(plan.reasons)
    for value, reason in flagged.items():
        for node in (value.producer(), *_readers(value)):
            if node is not None and node.graph is graph:
                plan.keep(node, reason)
    if added := len(plan.reasons) - before:
        worst = max(flagged, key=lambda value: ranges.severity(str(value.name)))
        plan.notes.append(
            f"{added} nodes stay FP32 because of {len(flagged)} tensors that {ranges.kind.label} cannot hold; "
            f"the worst: {flagged[worst]}."
        )


def _check_scales(graph: ir.Graph, plan: Fp16Plan, kind: ReducedType) -> None:
    """Keep a quantised edge in FP32, with the operators that read it, when its scale is lost in the reduced type."""
    for node in graph:
        if node.domain != "" or node.op_type not in _QUANTISERS:
            continue
        scale = constant_array(node.inputs[1])
        if scale is None or _worst_loss(scale, kind) <= kind.loss:
            continue
        reason = f"scale {node.inputs[1].name} is lost in {kind.label}"  # type: ignore[union-attr]
        plan.keep(node, reason)
        if node.op_type == "DequantizeLinear":
            readers = [reader for reader, _ in node.outputs[0].uses() if reader.op_type not in _QUANTISERS]
            for reader in readers:
                plan.keep(reader, reason)
            names = ", ".join(str(reader.name) for reader in readers) or "no reader"
            plan.notes.append(f"{node.name} stays FP32, with {names}: {reason} (smallest {scale.min():g}).")


def _worst_loss(scale: np.ndarray, kind: ReducedType) -> float:
    """Return the largest relative change of a scale's elements when rounded to the reduced type."""
    exact = scale.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.abs(kind.rounded(exact).astype(np.float64) - exact) / np.abs(exact)
    return float(np.nan_to_num(loss, nan=np.inf).max(initial=0.0))


def _extend_sums(graph: ir.Graph, plan: Fp16Plan) -> None:
    """Let what follows a sum, up to the division by it, stay FP32: epsilons and mean squares do not fit FP16."""
    sums = {node for node, reason in plan.reasons.items() if reason in _SUM_STARTS}
    for node in graph:
        if node in sums or node.domain != "" or node.op_type not in _SUM_TAIL:
            continue
        producers = [_float_producer(value) for value in node.inputs]
        from_sums = [producer in sums for producer in producers]
        others = [_stays(value, plan) for value in node.inputs]
        divides = node.op_type == "Div" and from_sums[1]
        if any(from_sums) and (all(others) or divides):
            plan.keep(node, "continues or divides by a sum that stays FP32")
            sums.add(node)


def _float_producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None and is_float(value) else None


def _stays(value: ir.Value | None, plan: Fp16Plan) -> bool:
    """Say whether a value is no FP32 number at all, a constant, or the result of a node that stays FP32."""
    if value is None or not is_float(value) or value.is_initializer():
        return True
    return value.producer() in plan.reasons


def _close_gaps(graph: ir.Graph, plan: Fp16Plan, *, keep_io: bool) -> None:
    """Keep layout and elementwise nodes in FP32 that only FP32 nodes feed and read, so that no cast pair arises."""
    gap = {
        node
        for node in graph
        if node not in plan.reasons and node.domain == "" and node.op_type in LAYOUT_OPS | ELEMENTWISE_OPS
    }
    inside = gap | plan.reasons.keys()

    def enclosed(node: ir.Node) -> bool:
        sources = [value for value in node.inputs if value is not None and is_float(value)]
        sources = [value for value in sources if not value.is_initializer()]
        from_graph = keep_io and node.op_type in LAYOUT_OPS  # arithmetic on the graph's inputs does become FP16
        fed = all((from_graph and value.is_graph_input()) or value.producer() in inside for value in sources)
        results = [value for value in node.outputs if is_float(value)]
        read = all(reader in inside for value in results for reader in _readers(value))
        return fed and read and (keep_io or not any(value.is_graph_output() for value in results))

    while leaking := {node for node in gap if not enclosed(node)}:
        gap -= leaking
        inside -= leaking
    for node in graph:
        if node in gap:
            plan.keep(node, "between FP32 nodes only")


def _place_quantisers(graph: ir.Graph, plan: Fp16Plan, *, keep_io: bool) -> None:
    """Give each QuantizeLinear the type of its producer and each DequantizeLinear the type of its readers."""
    for node in graph:
        if node.domain != "" or node in plan.reasons:
            continue
        if node.op_type == "DequantizeLinear" and plan.reasons.keys() >= _readers(node.outputs[0]):
            if not node.outputs[0].is_graph_output() or keep_io:
                plan.keep(node, "read by FP32 nodes only")
        elif node.op_type == "QuantizeLinear":
            source = node.inputs[0]
            given = source is not None and source.is_graph_input() and keep_io
            if given or source is None or source.is_initializer() or source.producer() in plan.reasons:
                plan.keep(node, "quantises an FP32 tensor")


def _readers(value: ir.Value) -> set[ir.Node]:
    """Return the nodes that read a value's numbers."""
    return {reader for reader, _ in value.uses() if reader.op_type not in TYPELESS_OPS}
