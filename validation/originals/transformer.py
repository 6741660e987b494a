"""Encoder and decoder layers of the Transformer, originals.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sections 3.1 and 3.3.
Behaviour: torch.nn.TransformerEncoderLayer and TransformerDecoderLayer, evaluation mode, without their fast path;
harvardnlp/annotated-transformer for the norm with the unbiased standard deviation.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.validation.originals.multi_head import MultiHeadAttention


class _AnnotatedNorm(nn.Module):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(x, dim=-1, keepdim=True, correction=1)
        return (x - mean) * self.weight / (std + self.eps) + self.bias


def _norm(channels: int, eps: float, bias: bool, unbiased: bool) -> nn.Module:
    return _AnnotatedNorm(channels, eps) if unbiased else nn.LayerNorm(channels, eps, bias=bias)


class _FeedForward(nn.Module):
    def __init__(self, d_model: int, dim_feedforward: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias)
        self.act: nn.Module = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]()

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.linear2(self.act(self.linear1(x)))
        return hidden


class TransformerEncoderLayer(_FeedForward):
    """x = LN1(x + SA(x)); x = LN2(x + FF(x)); or, norm first, x = x + SA(LN1(x)); x = x + FF(LN2(x)).

    Args:
        d_model: channels.
        nhead: heads.
        dim_feedforward: hidden channels of FF.
        activation: "relu" or "gelu".
        layer_norm_eps: epsilon of the norms.
        norm_first: pre-norm.
        bias: of matrices and norms.
        attention_bias: of the attention; as bias when None.
        separate: one nn.Linear per role in the attention.
        unbiased_norm: the annotated Transformer's norm.
        causal: position t sees positions 0..t only.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        attention_bias: bool | None = None,
        separate: bool = False,
        unbiased_norm: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(d_model, dim_feedforward, activation, bias)
        with_bias = bias if attention_bias is None else attention_bias
        self.self_attn = MultiHeadAttention(d_model, nhead, bias=with_bias, separate=separate, causal=causal)
        self.norm1 = _norm(d_model, layer_norm_eps, bias, unbiased_norm)
        self.norm2 = _norm(d_model, layer_norm_eps, bias, unbiased_norm)
        self.norm_first = norm_first

    def forward(
        self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map (B, T, E) to (B, T, E)."""
        if self.norm_first:
            x = x + self.self_attn(self.norm1(x), key_padding_mask, attn_mask)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.self_attn(x, key_padding_mask, attn_mask))
        out: torch.Tensor = self.norm2(x + self.feed(x))
        return out


class TransformerDecoderLayer(_FeedForward):
    """Self-attention, attention to the memory, FF; norms 1, 2, 3 in that order.

    Args:
        d_model: channels.
        nhead: heads.
        dim_feedforward: hidden channels of FF.
        activation: "relu" or "gelu".
        layer_norm_eps: epsilon of the norms.
        norm_first: pre-norm.
        bias: of matrices and norms.
        attention_bias: of the attentions; as bias when None.
        separate: one nn.Linear per role in the attentions.
        unbiased_norm: the annotated Transformer's norm.
        causal: position t of the sequence sees positions 0..t only.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        attention_bias: bool | None = None,
        separate: bool = False,
        unbiased_norm: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__(d_model, dim_feedforward, activation, bias)
        with_bias = bias if attention_bias is None else attention_bias
        self.self_attn = MultiHeadAttention(d_model, nhead, bias=with_bias, separate=separate, causal=causal)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, bias=with_bias, separate=separate)
        self.norm1 = _norm(d_model, layer_norm_eps, bias, unbiased_norm)
        self.norm2 = _norm(d_model, layer_norm_eps, bias, unbiased_norm)
        self.norm3 = _norm(d_model, layer_norm_eps, bias, unbiased_norm)
        self.norm_first = norm_first

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, T, E) with a memory (B, S, E) to (B, T, E)."""
        if self.norm_first:
            x = tgt + self.self_attn(self.norm1(tgt), tgt_key_padding_mask, tgt_mask)
            x = x + self.multihead_attn.cross(self.norm2(x), memory, memory_key_padding_mask, memory_mask)
            return x + self.feed(self.norm3(x))
        x = self.norm1(tgt + self.self_attn(tgt, tgt_key_padding_mask, tgt_mask))
        x = self.norm2(x + self.multihead_attn.cross(x, memory, memory_key_padding_mask, memory_mask))
        out: torch.Tensor = self.norm3(x + self.feed(x))
        return out
