"""Finds attention cores by structure, starting from each softmax."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from edgeattn.export.graph import constant_value
from edgeattn.export.rewrite.candidates import Candidate, Factor, Feed, Mismatch, Result
from edgeattn.export.rewrite.trace import Product, Source, Tracer
from edgeattn.plugins_trt import (
    CO_ATTENTION_ONE_WAY,
    CO_ATTENTION_ONE_WAY_GATED,
    CRISS_CROSS_ATTENTION,
)

_PARTS = {"Slice", "Split", "SplitToSequence", "SequenceAt"}
_ENERGY_STEPS = {"Add", "Sub", "Mul", "Div", "Where", "Concat", "Slice", "Max", "Min", "Clip"}


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


@dataclass
class Findings:
    """What the structure of a graph suggests.

    Attributes:
        criss_cross: candidates for criss-cross attention.
        one_way: candidates for one direction of co-attention, with the product they share.
        refused: softmax nodes of almost-cores with the reason.
    """

    criss_cross: list[Candidate]
    one_way: list[tuple[str, Candidate]]
    refused: list[tuple[gs.Node, str, str]]


def find(tracer: Tracer) -> Findings:
    """Look at every softmax of the graph and sort out what may be a core, what almost is one, and what is not."""
    findings = Findings([], [], [])
    lines: dict[frozenset[str], list[tuple[gs.Node, str]]] = defaultdict(list)
    for softmax in [node for node in tracer.graph.nodes if node.op == "Softmax" and not node.domain]:
        energies = energies_of(tracer, softmax)
        if not energies:
            continue
        directions = [_direction(energy) for energy in energies]
        group = " and ".join(sorted(energies[0].maps))
        try:
            if len(energies) > 1 and all(directions):
                findings.criss_cross.append(_criss_cross(tracer, softmax, energies, directions))
            elif directions == ["all"]:
                candidate = _one_way(tracer, softmax, energies[0])
                if candidate is not None:
                    findings.one_way.append((group, candidate))
            elif len(energies) == 1 and directions[0]:
                lines[energies[0].maps].append((softmax, directions[0]))
        except Mismatch as mismatch:
            findings.refused.append((softmax, group, str(mismatch)))
    for members in lines.values():
        if {direction for _, direction in members} == {"column", "row"}:
            findings.refused.append(
                (
                    members[0][0],
                    "",
                    "columns and rows have a softmax each, but criss-cross attention has one softmax over both",
                )
            )
    return findings


def _direction(energy: Energy) -> str:
    left, right = (source.direction for source in energy.sources)
    return left if left == right else ""


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


def _adder(tracer: Tracer, trail: Trail) -> gs.Node | None:
    """Return the Add that alone reads the end of a trail."""
    readers = tracer.readers(trail.end)
    if len(readers) == 1 and trail.end.name not in tracer.outputs and readers[0].op == "Add":
        return readers[0]
    return None


def _criss_cross(
    tracer: Tracer, softmax: gs.Node, energies: Sequence[Energy], directions: Sequence[str]
) -> Candidate:
    """Read two joined line energies as criss-cross attention.

    Raises:
        Mismatch: it is almost, but not quite.
    """
    if sorted(directions) != ["column", "row"]:
        listed = ", ".join(direction if direction != "all" else "all positions" for direction in directions)
        raise Mismatch(f"the softmax joins energies along {listed}; criss-cross attention has one column and one row")
    column, row = (energies[directions.index(direction)] for direction in ("column", "row"))
    if column.maps != row.maps:
        only = [sorted(energy.maps - other.maps) for energy, other in ((column, row), (row, column))]
        raise Mismatch(
            f"the branches compare different maps: {_names(only[0] or column.maps)} in the columns, "
            f"{_names(only[1] or row.maps)} in the rows"
        )
    if not np.isclose(column.scale, row.scale, rtol=1e-6):
        raise Mismatch(
            f"the energies are scaled differently: by {column.scale:.6g} in the columns, by {row.scale:.6g} in the rows"
        )
    uses = uses_of(tracer, softmax)
    by_direction = {use.values.direction: use for use in uses}
    if len(uses) != 2 or by_direction.keys() != {"column", "row"}:
        listed = " and ".join(use.values.direction or "other axes" for use in uses) or "nothing"
        raise Mismatch(f"the attention weighs values along {listed}; criss-cross attention sums one column and one row")
    values = [by_direction[direction].values for direction in ("column", "row")]
    if values[0].tensor is not values[1].tensor:
        raise Mismatch(
            f"the branches weigh different values: {values[0].tensor.name!r} in the columns, "
            f"{values[1].tensor.name!r} in the rows"
        )
    trail, residual = _merge(tracer, [use.product.node.outputs[0] for use in uses])
    query, key = column.sources
    feeds = (
        Feed(query, scale=column.scale),
        Feed(key),
        Feed(values[0], factors=trail.factors),
    )
    result, residual = _with_residual(tracer, trail, feeds[2].shape, residual)
    return Candidate(
        spec=CRISS_CROSS_ATTENTION,
        feeds=feeds,
        results=(Result(result),),
        core=(*(energy.product.node for energy in energies), softmax, *(use.product.node for use in uses), result.inputs[0]),
        attention={direction: use.attention for direction, use in by_direction.items()},
        residual=residual,
        notes=_softmax_notes(tracer, softmax, energies),
    )


def _names(names: Sequence[str] | frozenset[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _softmax_notes(tracer: Tracer, softmax: gs.Node, energies: Sequence[Energy]) -> tuple[str, ...]:
    """Say so when the softmax runs over another axis than the energies were joined along."""
    rank = len(tracer.sizes.shapes.get(softmax.inputs[0].name, ()))
    axis = int(softmax.attrs.get("axis", -1)) % max(rank, 1)
    joined = energies[0].joined
    if len(joined) == 1 and axis not in joined and softmax.inputs[0].inputs[0].op == "Concat":
        return (f"the softmax runs over axis {axis}, but column and row energies are joined along axis {min(joined)}",)
    return ()


def _merge(tracer: Tracer, results: Sequence[gs.Tensor]) -> tuple[Trail, gs.Tensor | None]:
    """Follow two branch results to the Add that joins them, and on from there.

    A graph may add the residual to one branch before the branches meet; it is then returned as well.

    Raises:
        Mismatch: the branches are not added, or carry different factors.
    """
    trails = [follow(tracer, result) for result in results]
    adders = [_adder(tracer, trail) for trail in trails]
    residual = None
    for index in (0, 1):
        adder, other = adders[index], adders[1 - index]
        if adder is None or other is None or adder is other:
            continue
        later = follow(tracer, adder.outputs[0])
        if _adder(tracer, later) is other and not later.factors:
            residual = next(item for item in adder.inputs if item is not trails[index].end)
            trails[index], adders[index] = Trail((*trails[index].tensors, *later.tensors), trails[index].factors), other
            break
    if adders[0] is None or adders[0] is not adders[1]:
        raise Mismatch("the results of column and row branch are not added to each other")
    names = [[(factor.operator, factor.tensor.name) for factor in trail.factors] for trail in trails]
    if names[0] != names[1]:
        raise Mismatch("the results of column and row branch are multiplied by different factors before they are added")
    merged = follow(tracer, adders[0].outputs[0])
    if residual is not None and merged.factors:
        raise Mismatch("the residual is added before a factor is applied, so the factor would scale it as well")
    return Trail(merged.tensors, (*trails[0].factors, *merged.factors)), residual


def _with_residual(
    tracer: Tracer, trail: Trail, shape: tuple[int, ...], residual: gs.Tensor | None
) -> tuple[gs.Tensor, gs.Tensor | None]:
    """Return the tensor that the plugin yields, and the residual that the graph adds to it, if it does.

    Raises:
        Mismatch: no tensor of the trail has the layout of the values.
    """
    whole = [tensor for tensor in trail.tensors if tracer.sizes.shapes.get(tensor.name) == shape]
    if not whole or (trail.factors and whole[-1] is not trail.end and _factors_after(tracer, whole[-1])):
        raise Mismatch(f"the result never has the layout (batch, channels, height, width) = {shape} of the values")
    adder = _adder(tracer, trail)
    if residual is None and adder is not None and whole[-1] is trail.end:
        other = next((item for item in adder.inputs if item is not trail.end), None)
        if other is not None and tracer.sizes.shapes.get(other.name) == shape:
            return adder.outputs[0], other
    return whole[-1], residual


def _factors_after(tracer: Tracer, tensor: gs.Tensor) -> bool:
    return bool(follow(tracer, tensor).factors)


def _one_way(tracer: Tracer, softmax: gs.Node, energy: Energy) -> Candidate | None:
    """Read one energy between all positions of two maps as one direction of co-attention.

    Returns:
        The candidate, with either operand as query, or None for attention over tokens that never were a map.

    Raises:
        Mismatch: attention within one map, or a result that is used in a way that the operation does not cover.
    """
    feeds = [_map_feed(tracer, source) for source in energy.sources]
    if all(len(source.shape) == 3 for source in energy.sources) and None in feeds:
        return None
    uses = uses_of(tracer, softmax)
    if len(uses) != 1 or uses[0].values.direction != "all":
        raise Mismatch("the attention between two maps has to weigh the values of all positions exactly once")
    values = _map_feed(tracer, uses[0].values)
    left, right = feeds
    if left is None or right is None or values is None:
        raise Mismatch("height and width of the attended maps cannot be told from their flattened positions")
    shared = tracer.origins(left.source.tensor) & tracer.origins(right.source.tensor)
    if shared:
        raise Mismatch(
            f"query and key come from one map ({sorted(shared)[0]!r}): this is self-attention between all positions "
            "(non-local, PAM), and co-attention compares two maps"
        )
    trail = follow(tracer, uses[0].product.node.outputs[0])
    values = replace(values, factors=trail.factors)
    left = replace(left, scale=energy.scale)
    result = _map_result(tracer, trail, (left, right), values)
    core = (energy.product.node, softmax, uses[0].product.node, result.tensor.inputs[0])
    return Candidate(CO_ATTENTION_ONE_WAY, (left, right, values), (result,), core)


def _map_feed(tracer: Tracer, source: Source) -> Feed | None:
    """Complete a flattened source by a map that tells its height and width."""
    if len(source.shape) == 4:
        return Feed(source)
    reference = tracer.spatial_reference(source.tensor, source.positions[0])
    return Feed(source, reference) if reference is not None else None


def _map_result(tracer: Tracer, trail: Trail, queries: Sequence[Feed], values: Feed) -> Result:
    """Find the tensor of a trail that the operation yields: a map, or its flattened form.

    Raises:
        Mismatch: the result has neither form.
    """
    batch, channels = values.shape[:2]
    maps = [(batch, channels, *query.shape[2:]) for query in queries]
    flats = [(batch, channels, int(np.prod(shape[2:]))) for shape in maps]
    for wanted in (maps, flats):
        for tensor in reversed(trail.tensors):
            if tracer.sizes.shapes.get(tensor.name) in wanted and not _factors_after(tracer, tensor):
                return Result(tensor, flat=wanted is flats)
    raise Mismatch(f"the result never has the layout (batch, channels, height, width) = {maps[0]} of the query's map")


def with_gate(tracer: Tracer, candidate: Candidate) -> Candidate | None:
    """Extend a one-way candidate by the gate that follows it: result times sigmoid of its projection to one channel."""
    result = candidate.results[0]
    tensor = result.tensor
    channels = candidate.feeds[2].shape[1]
    readers = tracer.readers(tensor)
    projections = [node for node in readers if node.op in ("Conv", "MatMul") and not node.domain]
    if len(readers) != 2 or len(projections) != 1 or tensor.name in tracer.outputs:
        return None
    weight, bias, logit = _gate_parameters(tracer, projections[0], tensor)
    if weight is None or weight.size != channels or len(logit.outputs) != 1 or logit.outputs[0].op != "Sigmoid":
        return None
    trail = follow(tracer, logit.outputs[0].outputs[0])
    readers = trail.end.outputs
    if trail.factors or len(readers) != 1 or readers[0].op != "Mul" or tensor not in list(readers[0].inputs):
        return None
    gated = follow(tracer, readers[0].outputs[0])
    if gated.factors:
        gated = Trail(gated.tensors[:1], ())
    try:
        final = _map_result(tracer, gated, candidate.feeds[:2], candidate.feeds[2])
    except Mismatch:
        return None
    return replace(
        candidate,
        spec=CO_ATTENTION_ONE_WAY_GATED,
        results=(final,),
        core=(*candidate.core, final.tensor.inputs[0]),
        gate=(weight.reshape(1, channels), np.zeros(1, weight.dtype) if bias is None else bias.reshape(1)),
    )


def _gate_parameters(
    tracer: Tracer, node: gs.Node, tensor: gs.Tensor
) -> tuple[np.ndarray | None, np.ndarray | None, gs.Tensor]:
    """Return weight, bias and result of a projection to one channel; a weight of None when it is something else."""
    logit = node.outputs[0]
    if node.op == "Conv":
        given = [constant_value(item) for item in node.inputs[1:] if item.name]
        if given and given[0] is not None and given[0].shape[2:] == (1, 1) and given[0].shape[0] == 1:
            return given[0], (given[1] if len(given) > 1 else None), logit
        return None, None, logit
    weight = constant_value(node.inputs[0]) if node.inputs[1] is tensor else None
    bias = None
    if weight is not None and len(logit.outputs) == 1 and logit.outputs[0].op == "Add":
        adder = logit.outputs[0]
        other = next((item for item in adder.inputs if item is not logit), logit)
        bias = constant_value(other)
        if bias is None or bias.size != 1:
            return None, None, logit
        logit = adder.outputs[0]
    return weight, bias, logit
