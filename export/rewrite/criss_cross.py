"""Reads a softmax over two joined line energies as criss-cross attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from edgeattn.export.rewrite.candidates import Candidate, Feed, Mismatch, Result
from edgeattn.export.rewrite.trace import Tracer
from edgeattn.export.rewrite.walks import Energy, Trail, adder_of, follow, uses_of
from edgeattn.plugins_trt import CRISS_CROSS_ATTENTION


def read_criss_cross(
    tracer: Tracer, softmax: gs.Node, energies: Sequence[Energy], directions: Sequence[str]
) -> Candidate:
    """Read two joined line energies as criss-cross attention.

    Raises:
        Mismatch: it is almost, but not quite.
    """
    column, _ = _branches(energies, directions)
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
        Feed(query, matrix=column.product.operands[0].matrix, scale=column.scale),
        Feed(key),
        Feed(values[0], factors=trail.factors),
    )
    result, residual = _with_residual(tracer, trail, feeds[2].shape, residual)
    return Candidate(
        spec=CRISS_CROSS_ATTENTION,
        feeds=feeds,
        results=(Result(result),),
        core=(
            *(energy.product.node for energy in energies),
            softmax,
            *(use.product.node for use in uses),
            result.inputs[0],
        ),
        attention={direction: use.attention for direction, use in by_direction.items()},
        residual=residual,
        notes=_softmax_notes(tracer, softmax, energies),
    )


def _branches(energies: Sequence[Energy], directions: Sequence[str]) -> tuple[Energy, Energy]:
    """Return column and row energy, once they are known to compare the same maps in the same way.

    Raises:
        Mismatch: they do not.
    """
    if sorted(directions) != ["column", "row"]:
        listed = ", ".join(direction if direction != "all" else "all positions" for direction in directions)
        raise Mismatch(f"the softmax joins energies along {listed}; criss-cross attention has one column and one row")
    column, row = (energies[directions.index(direction)] for direction in ("column", "row"))
    if column.maps != row.maps or column.matrices != row.matrices:
        only = [sorted(energy.maps - other.maps) for energy, other in ((column, row), (row, column))]
        raise Mismatch(
            f"the branches compare different maps: {_names(only[0] or column.maps)} in the columns, "
            f"{_names(only[1] or row.maps)} in the rows"
        )
    if not np.isclose(column.scale, row.scale, rtol=1e-6):
        raise Mismatch(
            f"the energies are scaled differently: by {column.scale:.6g} in the columns, by {row.scale:.6g} in the rows"
        )
    return column, row


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
    adders = [adder_of(tracer, trail) for trail in trails]
    residual = None
    for index in (0, 1):
        adder, other = adders[index], adders[1 - index]
        if adder is None or other is None or adder is other:
            continue
        later = follow(tracer, adder.outputs[0])
        if adder_of(tracer, later) is other and not later.factors:
            residual = next(item for item in adder.inputs if item is not trails[index].end)
            trails[index], adders[index] = Trail((*trails[index].tensors, *later.tensors), trails[index].factors), other
            break
    meeting = adders[0] if adders[0] is adders[1] else None
    if meeting is None:
        raise Mismatch("the results of column and row branch are not added to each other")
    names = [[(factor.operator, factor.tensor.name) for factor in trail.factors] for trail in trails]
    if names[0] != names[1]:
        raise Mismatch("the results of column and row branch are multiplied by different factors before they are added")
    merged = follow(tracer, meeting.outputs[0])
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
    if not whole or follow(tracer, whole[-1]).factors:
        raise Mismatch(f"the result never has the layout (batch, channels, height, width) = {shape} of the values")
    adder = adder_of(tracer, trail)
    if residual is None and adder is not None and whole[-1] is trail.end:
        other = next((item for item in adder.inputs if item is not trail.end), None)
        if other is not None and tracer.sizes.shapes.get(other.name) == shape:
            return adder.outputs[0], other
    return whole[-1], residual
