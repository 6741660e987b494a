"""Show, attend and tell, original.

Paper: Xu et al., "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention", ICML 2015, section 3.
Behaviour: sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, `models.py`; options: kelvinxu/arctic-captions, `capgen.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _Attention(nn.Module):
    """Three linear layers."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)


class ShowAttendTell(nn.Module):
    """Decoder with attention.

    Args:
        attention_dim: A.
        embed_dim: size of a word.
        decoder_dim: D.
        vocab_size: words.
        encoder_dim: E.
        hard: one-hot attention at the maximum.
        activation: "relu" or "tanh".
        scalar_gate: one gate per image.
        tanh_init: tanh on the first state.
        steps: words of `forward`.
        start_token: first word.
    """

    def __init__(
        self,
        attention_dim: int = 512,
        embed_dim: int = 512,
        decoder_dim: int = 512,
        vocab_size: int = 9490,
        encoder_dim: int = 2048,
        hard: bool = False,
        activation: str = "relu",
        scalar_gate: bool = False,
        tanh_init: bool = False,
        steps: int = 20,
        start_token: int = 0,
    ) -> None:
        super().__init__()
        self.hard, self.tanh, self.tanh_init = hard, activation == "tanh", tanh_init
        self.steps, self.start_token = steps, start_token
        self.attention = _Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, 1 if scalar_gate else encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return words (B, T), logits (B, T, V) and weights (B, T, N) for features (B, N, E)."""
        average = features.mean(dim=1)
        h, c = self.init_h(average), self.init_c(average)
        if self.tanh_init:
            h, c = torch.tanh(h), torch.tanh(c)
        word = torch.full((features.shape[0],), self.start_token, dtype=torch.long)
        words, predictions, weights = [], [], []
        for _ in range(self.steps):
            keys = self.attention.encoder_att(features)
            scores, h, c, alpha = self.step(features, keys, self.embedding(word), h, c)
            word = torch.argmax(scores, dim=1)
            words.append(word)
            predictions.append(scores)
            weights.append(alpha)
        return torch.stack(words, 1), torch.stack(predictions, 1), torch.stack(weights, 1)

    def step(
        self, features: torch.Tensor, keys: torch.Tensor, word: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (B, V), h, c (B, D) and alpha (B, N)."""
        hidden = keys + self.attention.decoder_att(h).unsqueeze(1)
        hidden = torch.tanh(hidden) if self.tanh else F.relu(hidden)
        alpha = F.softmax(self.attention.full_att(hidden).squeeze(2), dim=1)
        weight = F.one_hot(alpha.argmax(dim=1), alpha.shape[1]).to(alpha) if self.hard else alpha
        context = (features * weight.unsqueeze(2)).sum(dim=1)
        context = torch.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([word, context], dim=1), (h, c))
        return self.fc(h), h, c, alpha
