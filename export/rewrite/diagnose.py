"""Explains a refusal: which near relative of a known core a graph computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from edgeattn.export.rewrite.candidates import Candidate, Feed

Arrays = dict[str, np.ndarray]

_MASKED = 1e-9  # an attention weight below this was masked: unmasked ones of equal energies are 1 / (height + width)
_SAME = 1e-4  # relative L2; relatives differ from each other by far more


def mask_fault(candidate: Candidate, quiet: Arrays) -> str:
    """Judge the diagonal mask of a criss-cross candidate.

    Args:
        candidate: the candidate, with its attention tensors.
        quiet: its tensors when all energies are zero, so that only a mask makes weights differ.

    Returns:
        What is wrong, or an empty string.
    """
    batch, _, height, width = candidate.feeds[0].shape
    masked = {name: int((quiet[tensor.name] < _MASKED).sum()) for name, tensor in candidate.attention.items()}
    pixels = batch * height * width
    if masked["row"] and not masked["column"]:
        return "the mask is on the row branch; criss-cross attention hides the pixel in its column instead"
    if masked["row"]:
        return "both branches are masked; criss-cross attention masks the pixel in its column only"
    column = quiet[candidate.attention["column"].name]
    if not masked["column"] and column.min() < 0.99 * column.max():
        share = column.min() / column.max()
        return f"the mask is too weak: with equal energies the pixel keeps {share:.2g} of its weight in its column"
    if not masked["column"]:
        return "no diagonal mask: the pixel itself would be counted twice, in its column and in its row"
    if masked["column"] != pixels:
        return (
            f"the mask hides {masked['column'] / pixels:.3g} positions for each pixel instead of one, the pixel itself"
        )
    return ""


def explain(candidate: Candidate, inputs: Arrays, outputs: Arrays) -> str:
    """Find a near relative of the operation that computes what the graph computes.

    Args:
        candidate: a core that differs from its replacement.
        inputs: its inputs.
        outputs: its outputs.

    Returns:
        What is different, or an empty string when no known relative fits.
    """
    result = candidate.results[0]
    expected = outputs[result.tensor.name].astype(np.float64)
    if expected.size > 1_000_000:
        return ""  # written plainly, the relatives take too long on a large map
    for order in (candidate, candidate.swapped()):
        query, key, value = (_flat_free(feed, inputs) for feed in order.feeds[:3])
        if query.shape[1] != key.shape[1]:
            continue
        relatives = _LINES if candidate.attention else _MAPS
        for reason, relative in relatives.items():
            for produced in relative(query, key, value):
                if candidate.residual is not None:
                    produced = produced + inputs[candidate.residual.name]
                if produced.size == expected.size and _close(produced.reshape(expected.shape), expected):
                    return reason
    return ""


def _close(produced: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(produced - expected) <= _SAME * np.linalg.norm(expected))


def _flat_free(feed: Feed, inputs: Arrays) -> np.ndarray:
    """Return a feed as (batch, channels, height, width) in FP64, scaled."""
    source = feed.source
    array = inputs[source.tensor.name].astype(np.float64).transpose(0, source.channel, *source.spatial)
    array = array.reshape(feed.shape) * feed.scale
    if feed.matrix is not None:
        matrix = inputs[feed.matrix.tensor.name].astype(np.float64)
        array = np.einsum("oc,bchw->bohw", matrix if feed.matrix.output_first else matrix.T, array)
    for factor in feed.factors:
        number = float(inputs[factor.tensor.name].reshape(()))
        array = array * number if factor.operator == "Mul" else array / number
    return array


def _softmax(energy: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    weights = np.exp(energy - energy.max(axis=axis, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axis, keepdims=True))


def _lines(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    swap: str = "",
    transpose: str = "",
    shift: int = 0,
    mirrored: bool = False,
    exchanged: bool = False,
) -> Iterator[np.ndarray]:
    """Compute criss-cross attention with something changed, if the sizes allow it."""
    height, width = query.shape[2:]
    pairs = {name: (key, query) if swap == name else (query, key) for name in ("column", "row")}
    columns = np.einsum("bchw,bciw->bhwi", *pairs["column"])
    rows = np.einsum("bchw,bchj->bhwj", *pairs["row"])
    mask = np.roll(np.eye(height, dtype=bool), shift, axis=1)
    columns = np.where((mask[:, ::-1] if mirrored else mask)[None, :, None, :], -np.inf, columns)
    both = _softmax(np.concatenate([columns, rows], axis=3), 3)
    columns, rows = both[..., :height], both[..., height:]
    if exchanged:
        if height != width:
            return
        columns, rows = rows, columns
    columns = columns.transpose(0, 3, 2, 1) if transpose == "column" else columns
    rows = rows.transpose(0, 1, 3, 2) if transpose == "row" else rows
    yield np.einsum("bhwi,bciw->bchw", columns, value) + np.einsum("bhwj,bchj->bchw", rows, value)


def _maps(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, axis: int = 2, transpose: bool = False
) -> Iterator[np.ndarray]:
    """Compute one direction of co-attention with something changed, if the sizes allow it."""
    query, key, value = (array.reshape(*array.shape[:2], -1) for array in (query, key, value))
    weights = _softmax(np.einsum("bcm,bcn->bmn", query, key), axis)
    if transpose:
        weights = weights.transpose(0, 2, 1)
    if weights.shape[2] == value.shape[2]:
        yield np.einsum("bmn,bcn->bcm", weights, value)


_Relatives = dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Iterator[np.ndarray]]]

_LINES: _Relatives = {
    "query and key change places between the column and the row branch": partial(_lines, swap="row"),
    "the attention of the column branch is applied transposed": partial(_lines, transpose="column"),
    "the attention of the row branch is applied transposed": partial(_lines, transpose="row"),
    "the mask is off the diagonal: it hides the next pixel of the column": partial(_lines, shift=1),
    "the mask is off the diagonal: it hides the previous pixel of the column": partial(_lines, shift=-1),
    "the mask is on the other diagonal": partial(_lines, mirrored=True),
    "the attention of the columns weighs the rows, and the other way round": partial(_lines, exchanged=True),
}

_MAPS: _Relatives = {
    "the softmax runs over the positions of one map and the sum over those of the other": partial(_maps, axis=1),
    "the attention is applied transposed": partial(_maps, transpose=True),
    "the softmax runs over the summed positions of the wrong map, and the attention is applied transposed": partial(
        _maps, axis=1, transpose=True
    ),
}
