"""Compares a recognised core with its replacement, on numbers.

The core is cut out of the graph and run on random inputs beside the nodes that would replace it. Queries and keys are
small integers (times a power of two), so every energy is exact in FP32 whatever the order of summation, and both sides
meet the softmax with the same numbers. What remains is the rounding of the exponentials and of one weighted sum of n
terms (n = height + width, or the number of positions): at most about (n + 10) * 2**-24 relative, in practice nearer to
its square root. 1e-5 leaves room for that on any map, and is far below the effect of a structural difference, which is
a share of whole attention weights. Energies are drawn once small, where every weight matters, and once as large as in
trained networks, where a mask that is merely not very negative would show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from edgeattn.export.rewrite.candidates import Candidate, Mismatch, build
from edgeattn.export.rewrite.diagnose import explain, mask_fault
from edgeattn.export.rewrite.region import Arrays, Cutter, Runner
from edgeattn.export.rewrite.sizes import Sizes
from edgeattn.plugins_trt.onnx_form import local_function

TOLERANCE = 1e-5
"""Largest relative L2 difference between a core and its replacement; derived in the module's first paragraph."""

# Standard deviations of the energies. Trained networks were measured at up to 13.
_ENERGIES = (0.5, 12.0)

# ONNX Runtime's ways of saying that nodes do not fit together, or that it has no kernel for one.
_DOES_NOT_RUN = (
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison.

    Attributes:
        reason: why the replacement is not the same, empty when it is.
        swapped: whether query and key have to be exchanged.
        difference: relative L2 difference, the largest of all runs.
    """

    reason: str
    swapped: bool = False
    difference: float = math.nan


class Verifier:
    """Compares cores with their replacements; cores that are equal up to names are compared once.

    Args:
        cutter: of the model.
        seed: of the random inputs.
    """

    def __init__(self, cutter: Cutter, *, seed: int) -> None:
        self.cutter = cutter
        self.seed = seed
        self._verdicts: dict[str, Verdict] = {}

    def check(self, candidate: Candidate) -> Verdict:
        """Compare a candidate with its replacement, query and key in either role."""
        sizes = self.cutter.trials[0]
        if {sizes.element_types.get(tensor.name) for tensor in candidate.inputs} != {onnx.TensorProto.FLOAT}:
            return Verdict("it does not compute in float32; recognise attention before the precision is reduced")
        try:
            nodes = self.cutter.cut(candidate)
        except Mismatch as mismatch:
            return Verdict(str(mismatch))
        signature = self.cutter.signature(candidate, nodes)
        if signature not in self._verdicts:
            try:
                self._verdicts[signature] = self._compare(candidate, nodes)
            except _DOES_NOT_RUN as error:
                first_line = str(error).strip().partition("\n")[0]
                self._verdicts[signature] = Verdict(
                    f"ONNX Runtime cannot run it, so it cannot be verified: {first_line}"
                )
        return self._verdicts[signature]

    def _compare(self, candidate: Candidate, nodes: Sequence[onnx.NodeProto]) -> Verdict:
        """Run both sides at every trial size, and find the reason when they differ."""
        orders = [candidate, candidate.swapped()]
        worst = [0.0, 0.0]
        for sizes in self.cutter.trials:
            feeds = [random_inputs(candidate, sizes, energy, self.seed) for energy in _ENERGIES]
            core = self.cutter.runner(candidate, nodes, sizes, feeds[0])
            expected = [core(inputs) for inputs in feeds]
            for index, order in enumerate(orders):
                if worst[index] <= TOLERANCE:
                    worst[index] = max(worst[index], self._difference(order, sizes, feeds, expected))
            if worst[0] <= TOLERANCE:
                worst[1] = math.inf  # the roles are settled
        best = int(worst[1] < worst[0])
        sizes = self.cutter.trials[0]
        quiet = random_inputs(candidate, sizes, 0.0, self.seed)
        core = self.cutter.runner(candidate, nodes, sizes, quiet)
        fault = mask_fault(candidate, core(quiet)) if candidate.attention else ""
        if worst[best] <= TOLERANCE:
            return Verdict(fault, swapped=bool(best), difference=worst[best])
        loud = random_inputs(candidate, sizes, 2.0, self.seed)
        reason = next(iter(candidate.notes), "") or explain(candidate, loud, core(loud)) or fault
        return Verdict(reason or f"its results differ from {candidate.spec.op_type} by {worst[best]:.1e} (relative L2)")

    def _difference(
        self, candidate: Candidate, sizes: Sizes, feeds: Sequence[Arrays], expected: Sequence[Arrays]
    ) -> float:
        """Return the largest relative L2 difference of the replacement's results, infinite if it does not fit."""
        snippet = build(candidate, "replacement", static=sizes.static)
        names = [result.tensor.name for result in candidate.results]
        function = local_function(candidate.spec, self.cutter.opset)
        opset = self.cutter.opset
        try:
            run = Runner(snippet.nodes, snippet.initializers(), feeds[0], names, opset=opset, functions=[function])
            produced = [run(inputs) for inputs in feeds]
        except _DOES_NOT_RUN:
            return math.inf
        return max(
            relative_l2(mine[name], theirs[name])
            for mine, theirs in zip(produced, expected, strict=True)
            for name in names
        )


def random_inputs(candidate: Candidate, sizes: Sizes, energy: float, seed: int) -> Arrays:
    """Draw inputs of a core.

    Args:
        candidate: the core.
        sizes: sizes to draw at.
        energy: wanted standard deviation of the energies; they are exact multiples of a power of two.
        seed: of the generator.

    Returns:
        Arrays by tensor name.
    """
    generator = np.random.default_rng(seed)
    query, key, *others = candidate.feeds
    arrays = {
        tensor.name: generator.standard_normal(sizes.shapes[tensor.name]).astype(np.float32)
        for tensor in candidate.inputs
    }
    for factor in (factor for feed in others for factor in feed.factors):
        shape = sizes.shapes[factor.tensor.name]
        arrays[factor.tensor.name] = generator.uniform(0.5, 1.5, shape).astype(np.float32)
    # Integers from -2 to 2 have variance 2, so the sum over the channels has a deviation of 2 * sqrt(channels); those
    # from -1 to 1 have 2/3.
    deviation = 2.0 * math.sqrt(key.shape[1]) * abs(query.scale * key.scale or 1.0)
    for matrix in (feed.matrix.tensor.name for feed in (query, key) if feed.matrix is not None):
        arrays[matrix] = generator.integers(-1, 2, sizes.shapes[matrix]).astype(np.float32)
        deviation *= math.sqrt(sizes.shapes[matrix][0] * 2 / 3)
    gain = 2.0 ** round(math.log2(energy / deviation)) if energy else 0.0
    for feed, size in ((key, 1.0), (query, gain)):
        name = feed.source.tensor.name
        arrays[name] = (generator.integers(-2, 3, sizes.shapes[name]) * size).astype(np.float32)
    return arrays


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return |actual - expected| / |expected| in the L2 norm; infinite for other shapes or non-finite numbers."""
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return math.inf
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(actual - wide) / max(np.linalg.norm(wide), np.finfo(np.float32).tiny))
