"""Reads a softmax over all positions of another map as co-attention, in one direction or both, with gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from edgeattn.export.graph import constant_value
from edgeattn.export.rewrite.candidates import Candidate, Feed, Mismatch, Result
from edgeattn.export.rewrite.trace import Source, Tracer
from edgeattn.export.rewrite.walks import Energy, Trail, follow, uses_of
from edgeattn.plugins_trt import CO_ATTENTION_ONE_WAY, CO_ATTENTION_ONE_WAY_GATED, PluginSpec


def read_one_way(tracer: Tracer, softmax: gs.Node, energy: Energy) -> Candidate | None:
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
    if len(uses) > 1:
        raise Mismatch("one softmax serves both directions; each has to normalise over the positions that it sums")
    if not uses or uses[0].values.direction != "all":
        raise Mismatch("the attention between two maps has to weigh the values of all positions")
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
    left = replace(left, matrix=energy.product.operands[0].matrix, scale=energy.scale)
    result = _map_result(tracer, trail, (left, right), values)
    core = (energy.product.node, softmax, uses[0].product.node, result.tensor.inputs[0])
    return Candidate(CO_ATTENTION_ONE_WAY, (left, right, values), (result,), core)


def value_fault(tracer: Tracer, candidate: Candidate) -> str:
    """Say so when values come from the query's map: attention to one map must not fetch from the other."""
    query, key, value = (tracer.origins(feed.source.tensor) for feed in candidate.feeds)
    if value & query and not value & key:
        return (
            f"the weights belong to positions of {candidate.feeds[1].source.tensor.name!r}, but the values come "
            f"from the query's own map {candidate.feeds[2].source.tensor.name!r}"
        )
    return ""


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
            if tracer.sizes.shapes.get(tensor.name) in wanted and not follow(tracer, tensor).factors:
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
    weight, bias, logit = _gate_parameters(projections[0], tensor)
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


def _gate_parameters(node: gs.Node, tensor: gs.Tensor) -> tuple[np.ndarray | None, np.ndarray | None, gs.Tensor]:
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


def are_opposite(first: Candidate, second: Candidate) -> bool:
    """Tell whether two directions compare the same maps, with the roles exchanged."""
    (query, key, _), (other_query, other_key, _) = first.feeds, second.feeds
    same = query.source.tensor is other_key.source.tensor and key.source.tensor is other_query.source.tensor
    same = same and query.matrix == other_key.matrix and key.matrix == other_query.matrix
    return same and query.scale * key.scale == other_query.scale * other_key.scale


def have_same_gate(first: Candidate, second: Candidate) -> bool:
    """Tell whether two gated directions use one gate."""
    pairs = zip(first.gate or (), second.gate or (), strict=True)
    return all(bool((mine == theirs).all()) for mine, theirs in pairs)


def join_directions(first: Candidate, second: Candidate, spec: PluginSpec) -> Candidate:
    """Join two directions: the first one's query is map a, its key is map b."""
    query, key, value_b = first.feeds
    return Candidate(
        spec=spec,
        feeds=(query, key, second.feeds[2], value_b),
        results=(*first.results, *second.results),
        core=tuple({id(node): node for node in (*first.core, *second.core)}.values()),
        gate=first.gate,
    )
