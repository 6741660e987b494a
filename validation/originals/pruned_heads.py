"""Multi-head attention with gated heads, original.

Paper: Voita et al., "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be
Pruned", ACL 2019, section 5.1.
Behaviour: lena-voita/the-story-of-heads, `lib/layers/attn.py` (combined and use_kv formats, concrete and fixed gates)
and `lib/layers/concrete_gate.py`, evaluation: logistic function without temperature, stretched and clipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W + self.b


class _ConcreteGate(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(1, heads, 1, 1))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        stretched = torch.sigmoid(self.log_a) * 1.2 - 0.1
        return values * torch.clip(stretched, 0.0, 1.0)


class _FixedGate(nn.Module):
    def __init__(self, alive: Sequence[int]) -> None:
        super().__init__()
        self.alive = list(alive)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * values.new_tensor(self.alive).view(1, -1, 1, 1)


class GatedHeadAttention(nn.Module):
    """Every head is computed, then multiplied by its gate.

    Args:
        embed_dim: E.
        num_heads: h.
        cross: format with a separate query matrix.
        alive: fixed gates.
    """

    def __init__(self, embed_dim: int, num_heads: int, cross: bool = False, alive: Sequence[int] | None = None) -> None:
        super().__init__()
        self.heads = num_heads
        self.depth = embed_dim
        if cross:
            self.query_conv = _Dense(embed_dim, embed_dim)
        self.mem_conv = _Dense(embed_dim, 2 * embed_dim if cross else 3 * embed_dim)
        self.out_conv = _Dense(embed_dim, embed_dim)
        self.gate: nn.Module = _ConcreteGate(num_heads) if alive is None else _FixedGate(alive)

    def forward(self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within (B, T, E); mask (B, T), true is forbidden."""
        q, k, v = torch.split(self.mem_conv(x), self.depth, dim=2)
        return self._core(q, k, v, key_padding_mask)

    def cross(
        self, query: torch.Tensor, memory: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from (B, T, E) to (B, S, E); mask (B, S), true is forbidden."""
        k, v = torch.split(self.mem_conv(memory), self.depth, dim=2)
        return self._core(self.query_conv(query), k, v, key_padding_mask)

    def _core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        q = self._split(q) / math.sqrt(self.depth / self.heads)
        logits = torch.matmul(q, self._split(k).permute(0, 1, 3, 2))
        if key_padding_mask is not None:
            logits = logits.masked_fill(key_padding_mask[:, None, None], float("-inf"))
        heads = self.gate(torch.matmul(torch.softmax(logits, dim=-1), self._split(v)))
        joined: torch.Tensor = self.out_conv(heads.permute(0, 2, 1, 3).flatten(2))
        return joined

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)
