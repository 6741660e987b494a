"""Multi-head attention with hard-concrete gates on its heads; closed heads are removed at export.

Paper: Voita et al., "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be
Pruned", ACL 2019 (arXiv 1905.09418); gates of Louizos et al. (arXiv 1712.01312).
Code: https://github.com/lena-voita/the-story-of-heads, `lib/layers/attn.py` and `concrete_gate.py` (TensorFlow).

    out = sum_h g_h head_h W_o,h + b_o      head_h = softmax(q_h k_h^T / sqrt(d) + mask) v_h
    g_h = clip(1.2 sigmoid(log_a_h) - 0.1, 0, 1)

Evaluation knows neither noise nor temperature. g is 0 exactly for log_a <= -ln 11 = -2.398, 1 exactly for log_a >=
ln 11, and a fraction in between. At export the matrices lose the rows and columns of every head with g = 0, and W_o,h
carries the other gates; d stays what it was before. Without any head the result is b_o at every position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.multi_head import (
    PRECISION,
    SEQUENCE_SIZES,
    Affine,
    FoldedAttention,
    HeadedAttention,
    largest_of_attention,
)
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant

STRETCH = (-0.1, 1.1)
"""What the logistic function is stretched to before it is clipped to 0..1."""


class _Dense(nn.Module):
    """State of the published matrices: `W` (in, out) and `b` (out,), y = x W + b."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_normal_(torch.empty(inputs, outputs)))
        self.b = nn.Parameter(torch.zeros(outputs))

    def columns(self, start: int, stop: int) -> Affine:
        """Return the projection to some of the outputs."""
        return self.W[:, start:stop].t(), self.b[start:stop]


class _Gate(nn.Module):
    """State of the learned gates: `log_a` (1, heads, 1, 1)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(1, heads, 1, 1))


class GatedHeadAttention(HeadedAttention):
    """Multi-head attention whose heads have a gate each.

    State names and shapes are those of the TensorFlow variables, matrices (in, out): `mem_conv.{W,b}` (queries, keys,
    values; keys and values where `cross`), `query_conv.{W,b}` (only where `cross`), `out_conv.{W,b}`, and `gate.log_a`
    (1, num_heads, 1, 1) unless `alive` is given. The original's mask is 1 where a key is allowed; here true is
    forbidden.

    Args:
        embed_dim: channels of queries, memory and result.
        num_heads: heads; divides embed_dim.
        cross: the queries have a matrix of their own, as in attention to an encoder.
        alive: per head 1 or 0 instead of a learned gate.

    Raises:
        ValueError: num_heads does not divide embed_dim, or `alive` is not one 0 or 1 for every head.
    """

    def __init__(self, embed_dim: int, num_heads: int, cross: bool = False, alive: Sequence[int] | None = None) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}. Give a divisor of embed_dim, which is {embed_dim}.")
        if alive is not None and (len(alive) != num_heads or not set(alive) <= {0, 1}):
            raise ValueError(f"alive is {alive}. Give 0 or 1 for each of the {num_heads} heads.")
        super().__init__(num_heads, (embed_dim // num_heads) ** -0.5, causal=False)
        self.embed_dim = embed_dim
        self.query_conv = _Dense(embed_dim, embed_dim) if cross else None
        self.mem_conv = _Dense(embed_dim, (2 if cross else 3) * embed_dim)
        self.out_conv = _Dense(embed_dim, embed_dim)
        self.gate = _Gate(num_heads) if alive is None else None
        self.alive = alive

    def projections(self) -> tuple[Affine, Affine, Affine]:
        """Return the projections to queries, keys and values."""
        size = self.embed_dim
        if self.query_conv is None:
            query, start = self.mem_conv.columns(0, size), size
        else:
            query, start = self.query_conv.columns(0, size), 0
        return query, self.mem_conv.columns(start, start + size), self.mem_conv.columns(start + size, start + 2 * size)

    def output(self) -> Affine:
        """Return the output projection."""
        return self.out_conv.columns(0, self.embed_dim)

    def gates(self) -> torch.Tensor:
        """Return the gates of evaluation (num_heads,)."""
        if self.gate is None:
            return torch.tensor(self.alive, dtype=self.out_conv.W.dtype, device=self.out_conv.W.device)
        low, high = STRETCH
        return (self.gate.log_a.flatten().sigmoid() * (high - low) + low).clamp(0, 1)

    def prepare_for_export(self) -> nn.Module:
        """Return attention of the heads that are left, or the constant that is left without heads."""
        return FoldedAttention(self) if bool(self.gates().any()) else ConstantAttention(self.out_conv.b)


class ConstantAttention(nn.Module):
    """What is left of an attention without heads: its output bias at every position.

    Args:
        bias: (channels,).
    """

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Return the bias for every position of (batch, length, channels)."""
        return x * 0 + self.bias  # keeps the graph's input, which a constant would lose

    def cross(self, query: torch.Tensor, memory: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Return the bias for every position of the queries."""
        return self.forward(query)


_SMALL = {"embed_dim": 12, "num_heads": 3}
_QUERY = TensorInput("query", ("batch", "length", "embed_dim"))
_CROSS = (
    _QUERY,
    TensorInput("memory", ("batch", "memory", "embed_dim")),
    TensorInput("key_padding_mask", ("batch", "memory"), "mask"),
)
_KEYS = {
    r"^.*/(mem_conv|query_conv|out_conv)/([Wb])(:0)?$": r"\1.\2",
    r"^.*/gate/log_a(:0)?$": "gate.log_a",
}

BLOCKS.add(
    BlockSpec(
        name="pruned-heads",
        title="multi-head attention with pruned heads",
        paper="Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, ACL 2019",
        year=2019,
        code="https://github.com/lena-voita/the-story-of-heads",
        build=GatedHeadAttention,
        original="edgeattn.validation.originals.pruned_heads:GatedHeadAttention",
        variants=(
            Variant(
                "official",
                _SMALL,
                key_map=_KEYS,
                published=Published(
                    "Transformer base, WMT: sentences of 128 sub-words, all heads fractional",
                    {"embed_dim": 512, "num_heads": 8},
                    {"batch": 1, "length": 128, "memory": 128},
                ),
                overflow=Overflow(600.0, SEQUENCE_SIZES[0]),
            ),
            Variant("cross", {**_SMALL, "cross": True}, key_map=_KEYS, inputs=_CROSS, method="cross"),
            Variant(
                "fixed",
                {**_SMALL, "alive": (1, 1, 0)},
                key_map=_KEYS,
                published=Published(
                    "Transformer base, WMT: sentences of 128 sub-words, 3 of 8 heads left",
                    {"embed_dim": 512, "num_heads": 8, "alive": (0, 1, 0, 0, 1, 0, 1, 0)},
                    {"batch": 1, "length": 128, "memory": 128},
                ),
            ),
            Variant("headless", {**_SMALL, "alive": (0, 0, 0)}, key_map=_KEYS),
        ),
        largest=lambda arguments, sizes: largest_of_attention(arguments["embed_dim"], arguments["num_heads"], sizes),
        precision=PRECISION,
        int8="the linear layers; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "length", "embed_dim")),),
        sizes=SEQUENCE_SIZES,
    )
)
