"""The operations in plain torch: FP64 references from the mathematics, published forms, SDPA where it applies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from edgeattn.blocks import AttentionCore
from edgeattn.plugins_trt import PluginSpec

Tensors = tuple[torch.Tensor, ...]

CHUNK = 2**27
"""Attention weights that a reference holds at a time: 1 GiB in FP64."""


# References. Every query has a softmax over all its keys; queries are taken in runs, so that maps of any size fit.


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return softmax over keys of query^T key, times value: (batch, channels, queries)."""
    batch, _, queries = query.shape
    step = max(1, CHUNK // (batch * key.shape[2]))
    runs = []
    for start in range(0, queries, step):
        weights = torch.softmax(query[:, :, start : start + step].transpose(1, 2) @ key, dim=2)
        runs.append(value @ weights.transpose(1, 2))
    return torch.cat(runs, dim=2)


def _gated(attended: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply (batch, channels, positions) by the sigmoid gate of every position, where there is one."""
    if weight is None or bias is None:
        return attended
    return attended * torch.sigmoid(torch.einsum("oc,bcn->bon", weight, attended) + bias[:, None])


def _criss_cross_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """One softmax over a pixel's column, without itself, and row; then residual plus the weighted values."""
    batch, _, height, width = query.shape
    output = residual.clone()
    per_run = max(1, CHUNK // (batch * (height + width)))  # pixels
    columns_per_run = min(width, per_run)
    rows_per_run = max(1, per_run // columns_per_run)
    for top in range(0, height, rows_per_run):
        rows = slice(top, min(top + rows_per_run, height))
        own = torch.arange(height, device=query.device)
        own = own[rows, None] == own[None, :]
        for left in range(0, width, columns_per_run):
            columns = slice(left, left + columns_per_run)
            part = query[:, :, rows, columns]
            down = torch.einsum("bcij,bckj->bijk", part, key[:, :, :, columns])
            down = down.masked_fill(own[None, :, None, :], -torch.inf)
            across = torch.einsum("bcij,bcil->bijl", part, key[:, :, rows])
            weights = torch.softmax(torch.cat([down, across], dim=3), dim=3)
            output[:, :, rows, columns] += torch.einsum(
                "bijk,bckj->bcij", weights[..., :height], value[:, :, :, columns]
            ) + torch.einsum("bijl,bcil->bcij", weights[..., height:], value[:, :, rows])
    return output


def _co_attention_reference(
    query_a: torch.Tensor,
    key_b: torch.Tensor,
    value_a: torch.Tensor,
    value_b: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> Tensors:
    a, b = query_a.flatten(2), key_b.flatten(2)
    from_b = _gated(_attend(a, b, value_b.flatten(2)), gate_weight, gate_bias)
    from_a = _gated(_attend(b, a, value_a.flatten(2)), gate_weight, gate_bias)
    return from_b.view_as(value_a), from_a.view_as(value_b)


def _one_way_reference(
    query_a: torch.Tensor,
    key_b: torch.Tensor,
    value_b: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    attended = _attend(query_a.flatten(2), key_b.flatten(2), value_b.flatten(2))
    return _gated(attended, gate_weight, gate_bias).unflatten(2, query_a.shape[2:])


# The published forms: what the public code of each paper does with the projected maps.


def _criss_cross_published(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Columns and rows folded into the batch of 3-D products, with an infinite diagonal (CCNet)."""
    batch, _, height, width = query.shape

    def columns(maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(0, 3, 1, 2).reshape(batch * width, -1, height)

    def rows(maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(0, 2, 1, 3).reshape(batch * height, -1, width)

    diagonal = torch.diag(query.new_full((height,), -torch.inf))
    down = torch.bmm(columns(query).transpose(1, 2), columns(key)) + diagonal
    down = down.view(batch, width, height, height).permute(0, 2, 1, 3)
    across = torch.bmm(rows(query).transpose(1, 2), rows(key)).view(batch, height, width, width)
    weights = torch.softmax(torch.cat([down, across], dim=3), dim=3)
    to_column = weights[..., :height].permute(0, 2, 1, 3).reshape(batch * width, height, height)
    to_row = weights[..., height:].reshape(batch * height, width, width)
    from_column = torch.bmm(columns(value), to_column.transpose(1, 2)).view(batch, width, -1, height)
    from_row = torch.bmm(rows(value), to_row.transpose(1, 2)).view(batch, height, -1, width)
    return from_column.permute(0, 2, 3, 1) + from_row.permute(0, 2, 1, 3) + residual


def _co_attention_published(
    query_a: torch.Tensor,
    key_b: torch.Tensor,
    value_a: torch.Tensor,
    value_b: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> Tensors:
    """One affinity matrix, a softmax along each of its axes, two products (COSNet)."""
    affinity = torch.bmm(query_a.flatten(2).transpose(1, 2), key_b.flatten(2))
    over_a = torch.softmax(affinity, dim=1)
    over_b = torch.softmax(affinity.transpose(1, 2), dim=1)
    from_a = _gated(torch.bmm(value_a.flatten(2), over_a), gate_weight, gate_bias)
    from_b = _gated(torch.bmm(value_b.flatten(2), over_b), gate_weight, gate_bias)
    return from_b.reshape(value_a.shape), from_a.reshape(value_b.shape)


def _one_way_published(
    query_a: torch.Tensor,
    key_b: torch.Tensor,
    value_b: torch.Tensor,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    affinity = torch.bmm(query_a.flatten(2).transpose(1, 2), key_b.flatten(2))
    over_b = torch.softmax(affinity.transpose(1, 2), dim=1)
    attended = _gated(torch.bmm(value_b.flatten(2), over_b), gate_weight, gate_bias)
    return attended.unflatten(2, query_a.shape[2:])


def _pixel_published(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Energy matrix, softmax, product (non-local networks, DANet)."""
    attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=2)
    return torch.bmm(value, attention.transpose(1, 2))


# scaled_dot_product_attention with one head and positions as the sequence. Channels-last maps need no copy for it.


def _sequence(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return (batch, channels, queries), a view of what SDPA writes."""
    attended = F.scaled_dot_product_attention(_sequence(query), _sequence(key), _sequence(value), scale=1.0)
    return attended.squeeze(1).transpose(1, 2)


def _co_attention_sdpa(
    query_a: torch.Tensor, key_b: torch.Tensor, value_a: torch.Tensor, value_b: torch.Tensor
) -> Tensors:
    from_b = _sdpa(query_a, key_b, value_b).unflatten(2, value_a.shape[2:])
    return from_b, _sdpa(key_b, query_a, value_a).unflatten(2, value_b.shape[2:])


def _one_way_sdpa(query_a: torch.Tensor, key_b: torch.Tensor, value_b: torch.Tensor) -> torch.Tensor:
    return _sdpa(query_a, key_b, value_b).unflatten(2, query_a.shape[2:])


REFERENCES: Mapping[str, Callable[..., Any]] = {
    "CrissCrossAttention": _criss_cross_reference,
    "CoAttention": _co_attention_reference,
    "CoAttentionOneWay": _one_way_reference,
    "PixelAttention": _attend,
}
PUBLISHED: Mapping[str, Callable[..., Any]] = {
    "CrissCrossAttention": _criss_cross_published,
    "CoAttention": _co_attention_published,
    "CoAttentionOneWay": _one_way_published,
    "PixelAttention": _pixel_published,
}
SDPA: Mapping[str, Callable[..., Any]] = {
    "CoAttention": _co_attention_sdpa,
    "CoAttentionOneWay": _one_way_sdpa,
    "PixelAttention": _sdpa,
}
"""By operator name. An operation that is not in `REFERENCES` is compared with its torch core; see `reference_of`."""


def as_tuple(result: Any) -> Tensors:
    """Return one or several tensors as a tuple."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@functools.cache
def core_of(spec: PluginSpec) -> AttentionCore:
    """Return the torch module that the operation replaces, the form that the project exports without plugins."""
    (core,) = [kind for kind in AttentionCore.__subclasses__() if kind.op_type == spec.op_type]
    return core()


def reference_of(spec: PluginSpec, inputs: Mapping[str, torch.Tensor]) -> Tensors:
    """Return what an operation has to give, computed in FP64 from the inputs as they are."""
    compute = REFERENCES.get(spec.op_type) or core_of(spec)
    with torch.no_grad():
        return as_tuple(compute(*(inputs[tensor.name].double() for tensor in spec.inputs)))
