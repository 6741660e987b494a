"""Walks from a softmax: back to the products it normalises, on to what is done with the result."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from edgeattn.export.rewrite.candidates import Factor, Mismatch
from edgeattn.export.rewrite.trace import Product, Source, Tracer

_PARTS = {"Slice", "Split", "SplitToSequence", "SequenceAt"}
_ENERGY_STEPS = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Where", "Concat", "Slice", "Max", "Min", "Clip"),
    *("ScatterND", "ScatterElements"),
}


@dataclass(frozen=True)
class Energy:
    """A product of query and key on its way into a softmax.

    Attributes:
        product: the product.
        sources: the maps behind its two operands.
        scale: constant factor between product and softmax.
        joined: axes along which the energies were concatenated on the way.
    """

    product: Product
    sources: tuple[Source, Source]
    scale: float
    joined: frozenset[int]

    @property
    def maps(self) -> frozenset[str]:
        """Names of the maps that are compared, in no order."""
        return frozenset(source.tensor.name for source in self.sources)

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices between the maps."""
        return [operand.matrix.tensor.name for operand in self.product.operands if operand.matrix is not None]


@dataclass(frozen=True)
class Use:
    """A product of the attention with values.

    Attributes:
        product: the product.
        attention: its attention operand.
        values: the map behind the other operand.
    """

    product: Product
    attention: gs.Tensor
    values: Source


@dataclass(frozen=True)
class Trail:
    """A result followed through layout operations and constant factors.

    Attributes:
        tensors: from the first to the last.
        factors: constant numbers applied on the way.
    """

    tensors: tuple[gs.Tensor, ...]
    factors: tuple[Factor, ...]

    @property
    def end(self) -> gs.Tensor:
        """The last tensor, which something else reads."""
        return self.tensors[-1]


def energies_of(tracer: Tracer, softmax: gs.Node) -> list[Energy]:
    """Walk back from a softmax to the products it normalises; an empty list when it normalises anything else."""
    found: list[Energy] = []
    queue: list[tuple[gs.Tensor, float, frozenset[int]]] = [(softmax.inputs[0], 1.0, frozenset())]
    while queue:
        tensor, scale, joined = queue.pop(0)
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.domain:
            return []
        data = [item for item in node.inputs if tracer.is_data(item)]
        product = tracer.product(node)
        if product is not None:
            sources = [
                tracer.source(operand, channel=operand.contracted, positions=operand.free)
                for operand in product.operands
            ]
            if sources[0] is None or sources[1] is None:
                return []
            found.append(Energy(product, (sources[0], sources[1]), scale, joined))
        elif tracer.is_layout(node) or node.op in _ENERGY_STEPS:
            if node.op in ("Mul", "Div") and len(data) == 1:
                scale *= _scale(tracer, node)
            if node.op == "Concat":
                rank = len(tracer.sizes.shapes.get(tensor.name, ()))
                joined |= {int(node.attrs["axis"]) % max(rank, 1)}
            queue.extend((item, scale, joined) for item in data)
        else:
            return []
    return found


def _scale(tracer: Tracer, node: gs.Node) -> float:
    """Return the constant factor of a Mul or Div, 1 when it is not one number."""
    known = [tracer.factor(tensor) for tensor in node.inputs]
    number = known[1] if known[1] is not None else (known[0] if node.op == "Mul" else None)
    if number is None or (node.op == "Div" and number == 0):
        return 1.0
    return 1.0 / number if node.op == "Div" else number


def uses_of(tracer: Tracer, softmax: gs.Node) -> list[Use]:
    """Walk on from a softmax to the products of its result with values.

    Raises:
        Mismatch: something else reads the attention as well, so it has to be computed anyway.
    """
    found: list[Use] = []
    queue = [softmax.outputs[0]]
    while queue:
        tensor = queue.pop(0)
        if tensor.name in tracer.outputs:
            raise Mismatch(f"the attention map {tensor.name!r} is an output of the model, and a plugin never stores it")
        for node in tracer.readers(tensor):
            product = tracer.product(node)
            if product is not None:
                found.append(_use(tracer, product, tensor))
            elif not node.domain and (tracer.is_layout(node) or node.op in _PARTS):
                queue.extend(output for output in node.outputs if output.name)
            else:
                raise Mismatch(
                    f"the attention map is also read by node {node.name!r} ({node.op}), and a plugin never stores it"
                )
    return found


def _use(tracer: Tracer, product: Product, attention: gs.Tensor) -> Use:
    side = 0 if product.operands[1].tensor is attention else 1
    operand = product.operands[side]
    values = tracer.source(operand, channel=operand.free, positions=operand.contracted)
    if values is None:
        raise Mismatch(
            f"the attention is multiplied with {operand.tensor.name!r}, in which channels and positions do not separate"
        )
    return Use(product, attention, values)


def follow(tracer: Tracer, tensor: gs.Tensor) -> Trail:
    """Follow a result through layout operations and constant factors, as long as nothing else reads it."""
    tensors, factors = [tensor], []
    while len(readers := tracer.readers(tensors[-1])) == 1 and tensors[-1].name not in tracer.outputs:
        node = readers[0]
        others = [item for item in node.inputs if item is not tensors[-1]]
        if node.op in ("Mul", "Div") and not node.domain and len(others) == 1 and tracer.is_scalar(others[0]):
            if node.op == "Div" and node.inputs[0] is others[0]:
                break
            factors.append(Factor(node.op, others[0]))
        elif not tracer.is_layout(node) or node.inputs[0] is not tensors[-1]:
            break
        tensors.append(node.outputs[0])
    return Trail(tuple(tensors), tuple(factors))


def adder_of(tracer: Tracer, trail: Trail) -> gs.Node | None:
    """Return the Add that alone reads the end of a trail."""
    readers = tracer.readers(trail.end)
    if len(readers) == 1 and trail.end.name not in tracer.outputs and readers[0].op == "Add":
        return readers[0]
    return None
