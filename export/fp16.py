"""FP32 to FP16 or BF16: a strongly typed graph in which the types of the tensors decide, not a builder's flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgeattn.export.fp16_policy import TYPELESS_OPS, Fp16Plan, plan_fp16
from edgeattn.export.metadata import metadata_of
from edgeattn.export.names import claim_name
from edgeattn.export.node_selection import selected_names, with_node_names
from edgeattn.export.opsets import IR_VERSION, standard_opset
from edgeattn.export.precision_types import (
    BF16,
    FP16,
    ReducedType,
    allows_half,
    check_types,
    constant_array,
    element_types,
    has_half,
    is_float,
    vanishing_count,
    write_types,
)
from edgeattn.export.ranges import MeasuredRanges
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN, spec_of
from edgeattn.plugins_trt.onnx_form import local_function

_FLOAT = ir.DataType.FLOAT

_GRID_MODES = {"bilinear": "linear", "bicubic": "cubic"}
"""Names of GridSample's modes up to opset 19, and from 20 on."""

_CHANGED = {"GroupNormalization": 21, "DFT": 20}
"""Operators that mean something else from an opset on."""


@dataclass(frozen=True)
class Fp16Result:
    """An FP16 or BF16 model and what is neither in it.

    Attributes:
        model: the strongly typed model.
        fp32_nodes: name of each floating-point node that stays FP32, with the reason.
        notes: sentences that a user should read: constants, scales and activations that the type cannot hold, a raised
            opset.
    """

    model: onnx.ModelProto
    fp32_nodes: Mapping[str, str]
    notes: tuple[str, ...]


def to_fp16(
    model: onnx.ModelProto,
    *,
    keep_fp32: Collection[str] = (),
    keep_io: bool = True,
    ranges: MeasuredRanges | None = None,
) -> Fp16Result:
    """Convert a model to FP16 with the types written into the graph.

    FP32 stay: the closed path from the energies of every attention to its Softmax (see `attention_islands`), sums over
    many elements, norms, index arithmetic, operators without an FP16 form, nodes with a constant that FP16 cannot hold,
    and what makes or reads a tensor that FP16 cannot hold on data, where that was measured. Nodes of domain `edgeattn`
    take and give FP16; inside their local functions the same path stays FP32. Q/DQ get FP16 scales, because a
    DequantizeLinear has the type of its scale; a scale that FP16 loses keeps its edge, with the operator that reads it,
    in FP32. A tensor is cast at most once, and never to and fro.

    Args:
        model: FP32 model, possibly with INT8 Q/DQ; it is not changed. Plugin nodes come with their local functions.
        keep_fp32: nodes that stay FP32: node names, operator types, or torch module paths that stand for everything
            inside.
        keep_io: leave the graph's inputs and outputs FP32 and cast behind them. Otherwise they become FP16.
        ranges: what the tensors of the model held on data, see `edgeattn.export.ranges.measure_ranges`.

    Returns:
        The model with the same names, metadata, functions and sizes, and the record of what stayed FP32.

    Raises:
        UserError: `keep_fp32` names something unknown, the model already has FP16 tensors or inconsistent types, or it
            holds Q/DQ at an opset below 18.
    """
    return _convert(model, FP16, keep_fp32=keep_fp32, keep_io=keep_io, ranges=ranges)


def to_bf16(
    model: onnx.ModelProto,
    *,
    keep_fp32: Collection[str] = (),
    keep_io: bool = True,
    ranges: MeasuredRanges | None = None,
) -> Fp16Result:
    """Convert a model to BF16, with the same parts in FP32 as `to_fp16`; see there for the arguments.

    BF16 has the range of FP32 and an eighth of FP16's digits, so it is digits that the FP32 parts keep. Convolutions
    take BF16 from opset 22 on; a model of an earlier opset is raised to it.

    Raises:
        UserError: as `to_fp16`; or the model holds an operator that means something else at opset 22.
    """
    return _convert(model, BF16, keep_fp32=keep_fp32, keep_io=keep_io, ranges=ranges)


def _convert(
    model: onnx.ModelProto,
    kind: ReducedType,
    *,
    keep_fp32: Collection[str],
    keep_io: bool,
    ranges: MeasuredRanges | None,
) -> Fp16Result:
    """Convert a model to a reduced type."""
    if ranges is not None and ranges.kind != kind:
        raise ValueError(f"ranges are measured for {ranges.kind.label}, not for {kind.label}")
    named = with_node_names(model)
    types = element_types(named)
    if has_half(types):
        raise UserError("the ONNX model already has FP16 or BF16 tensors. Give the FP32 form of the model.")
    chosen = selected_names(
        ((node.name, metadata_of(node)) for node in named.graph.node),
        with_operators_named(named, keep_fp32),
        "keep_fp32",
    )
    opset, opset_notes = _opset_for(named, kind)
    working = ir.from_proto(named)
    write_types(working, types)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(working)
    _rename_modes(working, standard_opset(named), opset)
    plan = plan_fp16(working.graph, opset, chosen=chosen, keep_io=keep_io, kind=kind, ranges=ranges)
    fp32_nodes = {
        str(node.name): plan.reasons[node]
        for node in working.graph
        if node in plan.reasons and any(map(is_float, (*node.inputs, *node.outputs)))
    }
    notes = _Conversion(working, plan, opset, kind, keep_io=keep_io).run()
    working.ir_version = IR_VERSION
    result = ir.to_proto(working)
    _set_opset(result, opset)
    check_types(result)
    return Fp16Result(result, fp32_nodes, (*opset_notes, *plan.notes, *notes))


def with_operators_named(model: onnx.ModelProto, selectors: Collection[str]) -> Collection[str]:
    """Replace the operator types in a user's list by the names of the nodes of those types.

    An operator type that occurs in the local function of a plugin node chooses the plugin node.

    Args:
        model: its nodes have names.
        selectors: node names, torch module paths or operator types.
    """
    if isinstance(selectors, str):
        return selectors
    inside = {(entry.domain, entry.name): {node.op_type for node in entry.node} for entry in model.functions}
    named: dict[str, list[str]] = {}
    for node in model.graph.node:
        for op_type in {node.op_type, *inside.get((node.domain, node.op_type), ())}:
            named.setdefault(op_type, []).append(node.name)
    return [name for entry in selectors for name in named.get(entry, [entry])]


def _opset_for(model: onnx.ModelProto, kind: ReducedType) -> tuple[int, list[str]]:
    """Return the opset of the result, and a note when it has to rise."""
    opset = standard_opset(model)
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    needed, what = kind.opset, f"whose convolutions, pools and norms take {kind.label}"
    if quantised and kind.qdq_opset > needed:
        needed, what = kind.qdq_opset, f"whose Q/DQ take {kind.label} scales"
    if opset >= needed:
        return opset, []
    if quantised and opset < kind.qdq_opset - 1:
        raise UserError(
            f"the ONNX model has Q/DQ at opset {opset}, but {kind.label} scales need opset {kind.qdq_opset}. Export "
            f"the model at opset {kind.qdq_opset - 1} or later and quantise it again."
        )
    for node in model.graph.node:
        if opset < _CHANGED.get(node.op_type, 0) <= needed and node.domain in ("", "ai.onnx"):
            raise UserError(
                f"{kind.label} needs opset {needed}, but {node.op_type} ({node.name}) of opset {opset} means something "
                f"else there. Export the model at opset {needed}."
            )
    return needed, [f"opset {opset} became {needed}, the first {what}."]


def _rename_modes(model: ir.Model, before: int, after: int) -> None:
    """Write the modes of GridSample as the new opset names them."""
    if not before < 20 <= after:
        return
    for node in model.graph.all_nodes():
        mode = node.attributes.get("mode") if node.op_type == "GridSample" else None
        if mode is not None and mode.value in _GRID_MODES:
            node.attributes["mode"] = ir.AttrString("mode", _GRID_MODES[mode.value])


def _set_opset(model: onnx.ModelProto, opset: int) -> None:
    """Write the opset into model and functions, and give plugin functions their FP32 island.

    Raising 18 to 22 is exact by number alone: every operator that changed there only gained types or attributes whose
    defaults mean what they meant before, but for `_CHANGED` and GridSample.
    """
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = opset
    for function in model.functions:
        if function.domain == DOMAIN:
            spec = spec_of(function.name, len(function.input))
            function.CopyFrom(local_function(spec, opset, fp32_island=True))


class _Conversion:
    """Carries a plan out on one graph; every tensor is converted or cast once."""

    def __init__(self, model: ir.Model, plan: Fp16Plan, opset: int, kind: ReducedType, *, keep_io: bool) -> None:
        self.graph = model.graph
        self.plan = plan
        self.opset = opset
        self.kind, self.half = kind, kind.dtype
        self.suffix = {_FLOAT: "fp32", kind.dtype: kind.suffix}
        self.io = _FLOAT if keep_io else kind.dtype
        self.outputs = [value for value in self.graph.outputs if is_float(value)]
        self.taken = {str(value.name) for node in self.graph.all_nodes() for value in node.outputs}
        self.taken |= {str(value.name) for value in (*self.graph.inputs, *self.graph.initializers.values())}
        self.taken |= {str(node.name) for node in self.graph.all_nodes()}
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.vanished: dict[str, int] = {}

    def run(self) -> list[str]:
        """Convert the graph in place and return the notes."""
        edges = [
            (node, index, value, self._wanted(node, index))
            for node in self.graph.all_nodes()
            for index, value in enumerate(node.inputs)
            if value is not None and is_float(value) and node.op_type not in TYPELESS_OPS
        ]
        produced = {value: self._given(value) for _, _, value, _ in edges} | {
            value: self._given(value) for value in self.outputs
        }
        _round_scales(edges, self.kind)
        for node in [node for node in self.graph if self._is_half(node)]:
            self._convert_node(node)
        if self.io == self.half:
            for value in self.graph.inputs:
                if is_float(value):
                    value.type = ir.TensorType(self.half)
        self._convert_initializers(edges)
        for value in dict.fromkeys(self.outputs):
            if produced[value] != self.io:
                self._cast_output(value)
        for node, index, value, wanted in edges:
            if not _is_constant(value) and produced[value] != wanted:
                node.replace_input_with(index, self._cast(value, wanted, node))
        if not self.vanished:
            return []
        worst = max(self.vanished, key=lambda name: self.vanished[name])
        total, count = sum(self.vanished.values()), len(self.vanished)
        return [f"{total} small numbers in {count} constants become 0 in {self.kind.label}, most of them in {worst}."]

    def _is_half(self, node: ir.Node) -> bool:
        return node.graph is self.graph and node not in self.plan.reasons

    def _wanted(self, node: ir.Node, index: int) -> ir.DataType:
        return self.half if self._is_half(node) and self._allows(node, index, output=False) else _FLOAT

    def _given(self, value: ir.Value) -> ir.DataType:
        """Return the type a value will have by itself."""
        producer = value.producer()
        if producer is None:
            return self.io if value.is_graph_input() else _FLOAT
        half = self._is_half(producer) and self._allows(producer, value.index() or 0, output=True)
        return self.half if half else _FLOAT

    def _allows(self, node: ir.Node, index: int, *, output: bool) -> bool:
        return allows_half(node, index, self.opset, output=output, kind=self.kind)

    def _convert_node(self, node: ir.Node) -> None:
        """Set the types of a reduced node's results, and the attributes that name a type."""
        for index, value in enumerate(node.outputs):
            if is_float(value) and self._allows(node, index, output=True):
                value.type = ir.TensorType(self.half)
        for name in ("to", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value == _FLOAT:
                node.attributes[name] = ir.AttrInt64(name, self.half)

    def _convert_initializers(self, edges: list[tuple[ir.Node, int, ir.Value, ir.DataType]]) -> None:
        """Store constants in the types that are wanted: in place for one type, a copy beside it for two."""
        wanted: dict[ir.Value, list[tuple[ir.Node, int, ir.DataType]]] = {}
        for node, index, value, kind in edges:
            if _is_constant(value):
                wanted.setdefault(value, []).append((node, index, kind))
        for value, uses in wanted.items():
            kinds = {kind for _, _, kind in uses} | ({_FLOAT} if value.is_graph_output() else set())
            if self.half not in kinds:
                continue
            array = constant_array(value)
            assert array is not None
            if lost := vanishing_count(array, self.kind):
                self.vanished[f"{value.name} ({lost} of {array.size})"] = lost
            target = value if kinds == {self.half} else self._beside(value, self.half)
            target.const_value = ir.tensor(self.kind.rounded(array), name=target.name)
            target.type = ir.TensorType(self.half)
            if target is not value:
                self.graph.register_initializer(target)
                for node, index, kind in uses:
                    if kind == self.half:
                        node.replace_input_with(index, target)

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        """Return `value` in another type, through one Cast behind its producer that all readers share."""
        if (value, kind) in self.made:
            return self.made[value, kind]
        target = self.made[value, kind] = self._beside(value, kind)
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and kind == _FLOAT:
            node = self._dequantise_again(producer, target)  # a Cast here would part the Q/DQ from its operator
        else:
            node = self._cast_node(value, target, kind, producer or reader)
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return target

    def _cast_output(self, value: ir.Value) -> None:
        """Give a graph output its type back: the inner tensor gets a new name, the Cast's result has the old one."""
        name, producer = value.name, value.producer()
        if producer is None:
            raise UserError(f"the graph output {name} is a graph input or a constant. Remove it from the outputs.")
        outer = self.made[value, self.io] = self._beside(value, self.io)
        cast = self._cast_node(value, outer, self.io, producer)
        inner = _FLOAT if self.io == self.half else self.half
        value.name, outer.name = claim_name(f"{name}_{self.suffix[inner]}", self.taken), name
        outer.metadata_props.update(value.metadata_props)
        self.graph.insert_after(producer, cast)
        self.graph.outputs[:] = [outer if output is value else output for output in self.graph.outputs]

    def _cast_node(self, value: ir.Value, target: ir.Value, kind: ir.DataType, origin: ir.Node) -> ir.Node:
        name = claim_name(f"cast_{value.name}_{self.suffix[kind]}", self.taken)
        attributes = [ir.AttrInt64("to", kind)]
        metadata = dict(origin.metadata_props)
        return ir.Node("", "Cast", [value], attributes, outputs=[target], name=name, metadata_props=metadata)

    def _dequantise_again(self, node: ir.Node, target: ir.Value) -> ir.Node:
        """Return a copy of a DequantizeLinear whose scale, and so whose result, is FP32."""
        scale = node.inputs[1]
        array = constant_array(scale)
        assert scale is not None
        assert array is not None
        wide = self._beside(scale, _FLOAT)
        wide.const_value = ir.tensor(array.astype(np.float32), name=wide.name)
        self.graph.register_initializer(wide)
        name = claim_name(f"{node.name}_fp32", self.taken)
        inputs = [node.inputs[0], wide, *node.inputs[2:]]
        attributes = [attr for attr in node.attributes.values() if attr.name != "output_dtype"]
        metadata = dict(node.metadata_props)
        return ir.Node("", node.op_type, inputs, attributes, outputs=[target], name=name, metadata_props=metadata)

    def _beside(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """Return a new value of another type, with the shape of `value` and a name derived from its name."""
        name = claim_name(f"{value.name}_{self.suffix[kind]}", self.taken)
        return ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind))


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _round_scales(edges: list[tuple[ir.Node, int, ir.Value, ir.DataType]], reduced: ReducedType) -> None:
    """Round a scale that quantisers of both types share to the reduced one, so that Q and DQ use the same number."""
    uses: dict[ir.Value, set[tuple[str, int, ir.DataType]]] = {}
    for node, index, value, kind in edges:
        if _is_constant(value):
            uses.setdefault(value, set()).add((node.op_type, index, kind))
    for value, places in uses.items():
        only_scales = all(op in ("QuantizeLinear", "DequantizeLinear") and index == 1 for op, index, _ in places)
        array = constant_array(value)
        if only_scales and array is not None and {kind for _, _, kind in places} == {_FLOAT, reduced.dtype}:
            value.const_value = ir.tensor(reduced.rounded(array).astype(np.float32), name=value.name)
