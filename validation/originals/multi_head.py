"""Scaled dot-product and multi-head attention, originals.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.
Behaviour: torch.nn.functional.multi_head_attention_forward on its path with attention weights: sequence first, heads
folded into the batch, one additive mask with minus infinity where a key is forbidden, learned and zero keys appended.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + mask) V; a true entry of the mask is forbidden.

    Args:
        head_channels: d.
        causal: position t sees positions 0..t only.
    """

    def __init__(self, head_channels: int, causal: bool = False) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.causal = causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from (B, h, T, d) to (B, h, S, d) and (B, h, S, e); the mask is (B, T, S)."""
        energy = query @ key.mT / math.sqrt(self.head_channels)
        if self.causal:
            energy = energy + _future(query, energy.shape[2], energy.shape[3])
        if mask is not None:
            energy = energy.masked_fill(mask.unsqueeze(1), float("-inf"))
        return torch.softmax(energy, dim=-1) @ value


class MultiHeadAttention(nn.Module):
    """Multi-head attention with torch's packed, torch's separate, or three layers' parameters.

    Args:
        embed_dim: E.
        num_heads: h.
        bias: b_q, b_k and b_v exist.
        out_bias: b_o exists; as bias when None.
        add_bias_kv: one learned key and value behind the projected ones.
        add_zero_attn: one zero key and value behind all others.
        kdim: channels of key features.
        vdim: channels of value features.
        separate: nn.Linear per role.
        causal: position t sees positions 0..t only.
        layer_norm_eps: where given, LayerNorm(query features + result).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        out_bias: bool | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        separate: bool = False,
        causal: bool = False,
        layer_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = num_heads
        self.causal = causal
        self.add_zero_attn = add_zero_attn
        kdim, vdim = kdim or embed_dim, vdim or embed_dim
        self.separate = separate
        self.packed = not separate and kdim == vdim == embed_dim
        if separate:
            self.q_proj = nn.Linear(embed_dim, embed_dim, bias)
            self.k_proj = nn.Linear(kdim, embed_dim, bias)
            self.v_proj = nn.Linear(vdim, embed_dim, bias)
        elif self.packed:
            self.in_proj_weight = nn.Parameter(torch.zeros(3 * embed_dim, embed_dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.zeros(embed_dim, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.zeros(embed_dim, kdim))
            self.v_proj_weight = nn.Parameter(torch.zeros(embed_dim, vdim))
        has_packed_bias = bias and not separate
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if has_packed_bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias if out_bias is None else out_bias)
        self.bias_k = nn.Parameter(torch.zeros(1, 1, embed_dim)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, embed_dim)) if add_bias_kv else None
        self.layer_norm = nn.LayerNorm(embed_dim, layer_norm_eps) if layer_norm_eps is not None else None

    def forward(
        self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend within (B, T, E)."""
        return self.attend(x, x, x, key_padding_mask, attn_mask)

    def cross(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from (B, T, E) to (B, S, E)."""
        return self.attend(query, memory, memory, key_padding_mask, attn_mask)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with masks (B, S) and (T, S) or (B, T, S)."""
        q, k, v = self._project(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        length, batch, channels = q.shape
        mask = self._merged(q, batch, length, k.shape[0], key_padding_mask, attn_mask)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        if self.add_zero_attn:
            zeros = k.new_zeros(1, batch, channels)
            k, v = torch.cat([k, zeros]), torch.cat([v, zeros])
        size = channels // self.heads
        q = q.reshape(length, batch * self.heads, size).transpose(0, 1) * math.sqrt(1 / size)
        k = k.reshape(k.shape[0], batch * self.heads, size).transpose(0, 1)
        v = v.reshape(v.shape[0], batch * self.heads, size).transpose(0, 1)
        if mask is None:
            energy = torch.bmm(q, k.transpose(1, 2))
        else:
            missing = k.shape[1] - mask.shape[2]
            energy = torch.baddbmm(F.pad(mask, (0, missing)), q, k.transpose(1, 2))
        heads = torch.bmm(energy.softmax(dim=-1), v)
        joined = heads.transpose(0, 1).reshape(length * batch, channels)
        out: torch.Tensor = self.out_proj(joined).reshape(length, batch, channels).transpose(0, 1)
        return out if self.layer_norm is None else self.layer_norm(out + query)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, sequence first."""
        if self.separate:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        channels = query.shape[2]
        if self.packed and query is key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(channels, dim=2)
            return q, k, v
        if self.packed:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        b_q, b_k, b_v = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return F.linear(query, weights[0], b_q), F.linear(key, weights[1], b_k), F.linear(value, weights[2], b_v)

    def _merged(
        self,
        like: torch.Tensor,
        batch: int,
        length: int,
        memory: int,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return the sum of all masks, (B h, T, S), or None."""
        if key_padding_mask is None and attn_mask is None and not self.causal:
            return None
        total = like.new_zeros(batch, self.heads, length, memory)
        if self.causal:
            total = total + _future(like, length, memory)
        if key_padding_mask is not None:
            total = total + _additive(key_padding_mask, like).reshape(batch, 1, 1, memory)
        if attn_mask is not None:
            additive = _additive(attn_mask, like)
            total = total + (additive if additive.ndim == 2 else additive.unsqueeze(1))
        return total.reshape(batch * self.heads, length, memory)


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return minus infinity where a boolean mask is true and 0 elsewhere; other masks as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _future(like: torch.Tensor, length: int, memory: int) -> torch.Tensor:
    """Return (T, S) with minus infinity strictly above the diagonal."""
    return torch.triu(like.new_full((length, memory), float("-inf")), diagonal=1)
