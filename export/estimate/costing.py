"""Layers to figures: operations, traffic, precision, time, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import TensorProto

from edgeattn.export.estimate.fusion import FusedGraph, Layer, cost_declaration
from edgeattn.export.estimate.hardware import seconds
from edgeattn.export.estimate.liveness import ActivationMemory, activation_memory
from edgeattn.export.estimate.operators import LEAST_CHANNELS, Call
from edgeattn.export.estimate.result import Band, LayerEstimate, Roof, total
from edgeattn.export.estimate.sized_graph import Node, element_bytes
from edgeattn.plugins_trt import DOMAIN, spec_of
from edgeattn.plugins_trt.variants import Cost, cost_of

_PRECISIONS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.DOUBLE: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}
_ELEMENTS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Machine:
    """The target as far as costs depend on it.

    Attributes:
        roof: its peaks.
        sm: CUDA architecture, which decides the tiling of plugins.
    """

    roof: Roof
    sm: int


@dataclass(frozen=True)
class Supposition:
    """Element types that a graph is supposed to have in place of its own.

    Attributes:
        elements: element type by element type of the graph, such as FP16 in place of FP32.
        buffers: element type by buffer, which goes before `elements`.
        int8: names of the nodes whose product is supposed to be INT8.
    """

    elements: Mapping[int, int] = field(default_factory=dict)
    buffers: Mapping[str, int] = field(default_factory=dict)
    int8: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Costs:
    """Figures of a whole graph.

    Attributes:
        layers: figures of each layer.
        memory: what the activations take.
        weight_bytes: all weights, each once.
    """

    layers: tuple[LayerEstimate, ...]
    memory: ActivationMemory
    weight_bytes: int

    @property
    def seconds(self) -> Band:
        """Time of all layers, one after another."""
        return total(layer.seconds for layer in self.layers)

    @property
    def peak_activation_bytes(self) -> int:
        """Arena and outputs."""
        return self.memory.arena_bytes + self.memory.output_bytes

    @property
    def bytes_moved(self) -> int:
        """Traffic of all layers."""
        return sum(layer.bytes_moved for layer in self.layers)


def costs_of(fused: FusedGraph, machine: Machine, supposition: Supposition | None = None) -> Costs:
    """Return the figures of a fused graph.

    Args:
        fused: the layers.
        machine: the target.
        supposition: other element types than the graph's own.

    Raises:
        UserError: a plugin has no kernel for a data type.
    """
    costing = _Costing(fused, machine, supposition or Supposition())
    priced = [costing.layer(layer) for layer in fused.layers]
    memory = activation_memory(fused, costing.bytes_of, [workspace for _, workspace in priced])
    weights = {name for layer in fused.layers for name in layer.reads if name in fused.graph.constants}
    return Costs(tuple(entry for entry, _ in priced), memory, sum(costing.bytes_of(name) for name in weights))


@dataclass(frozen=True)
class _Costing:
    fused: FusedGraph
    machine: Machine
    supposition: Supposition

    def element(self, name: str) -> int:
        """Return the element type of a buffer."""
        own = self.fused.graph.tensors[name].element
        return self.supposition.buffers.get(name, self.supposition.elements.get(own, own))

    def bytes_of(self, name: str) -> int:
        """Return the size of a buffer; nothing for a constant of unknown size."""
        tensor = self.fused.graph.tensors.get(name)
        return 0 if tensor is None else int(tensor.count * element_bytes(self.element(name)))

    def layer(self, layer: Layer) -> tuple[LayerEstimate, int]:
        """Return the figures of a layer, and its workspace."""
        head = layer.head
        precision = self._precision(layer)
        if head.domain == DOMAIN:
            return self._plugin(layer, precision)
        calls = [(cost_declaration(node), self._call(node)) for node in layer.nodes]
        macs = sum(declaration.macs(call) for declaration, call in calls if declaration.macs)
        others = sum(declaration.flops(call) for declaration, call in calls if declaration.flops)
        moved = sum(self._read(layer, name) for name in layer.reads) + sum(map(self.bytes_of, layer.writes))
        weights = sum(self.bytes_of(name) for name in layer.reads if name in self.fused.graph.constants)
        declaration, call = next(pair for pair, node in zip(calls, layer.nodes, strict=True) if node is head)
        narrow = declaration.per_group is not None and declaration.per_group(call) < LEAST_CHANNELS
        roof = self.machine.roof
        rate = roof.tensor[precision] if macs and not narrow else roof.vector
        band, bound = seconds(declaration.kind, 2 * macs or others, rate, moved, roof.bandwidth)
        return self._estimate(
            layer, declaration.kind, precision, macs, 2 * macs + int(others), moved, weights, band, bound
        ), 0

    def _read(self, layer: Layer, name: str) -> int:
        """Return what a layer reads of a buffer: all of it, or no more than it writes."""
        size = self.bytes_of(name)
        head = layer.head
        if cost_declaration(head).sparse_reads and name == self.fused.buffers.get(head.inputs[0], head.inputs[0]):
            return min(size, sum(map(self.bytes_of, layer.writes)))
        return size

    def _call(self, node: Node) -> Call:
        tensors = self.fused.graph.tensors
        return Call(
            node.op_type,
            [tensors[name].shape if name in tensors else None for name in node.inputs],
            [tensors[name].shape for name in node.outputs if name],
            node.attributes,
        )

    def _precision(self, layer: Layer) -> str:
        """Return what a layer computes in: for a product, the type of its activation; else that of its result."""
        head = layer.head
        if head.name in self.supposition.int8:
            return "int8"
        names = layer.head.inputs if layer.product is not None else (*layer.reads, *layer.writes)
        buffers = [self.fused.buffers.get(name, name) for name in names if name]
        found = [self.element(name) for name in buffers if name in self.fused.graph.tensors]
        known = [_PRECISIONS[element] for element in found if element in _PRECISIONS]
        if layer.product is None:  # what quantises reads or writes INT8, but computes in floating point
            known.sort(key="int8".__eq__)
        return known[0] if known else "fp32"

    def _plugin(self, layer: Layer, precision: str) -> tuple[LayerEstimate, int]:
        node = layer.head
        spec = spec_of(node.op_type, len(node.inputs))
        tensors = self.fused.graph.tensors
        shapes = {tensor.name: tensors[name].shape for tensor, name in zip(spec.inputs, node.inputs, strict=True)}
        cost: Cost = cost_of(spec, _ELEMENTS[precision], self.machine.sm, spec.sizes_of(shapes))
        moved = plugin_traffic(cost)
        weights = sum(self.bytes_of(name) for name in layer.reads if name in self.fused.graph.constants)
        roof = self.machine.roof
        band, bound = seconds("plugin", cost.flops, roof.tensor[precision], moved, roof.bandwidth)
        estimate = self._estimate(layer, "plugin", precision, cost.flops // 2, cost.flops, moved, weights, band, bound)
        return estimate, cost.workspace_bytes

    def _estimate(
        self,
        layer: Layer,
        kind: str,
        precision: str,
        macs: int,
        flops: int,
        moved: int,
        weights: int,
        band: Band,
        bound: str,
    ) -> LayerEstimate:
        module = layer.head.module or next((node.module for node in layer.nodes if node.module), "")
        names = tuple(node.name for node in layer.nodes)
        return LayerEstimate(names, module, kind, precision, macs, flops, moved, weights, band, bound)


def plugin_traffic(cost: Cost) -> int:
    """Return what a plugin moves: inputs and outputs once, and its workspaces written and read once."""
    return cost.bytes + 2 * cost.workspace_bytes


def suppose_half() -> Supposition:
    """Return the supposition that everything in FP32 is in FP16."""
    return Supposition({TensorProto.FLOAT: TensorProto.FLOAT16, TensorProto.DOUBLE: TensorProto.FLOAT16})


def suppose_int8(fused: FusedGraph) -> Supposition:
    """Return the supposition that layers with weights are in INT8, and the rest in FP16.

    A result is stored in INT8 where only such layers read it, be it as activation or as the other side of a residual
    addition, and at least one as activation.
    """
    constants = fused.graph.constants
    int8: set[str] = set()
    stored: dict[str, int] = {}
    activations: set[str] = set()
    elsewhere: set[str] = set()
    for layer in fused.layers:
        product = layer.product
        weights = product is not None and any(name in constants for name in _operands(fused, product))
        if product is None or not weights:
            elsewhere.update(layer.reads)
            continue
        int8.add(product.name)
        operands = _operands(fused, product)
        activations.update(name for name in operands if name not in constants)
        stored.update({name: TensorProto.INT8 for name in operands if name in constants})
    outputs = {fused.buffers.get(name, name) for name in fused.graph.outputs}
    kept = activations - elsewhere - outputs - set(fused.graph.inputs)
    stored.update(dict.fromkeys(kept, TensorProto.INT8))
    return Supposition(suppose_half().elements, stored, frozenset(int8))


def _operands(fused: FusedGraph, product: Node) -> list[str]:
    """Return the buffers that a product multiplies."""
    return [fused.buffers.get(name, name) for name in product.inputs[:2]]
