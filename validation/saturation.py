"""How an error of logits shows behind the Sigmoid or Softmax that ends a network.

The relative error of a probability says little where the probability is small: of an almost empty mask all but the
rounding of the sigmoid itself may be gone. What arithmetic controls is the error of the logits; this module says what
becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

KERNEL_UNIT = 2.0**-24
"""Absolute accuracy of one value of a Sigmoid or Softmax: FP32's unit roundoff of their range, which is 1.

Kernels compute 0.5 + an odd function, or exp(z - max), so that a result of 1e-8 may be all error. FP16 results have the
same floor: its subnormal numbers are 2^-24 apart."""

_PASSED_BY_SIGMOID = frozenset(("Cast", "Identity", "ReduceMean", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
"""Layout operators, and the mean: that of y (1 - y) is at most what the mean of y gives."""
_PASSED_BY_SOFTMAX = frozenset(("Cast", "Identity"))
_LOWEST, _HIGHEST = 2.0**-126, 1 - 2.0**-25


@dataclass(frozen=True)
class Squashing:
    """An output that is the result of a Sigmoid or Softmax.

    Attributes:
        output: name of the output.
        function: "Sigmoid" or "Softmax".
        axis: of the Softmax; 0 for a Sigmoid.
    """

    output: str
    function: str
    axis: int = 0


@dataclass(frozen=True)
class Condition:
    """What errors before a squashing function become behind it, on one sample; norms over the whole tensor.

    Attributes:
        reference: norm of the right output.
        logits: norm of the output's error when the logits have a relative error of 1, spread evenly over them.
        floor: norm of the error that the function's kernel alone may make.
    """

    reference: float
    logits: float
    floor: float


def squashed_outputs(graph: onnx.GraphProto) -> tuple[Squashing, ...]:
    """Find the outputs of a graph that come from a Sigmoid or Softmax, with nothing behind it but what passes them."""
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for output in graph.output:
        node, passed = producers.get(output.name), set[str]()
        while node is not None and node.op_type in _PASSED_BY_SIGMOID:
            passed.add(node.op_type)
            node = producers.get(node.input[0])
        if node is None or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Sigmoid":
            found.append(Squashing(output.name, "Sigmoid"))
        elif node.op_type == "Softmax" and passed <= _PASSED_BY_SOFTMAX:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
            found.append(Squashing(output.name, "Softmax", axis))
    return tuple(found)


def condition_of(squashing: Squashing, reference: np.ndarray) -> Condition:
    """Derive the condition from the right output alone.

    With logits z and errors e * rms(z), independent from value to value, the output of a Sigmoid y is wrong by
    e rms(z) y (1 - y), and that of a Softmax by e rms(z) y sqrt((1 - y)^2 + sum of the other y^2). The logits follow
    from y: log(y / (1 - y)), or log(y) without its mean.

    Args:
        squashing: says which function.
        reference: the right output; NaN and infinities are left out.
    """
    exact = np.where(np.isfinite(reference), reference, 0.5).astype(np.float64).clip(_LOWEST, _HIGHEST)
    if squashing.function == "Sigmoid":
        logits, slope = np.log(exact) - np.log1p(-exact), exact * (1 - exact)
    else:
        logits = np.log(exact)
        logits -= logits.mean(axis=squashing.axis, keepdims=True)
        squares = np.square(exact)
        others = squares.sum(axis=squashing.axis, keepdims=True) - squares
        slope = exact * np.sqrt(np.square(1 - exact) + others)
    spread = _norm(logits) / max(exact.size, 1) ** 0.5
    return Condition(_norm(exact), spread * _norm(slope), KERNEL_UNIT * exact.size**0.5)


def _norm(array: np.ndarray) -> float:
    return float(np.square(array).sum() ** 0.5)
