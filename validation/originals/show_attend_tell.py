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


class StackedShowAttendTell(nn.Module):
    """The decoder of capgen.py; every parameter has its name and shape there.

    Args:
        ctx_dim: E.
        dim: D.
        dim_word: W.
        n_words: V.
        n_layers_att: layers of the projected context.
        n_layers_init: layers of the first state.
        n_layers_out: layers of the readout.
        prev2out: word in the readout.
        ctx2out: context in the readout.
        selector: scalar gate.
        use_dropout: dropout, which halves in evaluation.
        use_dropout_lstm: the same for the gates.
        hard: one-hot attention at the maximum.
        steps: words of `forward`.
    """

    def __init__(
        self,
        ctx_dim: int = 512,
        dim: int = 1800,
        dim_word: int = 512,
        n_words: int = 10000,
        n_layers_att: int = 2,
        n_layers_init: int = 2,
        n_layers_out: int = 1,
        prev2out: bool = True,
        ctx2out: bool = True,
        selector: bool = True,
        use_dropout: bool = True,
        use_dropout_lstm: bool = False,
        hard: bool = False,
        steps: int = 20,
    ) -> None:
        super().__init__()
        self.dim, self.steps, self.hard = dim, steps, hard
        self.n_layers_att, self.n_layers_init, self.n_layers_out = n_layers_att, n_layers_init, n_layers_out
        self.prev2out, self.ctx2out, self.selector = prev2out, ctx2out, selector
        self.use_dropout, self.use_dropout_lstm = use_dropout, use_dropout_lstm
        shapes: dict[str, tuple[int, ...]] = {"Wemb": (n_words, dim_word)}
        for k in range(1, n_layers_init):
            shapes |= {f"ff_init_{k}_W": (ctx_dim, ctx_dim), f"ff_init_{k}_b": (ctx_dim,)}
        shapes |= {"ff_state_W": (ctx_dim, dim), "ff_state_b": (dim,)}
        shapes |= {"ff_memory_W": (ctx_dim, dim), "ff_memory_b": (dim,)}
        shapes |= {"decoder_W": (dim_word, 4 * dim), "decoder_U": (dim, 4 * dim), "decoder_b": (4 * dim,)}
        shapes |= {"decoder_Wc": (ctx_dim, 4 * dim), "decoder_Wc_att": (ctx_dim, ctx_dim)}
        shapes |= {"decoder_Wd_att": (dim, ctx_dim), "decoder_b_att": (ctx_dim,)}
        for k in range(1, n_layers_att):
            shapes |= {f"decoder_W_att_{k}": (ctx_dim, ctx_dim), f"decoder_b_att_{k}": (ctx_dim,)}
        shapes |= {"decoder_U_att": (ctx_dim, 1), "decoder_c_tt": (1,)}
        if selector:
            shapes |= {"decoder_W_sel": (dim, 1), "decoder_b_sel": ()}
        shapes |= {"ff_logit_lstm_W": (dim, dim_word), "ff_logit_lstm_b": (dim_word,)}
        if ctx2out:
            shapes |= {"ff_logit_ctx_W": (ctx_dim, dim_word), "ff_logit_ctx_b": (dim_word,)}
        for k in range(1, n_layers_out):
            shapes |= {f"ff_logit_h{k}_W": (dim_word, dim_word), f"ff_logit_h{k}_b": (dim_word,)}
        shapes |= {"ff_logit_W": (dim_word, n_words), "ff_logit_b": (n_words,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def _ff(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        return x @ self.get_parameter(f"{prefix}_W") + self.get_parameter(f"{prefix}_b")

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 if self.use_dropout else x

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return words (B, T), logits (B, T, V) and weights (B, T, N) for features (B, N, E)."""
        average = features.mean(dim=1)
        for k in range(1, self.n_layers_init):
            average = self._dropout(F.relu(self._ff(average, f"ff_init_{k}")))
        h, c = torch.tanh(self._ff(average, "ff_state")), torch.tanh(self._ff(average, "ff_memory"))
        keys = features @ self.get_parameter("decoder_Wc_att") + self.get_parameter("decoder_b_att")
        for k in range(1, self.n_layers_att):
            weight, bias = self.get_parameter(f"decoder_W_att_{k}"), self.get_parameter(f"decoder_b_att_{k}")
            keys = torch.tanh(keys @ weight + bias)
        embedded = features.new_zeros(features.shape[0], self.get_parameter("Wemb").shape[1])
        words, predictions, weights = [], [], []
        for _ in range(self.steps):
            scores, h, c, alpha = self.step(features, keys, embedded, h, c)
            word = torch.argmax(scores, dim=1)
            embedded = self.get_parameter("Wemb")[word]
            words.append(word)
            predictions.append(scores)
            weights.append(alpha)
        return torch.stack(words, 1), torch.stack(predictions, 1), torch.stack(weights, 1)

    def step(
        self, features: torch.Tensor, keys: torch.Tensor, word: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (B, V), h, c (B, D) and alpha (B, N)."""
        hidden = torch.tanh(keys + (h @ self.get_parameter("decoder_Wd_att"))[:, None, :])
        alpha = F.softmax(
            (hidden @ self.get_parameter("decoder_U_att") + self.get_parameter("decoder_c_tt"))[:, :, 0], dim=1
        )
        weight = F.one_hot(alpha.argmax(dim=1), alpha.shape[1]).to(alpha) if self.hard else alpha
        context = (features * weight[:, :, None]).sum(dim=1)
        if self.selector:
            context = (
                torch.sigmoid(h @ self.get_parameter("decoder_W_sel") + self.get_parameter("decoder_b_sel")) * context
            )
        preact = (
            h @ self.get_parameter("decoder_U")
            + (word @ self.get_parameter("decoder_W") + self.get_parameter("decoder_b"))
            + context @ self.get_parameter("decoder_Wc")
        )
        i, f, o, g = preact.split(self.dim, dim=1)
        if self.use_dropout_lstm:
            i, f, o = i * 0.5, f * 0.5, o * 0.5
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        logit = self._ff(self._dropout(h), "ff_logit_lstm")
        if self.prev2out:
            logit = logit + word
        if self.ctx2out:
            logit = logit + self._ff(context, "ff_logit_ctx")
        logit = self._dropout(torch.tanh(logit))
        for k in range(1, self.n_layers_out):
            logit = self._dropout(F.relu(self._ff(logit, f"ff_logit_h{k}")))
        return self._ff(logit, "ff_logit"), h, c, alpha
