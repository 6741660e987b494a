"""Luong attention and decoder step, original: windows are gathered word by word, as in the published code.

Paper: Luong et al., "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015, sections 3.1 to
3.3. Behaviour: lmthang/nmt.matlab, `attnLayerForward.m`, `distLayerForward.m`, `buildSrcVecs.m`, `lstmUnitForward.m`;
for "mlp" OpenNMT-py, `onmt/modules/global_attention.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class LuongAttention(nn.Module):
    """tanh(W_h [c; h_t]) with c the weighted sum of the source's states.

    Args:
        size: L.
        score: "dot", "general", "concat" (W_a on h_t), "concat_both" (W_a on both) or "mlp" (OpenNMT).
        window: None, "monotonic" or "predictive".
        reach: D.
        position_size: rows of W_pos.
        gaussian_first: the option normLocalAttn.
        reverse: the option isReverse.
    """

    def __init__(
        self,
        size: int,
        score: str = "general",
        window: str | None = None,
        reach: int = 10,
        position_size: int | None = None,
        gaussian_first: bool = False,
        reverse: bool = True,
    ) -> None:
        super().__init__()
        self.score, self.window, self.reach = score, window, reach
        self.gaussian_first, self.reverse = gaussian_first, reverse
        if score != "dot":
            self.W_a = nn.Parameter(torch.zeros(size, 2 * size if score == "concat_both" else size))
        if score in ("concat", "concat_both", "mlp"):
            self.v_a = nn.Parameter(torch.zeros(1, size))
        if score == "mlp":
            self.U_a = nn.Parameter(torch.zeros(size, size))
            self.b_a = nn.Parameter(torch.zeros(size))
            self.b_h = nn.Parameter(torch.zeros(size))
        if window == "predictive":
            self.W_pos = nn.Parameter(torch.zeros(position_size or size, size))
            self.v_pos = nn.Parameter(torch.zeros(1, position_size or size))
        self.W_h = nn.Parameter(torch.zeros(size, 2 * size))

    def forward(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attentional vectors (B, T, L) and weights (B, T, M) for h_t (B, T, L) and h_s (B, M, L)."""
        batch, targets, size = query.shape
        length = memory.shape[1]
        if self.window is None:
            scores = self.compare(query, memory)
            if mask is not None:
                scores = scores.masked_fill(mask.unsqueeze(1), -float("inf"))
            weights = torch.softmax(scores.view(batch * targets, length), -1).view(batch, targets, length)
            context = torch.bmm(weights, memory)
        else:
            weights, context = self.local(query, memory, mask, position)
        both = torch.cat([context, query], 2).view(batch * targets, 2 * size)
        if self.score == "mlp":
            return torch.addmm(self.b_h, both, self.W_h.t()).view(batch, targets, size), weights
        return torch.tanh(both @ self.W_h.t()).view(batch, targets, size), weights

    def compare(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, T, M) of h_t (B, T, L) with h_s (B, M, L)."""
        if self.score in ("dot", "general"):
            if self.score == "general":
                query = query @ self.W_a.t()
            return torch.bmm(query, states.transpose(1, 2))
        batch, targets, size = query.shape
        length = states.shape[1]
        if self.score == "mlp":
            query, states = query @ self.W_a.t() + self.b_a, states @ self.U_a.t()
        elif self.score == "concat":
            query = query @ self.W_a.t()
        rows = query.view(batch, targets, 1, size).expand(batch, targets, length, size)
        columns = states.view(batch, 1, length, size).expand(batch, targets, length, size)
        if self.score == "concat_both":
            hidden = torch.tanh(torch.cat([rows, columns], 3) @ self.W_a.t())
        else:
            hidden = torch.tanh(rows + columns)
        return (hidden @ self.v_a.t()).view(batch, targets, length)

    def local(
        self, query: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None, position: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the 2 D + 1 states around each centre, and attend to them."""
        batch, targets, size = query.shape
        length = memory.shape[1]
        if mask is None:
            mask = memory[:, :, 0] != memory[:, :, 0]
        count = torch.logical_not(mask).to(query.dtype).sum(1).view(batch, 1)  # S - 1
        if self.window == "monotonic":
            assert position is not None
            mu = torch.where(position > count, count.expand_as(position), position)
            first = torch.ceil(mu) - self.reach  # of an integer, itself
            last = torch.floor(mu) + self.reach
        else:
            scale = torch.sigmoid(torch.tanh(query @ self.W_pos.t()) @ self.v_pos.t()).squeeze(2)
            mu = scale * count + 1
            first = torch.floor(mu) - self.reach
            last = first + 2 * self.reach
        steps = torch.arange(2 * self.reach + 1, device=query.device).to(query.dtype)
        places = first.unsqueeze(2) + steps  # numbers of words, (B, T, 2 D + 1)
        index = length - places if self.reverse else places - 1
        inside = (places <= last.unsqueeze(2)) & (index >= 0) & (index <= length - 1)
        index = torch.where(inside, index, torch.zeros_like(index)).long()
        flat = index.view(batch, -1)
        inside = inside & torch.logical_not(torch.gather(mask, 1, flat)).view(index.shape)
        states = torch.gather(memory, 1, flat.unsqueeze(2).expand(-1, -1, size))
        pairs = states.view(batch * targets, -1, size)
        scores = self.compare(query.reshape(batch * targets, 1, size), pairs).view(index.shape)
        gaussian = torch.exp(-0.5 * ((places - mu.unsqueeze(2)) / (self.reach / 2.0)) ** 2)
        if self.gaussian_first:
            scores = scores * gaussian
        scores = torch.where(inside, scores, torch.zeros_like(scores))
        exponentials = torch.exp(scores - scores.max(2, keepdim=True)[0]) * inside
        total = exponentials.sum(2, keepdim=True)
        window = exponentials / torch.where(total == 0, torch.ones_like(total), total)
        if self.window == "predictive" and not self.gaussian_first:
            window = window * gaussian
        context = torch.bmm(window.view(batch * targets, 1, -1), pairs).view(batch, targets, size)
        empty = torch.zeros(batch, targets, length, dtype=query.dtype, device=query.device)
        return empty.scatter_add(2, index, window), context


class LuongDecoder(LuongAttention):
    """LSTM layers and attention for one word; the last attentional vector is part of the input.

    Args:
        size: L.
        layers: number of LSTM layers.
        attention: further arguments of `LuongAttention`.
    """

    def __init__(self, size: int, layers: int = 4, **attention: int) -> None:
        super().__init__(size, **attention)  # type: ignore[arg-type]
        for layer in range(layers):
            columns = 2 * size if layer else 3 * size
            setattr(self, f"W_tgt_{layer + 1}", nn.Parameter(torch.zeros(4 * size, columns)))

    def forward(  # type: ignore[override]
        self,
        word: torch.Tensor,
        attentional: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the attentional vector (B, L), h and c (layers, B, L) and weights (B, M)."""
        x = torch.cat([word, attentional], 1)
        hidden, cells = [], []
        for layer in range(h.shape[0]):
            matrix = getattr(self, f"W_tgt_{layer + 1}")
            i, f, o, a = (torch.cat([x, h[layer]], 1) @ matrix.t()).chunk(4, 1)
            cell = torch.sigmoid(f) * c[layer] + torch.sigmoid(i) * torch.tanh(a)
            x = torch.sigmoid(o) * torch.tanh(cell)
            hidden.append(x.clamp(-50, 50))
            cells.append(cell.clamp(-50, 50))
        output, weights = super().forward(x.unsqueeze(1), memory, mask, position)
        return output.squeeze(1), torch.stack(hidden), torch.stack(cells), weights.squeeze(1)
