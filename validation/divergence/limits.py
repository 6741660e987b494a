"""How far a segment's result may be from the reference when both start from the same inputs.

Three things are allowed, and no more:

- the rounding of its own operations, as `edgeattn.validation.tolerance` derives it from depth and reduction length;
- that, times the condition of the segment, where it amplifies: measured, by changing its inputs by one unit roundoff;
- noise that is no rounding of single numbers, measured by adding it, `CONFIDENCE` times: a uniform error of one step to
  every dequantised tensor, weight or activation, in place of its quantiser (clipping is not allowed for); and an error
  of one unit roundoff of its range to every sigmoid and hyperbolic tangent, which libraries compute to that absolute
  accuracy, however small the result is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import onnx
from onnx import helper

from edgeattn.validation.divergence.forms import relative_l2
from edgeattn.validation.divergence.segments import Segment, Sessions
from edgeattn.validation.tolerance import CONFIDENCE, arithmetic_of, tolerance

Arrays = Mapping[str, np.ndarray]

_PERTURBATION = {"fp32": 2.0**-18, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Relative change of the inputs by which the condition is measured: large beside the FP32 rounding of the measurement,
small beside the numbers."""

_BOUNDED = {"Sigmoid": 1.0, "Tanh": 2.0}
"""Functions whose accuracy is absolute, with the size of their range. ONNX Runtime's CPU kernels are off by two to five
units of 2^-24 anywhere, where a result of 1e-8 may be all error."""

_NOISY = frozenset({"DequantizeLinear", *_BOUNDED})


@dataclass(frozen=True)
class Limit:
    """The allowed local error of one segment.

    Attributes:
        value: relative L2.
        derivation: where it comes from.
    """

    value: float
    derivation: str


class Limits:
    """Derives limits, each only as far as the error at hand asks for.

    Args:
        sessions: runs the segments.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def limit(self, segment: Segment, given: Arrays, error: float) -> Limit:
        """Derive the limit of a segment.

        Args:
            segment: the nodes.
            given: the inputs that it ran on.
            error: the local error that is to be judged; condition and noise are measured only where it exceeds what
                explains it without them.
        """
        known = self.sessions.rounding
        if segment.digest not in known:
            known[segment.digest] = self._derive(segment, given)
        allowed, derivation = known[segment.digest]
        if error <= allowed or not isfinite(error):
            return Limit(allowed, derivation)
        condition = self._condition(segment, given)
        if condition > 1:
            allowed *= condition
            derivation += f"; the segment amplifies changes of its inputs {condition:.2g} times: {allowed:.2g}"
        if error > allowed and any(node.op_type in _NOISY for node in segment.model.graph.node):
            noise = CONFIDENCE * self._noise(segment, given)
            derivation += f"; plus {CONFIDENCE:g} times the noise of its quantisers and bounded functions, {noise:.2g}"
            allowed += noise
        return Limit(allowed, derivation)

    def _derive(self, segment: Segment, given: Arrays) -> tuple[float, str]:
        described = onnx.ModelProto()
        described.CopyFrom(segment.model)
        for value in described.graph.input:
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
            for size in given[value.name].shape:
                value.type.tensor_type.shape.dim.add(dim_value=size)
        arithmetic = arithmetic_of(described)
        derived = tolerance(segment.precision, arithmetic, peak=0.0, rms=0.0)
        derivation = (
            f"{arithmetic.depth} {segment.precision.upper()} roundings in sequence, sums of at most "
            f"{arithmetic.reduction} terms: {derived.expected_relative_l2:.2g}"
        )
        # A segment without any rounding operation must be exact; `tolerance` never goes below one step of FP16 or BF16.
        exact = arithmetic.depth == 0 and segment.precision == "fp32"
        return (0.0, "nothing in it rounds") if exact else (derived.expected_relative_l2, derivation)

    def _condition(self, segment: Segment, given: Arrays) -> float:
        """Return by how much a small relative change of all inputs grows on its way through the segment."""
        size = _PERTURBATION[segment.precision]
        rng = np.random.default_rng(0)
        changed = {
            name: (array * (1 + size * rng.choice([-1, 1], array.shape))).astype(array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in ((name, given[name]) for name in segment.inputs)
        }
        growth = relative_l2(self.sessions.run(segment, given), self.sessions.run(segment, changed)) / size
        return growth if isfinite(growth) else 1.0

    def _noise(self, segment: Segment, given: Arrays) -> float:
        """Return the error that the noise of quantisers and bounded functions makes."""
        quiet, noisy = (self.sessions.run(_floating(segment, noisy=noisy), given) for noisy in (False, True))
        error = relative_l2(quiet, noisy)
        return error if isfinite(error) else 0.0


def _floating(segment: Segment, *, noisy: bool) -> Segment:
    """Return a segment without quantisers, with noise in their place and on bounded functions, or without."""
    model = onnx.ModelProto()
    model.CopyFrom(segment.model)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for seed, node in enumerate(nodes):
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type not in _NOISY:
            model.graph.node.append(node)
            continue
        result, exact = node.output[0], f"{node.output[0]}__exact"
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            model.graph.node.append(helper.make_node("Identity", [sources[node.input[0]]], [exact]))
        else:
            model.graph.node.append(node)
            model.graph.node[-1].output[0] = exact
        if noisy:
            step, steps = _step(node, exact, shapes, model.graph)
            noise, scaled = f"{result}__noise", f"{result}__scaled"
            draw = helper.make_node("RandomUniformLike", [exact], [noise], low=-0.5, high=0.5, seed=float(seed + 1))
            scale = helper.make_node("Mul", [noise, step], [scaled])
            model.graph.node.extend([draw, *steps, scale, helper.make_node("Add", [exact, scaled], [result])])
        else:
            model.graph.node.append(helper.make_node("Identity", [exact], [result]))
    return Segment(segment.inputs, segment.output, segment.modules, segment.owner, model)


def _step(
    node: onnx.NodeProto, exact: str, shapes: Mapping[str, Sequence[int]], graph: onnx.GraphProto
) -> tuple[str, list[onnx.NodeProto]]:
    """Return the tensor by which uniform noise of size one is multiplied, and the nodes that compute it."""
    step = f"{node.output[0]}__step"
    if node.op_type in _BOUNDED:
        value = np.array(_BOUNDED[node.op_type] * 2.0**-24, np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(value, step))
        return step, []
    scale, stored = node.input[1], shapes.get(node.input[0])
    if stored is None:
        return step, _narrowest(exact, scale, step, graph)
    if not shapes.get(scale):
        return scale, []
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    axes = [place for place in range(len(stored)) if place != axis % len(stored)]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{step}_axes"))
    return step, [helper.make_node("Unsqueeze", [scale, f"{step}_axes"], [step])]


def _narrowest(exact: str, scale: str, step: str, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return nodes that limit the step of an activation to `CONFIDENCE` times what its range needs."""
    needed = f"{step}_needed"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(CONFIDENCE / 127, np.float32), f"{step}_share"))
    return [
        helper.make_node("Abs", [exact], [f"{step}_abs"]),
        helper.make_node("ReduceMax", [f"{step}_abs"], [f"{step}_peak"], keepdims=0),
        helper.make_node("Mul", [f"{step}_peak", f"{step}_share"], [needed]),
        helper.make_node("Min", [needed, scale], [step]),
    ]
