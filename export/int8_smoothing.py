"""Exact rescaling between the channels of a linear layer's input and its weights, before both are quantised.

One scale for a whole activation wastes INT8 where a few channels are far larger than the others, as behind LayerNorm
and GELU in a Transformer. x W = (x / s) (s W) moves that spread into the weights, which have scales of their own for
each output (Xiao et al., "SmoothQuant", ICML 2023, arXiv 2211.10438): s = a^alpha / w^(1 - alpha), from the peaks a of
the input's channels and w of the weight's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeattn.export.calibration_methods import LEVELS
from edgeattn.export.calibration_statistics import ActivationStatistics, ChannelStatistics
from edgeattn.export.int8_layers import constant_of, new_constant
from edgeattn.export.names import claim_name

STRENGTHS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
"""Values of alpha that are tried."""

GAIN = 2.0
"""How many times less noise power it must give than no rescaling, which costs nothing (3 dB)."""

_SPREAD = 1e-3
"""Peaks of channels are taken to be at least this share of the largest one, so that silent channels stay silent."""


def choose_factors(statistics: ActivationStatistics, weights: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return the divisors of an activation's channels that give its linear layers the least noise.

    The choice is validated crosswise: factors and scales from one half of the batches are judged by the rows of the
    other half. Otherwise the strongest rescaling would win, and clip what the calibration data did not hold.

    Args:
        statistics: of the layers' common input.
        weights: (channels, outputs) of each layer.

    Returns:
        (channels,), or None where the gain is less than `GAIN` or one half of the batches is missing.
    """
    if statistics.halves is None or any(len(half.rows) == 0 for half in statistics.halves):
        return None
    even, odd = statistics.halves
    pairs: tuple[tuple[ChannelStatistics, ChannelStatistics], ...] = ((even, odd), (odd, even))
    results = [[unseen.rows @ weight for weight in weights] for _, unseen in pairs]

    def noise(strength: float | None) -> float:
        return sum(
            _noise(seen.peaks, unseen.rows, weights, wanted, strength)
            for (seen, unseen), wanted in zip(pairs, results, strict=True)
        )

    plain = noise(None)
    noises = {strength: noise(strength) for strength in STRENGTHS}
    best = min(noises, key=lambda strength: noises[strength])
    if not noises[best] * GAIN < plain:
        return None
    return factors_for(np.maximum(even.peaks, odd.peaks), weights, best)


def factors_for(peaks: np.ndarray, weights: Sequence[np.ndarray], strength: float) -> np.ndarray:
    """Return the divisors for one strength, scaled so that the activation's largest number stays as large."""
    largest = np.maximum(peaks, _SPREAD * peaks.max()) + np.finfo(np.float32).tiny
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    rows = np.maximum(rows, _SPREAD * rows.max()) + np.finfo(np.float32).tiny
    factors = largest.astype(np.float64) ** strength / rows.astype(np.float64) ** (1 - strength)
    factors *= (peaks / factors).max() / peaks.max() if peaks.max() > 0 else 1.0
    return factors.astype(np.float32)


def _noise(
    peaks: np.ndarray,
    rows: np.ndarray,
    weights: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    strength: float | None,
) -> float:
    """Return the mean share of noise power in the rows of the layers' results, with scales from other data's peaks."""
    factors = np.ones(len(peaks), np.float32) if strength is None else factors_for(peaks, weights, strength)
    tiny = np.finfo(np.float32).tiny
    step = np.float32(max(float((peaks / factors).max()) / LEVELS, float(tiny)))
    rounded = np.clip(np.round(rows / factors / step), -LEVELS - 1, LEVELS) * step
    shares = []
    for weight, wanted in zip(weights, results, strict=True):
        scaled = weight * factors[:, None]
        steps = np.maximum(np.abs(scaled).max(axis=0) / LEVELS, tiny)
        given = rounded @ (np.round(scaled / steps) * steps)
        shares.append(float(noise_shares(np.sum(wanted**2, axis=1), np.sum((given - wanted) ** 2, axis=1)).mean()))
    return float(np.mean(shares))


def noise_shares(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the ratios of the powers, at most 1; no noise on no signal counts as none."""
    return np.minimum(noise / np.maximum(signal, np.maximum(noise, np.finfo(np.float32).tiny)), 1)


def rescale(graph: ir.Graph, factors: Mapping[str, np.ndarray], layers: set[str], taken: set[str]) -> dict[str, str]:
    """Divide activations by factors and multiply the weights of the linear layers that read them.

    The division is folded into the LayerNormalization that makes the activation where nothing else reads it, and is an
    elementwise product before the layers otherwise.

    Args:
        graph: main graph, changed in place.
        factors: divisors of the channels by tensor name.
        layers: names of the linear layers that take part.
        taken: names in use.

    Returns:
        For each tensor the name of the divided one.
    """
    divided = {}
    values = {str(value.name): value for node in graph for value in node.inputs if value is not None}
    for name, divisors in factors.items():
        value = values[name]
        uses = [(node, index) for node, index in value.uses() if index == 0 and node.name in layers]
        for node, _ in uses:
            weight = constant_of(node.inputs[1])
            assert weight is not None
            scaled = new_constant(graph, f"{node.inputs[1].name}_rescaled", weight * divisors[:, None], taken)  # type: ignore[union-attr]
            node.replace_input_with(1, scaled)
        producer = value.producer()
        if producer is not None and _absorbs(producer, value, len(uses)):
            for index, constant in enumerate(producer.inputs[1:], start=1):
                if constant is not None:
                    array = constant_of(constant)
                    assert array is not None
                    folded = new_constant(graph, f"{constant.name}_rescaled", array / divisors, taken)
                    producer.replace_input_with(index, folded)
            divided[name] = name
            continue
        inverse = new_constant(graph, f"{name}_rescaling", (1 / divisors).astype(np.float32), taken)
        result = ir.Value(name=claim_name(f"{name}_rescaled", taken), shape=value.shape, type=value.type)
        product = ir.Node(
            "",
            "Mul",
            [value, inverse],
            outputs=[result],
            name=claim_name(f"{name}_rescale", taken),
            metadata_props=dict(uses[0][0].metadata_props),
        )
        graph.insert_before(next(node for node in graph if node in {node for node, _ in uses}), product)
        for node, index in uses:
            node.replace_input_with(index, result)
        divided[name] = str(result.name)
    return divided


def _absorbs(node: ir.Node, value: ir.Value, uses: int) -> bool:
    """Say whether a node is a LayerNormalization over the last axis whose result only the layers read."""
    if node.op_type != "LayerNormalization" or node.domain != "" or value.is_graph_output():
        return False
    alone = len(value.uses()) == uses and node.attributes.get_int("axis", -1) == -1
    return alone and all(constant_of(constant) is not None for constant in node.inputs[1:] if constant is not None)
