"""Which nodes become one layer, after the rules in `assumptions.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeattn.export.estimate.operators import COSTS, UNKNOWN, OperatorCost, Role
from edgeattn.export.estimate.sized_graph import Node, SizedGraph
from edgeattn.plugins_trt import DOMAIN

PLUGIN = OperatorCost("plugin", Role.ALONE)
"""A plugin node; what it costs is in its `PluginSpec`."""


def cost_declaration(node: Node) -> OperatorCost:
    """Return the declaration of a node's operator."""
    if node.domain == DOMAIN:
        return PLUGIN
    return UNKNOWN if node.domain else COSTS.get(node.op_type, UNKNOWN)


@dataclass(frozen=True)
class Layer:
    """Nodes that run as one.

    Attributes:
        nodes: the nodes, in order.
        product: its convolution or matrix product, if it has one.
        reads: names of the buffers and constants it reads, each once.
        in_place: those among them that are read element by element, which the result may replace.
        writes: names of the buffers it writes.
    """

    nodes: tuple[Node, ...]
    product: Node | None
    reads: tuple[str, ...]
    in_place: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def head(self) -> Node:
        """The node that decides kind and module."""
        return self.product or self.nodes[-1]


@dataclass(frozen=True)
class FusedGraph:
    """Layers in execution order.

    Attributes:
        graph: the graph.
        layers: its layers.
        buffers: for every tensor, the name of the tensor whose memory holds it.
    """

    graph: SizedGraph
    layers: tuple[Layer, ...]
    buffers: Mapping[str, str]


def fuse(graph: SizedGraph) -> FusedGraph:
    """Put the nodes of a graph together into layers."""
    return _Fusion(graph).fused()


class _Fusion:
    """The state of one run: who makes and who reads every buffer."""

    def __init__(self, graph: SizedGraph) -> None:
        self.graph = graph
        self.buffers = dict(graph.stored_as)
        read_by: dict[str, set[str]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                read_by.setdefault(name, set()).add(cost_declaration(node).kind)
        products = {name for name, kinds in read_by.items() if kinds == {"matrix product"}}
        self.nodes = [node for node in graph.nodes if not self._is_view(node, products)]
        self.makers = {name: index for index, node in enumerate(self.nodes) for name in node.outputs if name}
        self.readers: dict[str, set[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.inputs:
                if name:
                    self.readers.setdefault(self.buffer(name), set()).add(index)
        self.outputs = {self.buffer(name) for name in graph.outputs}

    def buffer(self, name: str) -> str:
        """Return the tensor whose memory holds a tensor."""
        return self.buffers.get(name, name)

    def _is_view(self, node: Node, products: set[str]) -> bool:
        """Tell whether a node only renames memory, and note it."""
        role = cost_declaration(node).role
        free = role is Role.VIEW
        if role is Role.SWAP:
            free = self._moves_nothing(node) or (self._swaps_last_axes(node) and node.outputs[0] in products)
        if node.op_type == "DequantizeLinear" and node.outputs[0] not in self.graph.outputs:
            free = True
        if node.op_type in ("Cast", "CastLike"):
            tensors = self.graph.tensors
            free = tensors[node.inputs[0]].element == tensors[node.outputs[0]].element
        if free:
            source = self.buffer(node.inputs[0])
            for name in node.outputs:
                if name:
                    self.buffers[name] = source
        return free

    def _permutation(self, node: Node) -> list[int]:
        rank = len(self.graph.tensors[node.inputs[0]].shape)
        return list(node.attributes.get("perm", range(rank - 1, -1, -1)))

    def _moves_nothing(self, node: Node) -> bool:
        shape = self.graph.tensors[node.inputs[0]].shape
        order = [axis for axis in self._permutation(node) if shape[axis] != 1]
        return order == sorted(order)

    def _swaps_last_axes(self, node: Node) -> bool:
        order = self._permutation(node)
        rank = len(order)
        return rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]

    def fused(self) -> FusedGraph:
        """Gather layers from the back, so that a node joins the last layer that may take it."""
        taken: set[int] = set()
        layers: list[tuple[int, Layer]] = []
        for index in reversed(range(len(self.nodes))):
            if index in taken:
                continue
            members, product = self._gather(index, taken)
            taken |= members
            layers.append((index, self._layer(sorted(members), product)))
        # A layer has one result, made by its last node, so the order of last nodes is one in which layers can run.
        layers.reverse()
        return FusedGraph(self.graph, tuple(layer for _, layer in layers), dict(self.buffers))

    def _gather(self, last: int, taken: set[int]) -> tuple[set[int], int | None]:
        """Return the nodes of the layer that ends in a node, and its product."""
        role = cost_declaration(self.nodes[last]).role
        members, product = {last}, last if role is Role.PRODUCT else None
        if role is not Role.POINTWISE:
            return members, product
        count = self.graph.tensors[self.nodes[last].outputs[0]].count
        while True:
            makers = {
                self.makers[self.buffer(name)]
                for index in members - {product}
                for name in self.nodes[index].inputs
                if self.buffer(name) in self.makers
            }
            for maker in sorted(makers - members - taken, reverse=True):
                role = cost_declaration(self.nodes[maker]).role
                if role is Role.PRODUCT and product is not None:
                    continue
                if role in (Role.PRODUCT, Role.POINTWISE) and self._may_join(maker, members, product, count):
                    members.add(maker)
                    product = maker if role is Role.PRODUCT else product
                    break
            else:
                return members, product

    def _may_join(self, maker: int, members: set[int], product: int | None, count: int) -> bool:
        """Tell whether only the pointwise nodes of a layer read a node's result, and it has the layer's size."""
        outputs = [name for name in self.nodes[maker].outputs if name]
        return (
            len(outputs) == 1
            and outputs[0] not in self.outputs
            and self.graph.tensors[outputs[0]].count == count
            and self.readers.get(outputs[0], set()) <= members - {product}
        )

    def _layer(self, members: list[int], product: int | None) -> Layer:
        nodes = [self.nodes[index] for index in members]
        made = {name for node in nodes for name in node.outputs}
        reads: dict[str, None] = {}
        fixed: set[str] = set()
        for index, node in zip(members, nodes, strict=True):
            for name in node.inputs:
                buffer = self.buffer(name)
                if not name or buffer in made:
                    continue
                reads[buffer] = None
                if index == product or cost_declaration(node).role is not Role.POINTWISE:
                    fixed.add(buffer)
        writes = [name for name in nodes[-1].outputs if name and (name in self.outputs or self.readers.get(name))]
        in_place = tuple(name for name in reads if name not in fixed)
        return Layer(
            tuple(nodes), None if product is None else self.nodes[product], tuple(reads), in_place, tuple(writes)
        )
