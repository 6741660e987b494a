"""Synthesizer, original.

Paper: Tay et al., "Synthesizer: Rethinking Self-Attention for Transformer Models", ICML 2021, section 3.
Behaviour: tensorflow/mesh, `mesh_tensorflow/transformer/attention.py`; leaderj1001's `synthesizer.py`; 10-zin's
`sub_layers.py` and `modules.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Synthesizer(nn.Module):
    """softmax(S) V with one head.

    Args:
        in_dims: d.
        sentence_length: l.
        mode: "dense", "random", "factorized_dense", "factorized_random", "mixture" (R + Q K^T) or "low_rank" (Q K^T).
        a: first factor of l.
        rank: columns of R1 and R2, or channels of queries and keys.
        softmax: whether there is one, for "random".
        tile_both: both factors repeat as wholes, for "factorized_dense".
    """

    def __init__(
        self,
        in_dims: int,
        sentence_length: int,
        mode: str = "dense",
        a: int = 4,
        rank: int = 8,
        softmax: bool = True,
        tile_both: bool = False,
    ) -> None:
        super().__init__()
        n = sentence_length
        self.mode, self.softmax, self.tile_both = mode, softmax, tile_both
        self.a, self.b = a, n // a
        if mode == "dense":
            self.dense = nn.Sequential(nn.Linear(in_dims, n), nn.ReLU(), nn.Linear(n, n))
        elif mode == "factorized_dense":
            self.a_proj, self.b_proj = nn.Linear(in_dims, self.a), nn.Linear(in_dims, self.b)
        elif mode == "factorized_random":
            self.R1, self.R2 = nn.Parameter(torch.zeros(n, rank)), nn.Parameter(torch.zeros(n, rank))
        if mode in ("random", "mixture"):
            self.attention = nn.Parameter(torch.zeros(1, n, n))
        if mode in ("low_rank", "mixture"):
            channels = {"low_rank": rank, "mixture": in_dims}[mode]
            self.query_fc, self.key_fc = nn.Linear(in_dims, channels), nn.Linear(in_dims, channels)
        self.value_fc = nn.Linear(in_dims, in_dims)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (B, L, d) and weights (B or 1, L, L) for x (B, L, d)."""
        length = x.size(1)
        energy = self.energy(x)[:, :length, :length]
        attention = torch.softmax(energy, dim=-1) if self.softmax else energy
        return torch.matmul(attention, self.value_fc(x)), attention

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Return S, as long as the tables are."""
        if self.mode == "random":
            return self.attention
        if self.mode == "factorized_random":
            return torch.matmul(self.R1, self.R2.t()).unsqueeze(0)
        if self.mode == "dense":
            return self.dense(x)
        if self.mode == "factorized_dense":
            a, b = self.a_proj(x), self.b_proj(x)
            tiled = a.repeat(1, 1, self.b) if self.tile_both else a.repeat_interleave(self.b, dim=2)
            return tiled * b.repeat(1, 1, self.a)
        products = torch.bmm(self.query_fc(x), self.key_fc(x).permute(0, 2, 1))
        if self.mode == "low_rank":
            return products
        return self.attention[:, : x.size(1), : x.size(1)] + products


class MultiHeadSynthesizer(nn.Module):
    """synthetic_attention between the projections q, k, v (or kv) and o; variables are (inputs, outputs).

    Args:
        d_model: d.
        num_heads: heads.
        d_kv: channels per head.
        mode: synthesize_mode; "factorized" in the paper's form R1 R2^T.
        max_length: l.
        rank: factorized_dim.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_kv: int,
        mode: str = "random_plus_alpha",
        max_length: int = 512,
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.mode, self.heads = mode, num_heads

        def variable(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        plus = "plus" in mode
        if plus:
            self.k, self.v = (variable(d_model, num_heads * d_kv) for _ in range(2))
        else:
            self.kv = variable(d_model, num_heads * d_kv)
        if plus or mode == "dense_minus":
            self.q = variable(d_model, num_heads * d_kv)
        self.o = variable(num_heads * d_kv, d_model)
        if mode.startswith("random"):
            self.R = variable(max_length, num_heads, max_length)
        elif mode.startswith("dense"):
            self.pi = variable(d_kv, max_length)
        else:
            self.R1, self.R2 = (variable(rank, num_heads, max_length) for _ in range(2))
        if mode.endswith("alpha"):
            self.alpha = variable(1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, L, d) for x (B, L, d) and a mask (B, L) that is true where nothing may be read."""
        batch, length, _ = x.shape

        def heads(matrix: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, matrix).view(batch, length, self.heads, -1).permute(0, 2, 1, 3)

        if self.mode.startswith("random"):
            synthetic = self.R[:length, :, :length].permute(1, 0, 2).unsqueeze(0)
        elif self.mode.startswith("dense"):
            synthetic = torch.matmul(torch.relu(heads(self.q)), self.pi)[..., :length]
        else:
            rows, columns = self.R1[:, :, :length], self.R2[:, :, :length]
            synthetic = torch.matmul(rows.permute(1, 2, 0), columns.permute(1, 0, 2)).unsqueeze(0)
        logits = synthetic
        if "plus" in self.mode:
            products = torch.matmul(heads(self.q), heads(self.k).transpose(2, 3))
            if self.mode.endswith("alpha"):
                alpha = torch.sigmoid(self.alpha)
                logits = (1 - alpha) * products + alpha * synthetic
            else:
                logits = products + synthetic
        if mask is not None:
            logits = logits.masked_fill(mask.view(batch, 1, 1, length), -float("inf"))
        outputs = torch.matmul(torch.softmax(logits, dim=-1), heads(self.v if "plus" in self.mode else self.kv))
        return torch.matmul(outputs.permute(0, 2, 1, 3).reshape(batch, length, -1), self.o)


class _DenseAttention(nn.Module):
    """Two layers from a head's query to its energies."""

    def __init__(self, max_seq_len: int, d_k: int, d_hid: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d_k, d_hid)
        self.w_2 = nn.Linear(d_hid, max_seq_len)

    def forward(self, q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        energies = self.w_2(F.relu(self.w_1(q)))[:, :, :, : q.size(2)]
        if mask is not None:
            energies = energies.masked_fill(mask, -float("inf"))
        weights = F.softmax(energies, dim=-1)
        return torch.matmul(weights, v), weights


class DenseSynthesizerLayer(nn.Module):
    """MultiHeadAttention of 10-zin with attn_type "dense".

    Args:
        max_seq_len: l.
        n_head: heads.
        d_model: features.
        d_k: channels of a query.
        d_v: channels of a value.
        d_hid: hidden channels.
    """

    def __init__(self, max_seq_len: int, n_head: int, d_model: int, d_k: int, d_v: int, d_hid: int = 64) -> None:
        super().__init__()
        self.n_head, self.d_k, self.d_v = n_head, d_k, d_v
        self.w_qs = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_vs = nn.Linear(d_model, n_head * d_v, bias=False)
        self.attention = _DenseAttention(max_seq_len, d_k, d_hid)
        self.fc = nn.Linear(n_head * d_v, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (B, L, d) and weights (B, heads, L, L) for x (B, L, d) and a mask (B, L)."""
        batch, length, _ = x.shape
        q = self.w_qs(x).view(batch, length, self.n_head, self.d_k).transpose(1, 2)
        v = self.w_vs(x).view(batch, length, self.n_head, self.d_v).transpose(1, 2)
        heads, weights = self.attention(q, v, None if mask is None else mask.view(batch, 1, 1, length))
        features = self.fc(heads.transpose(1, 2).contiguous().view(batch, length, -1))
        return self.layer_norm(features + x), weights
