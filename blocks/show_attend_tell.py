"""Show, attend and tell: a caption decoder that looks at the image anew for every word.

Paper: Xu et al., "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention", ICML 2015 (arXiv
1502.03044).
Code: https://github.com/kelvinxu/arctic-captions, `capgen.py` (Theano);
https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, `models.py`.

    energy_i = w^T relu(W_v v_i + W_h h)                          positions i, state (h, c)
    alpha    = softmax_i(energy_i)
    z        = sum_i alpha_i v_i          (soft)   or   v_i at the largest energy (hard)
    (h, c)  <- LSTM([word; sigmoid(W_beta h + b_beta) z], (h, c)),  logits = W_o h + b_o

The bias behind w cancels in the softmax. W_v v_i does not depend on the state: it is computed once per image (`keys`).
What the state is multiplied with is one matrix: attention, gate and LSTM share it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

ACTIVATIONS = ("relu", "tanh")


def _located(energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of the energy (batch, positions) and its largest position (batch, 1)."""
    return energy.softmax(dim=1), energy.argmax(dim=1, keepdim=True)


class _Attention(nn.Module):
    """The parameters of the attention; `full_att.bias` has no effect.

    Args:
        encoder_dim: features of a position.
        decoder_dim: features of the state.
        attention_dim: features in which they are compared.
    """

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)


class ShowAttendTell(nn.Module):
    """Caption decoder: one step at a time, or greedy with a fixed number of steps.

    State names are those of the torch code: `attention.encoder_att`, `attention.decoder_att`, `attention.full_att`,
    `embedding`, `decode_step` (an LSTMCell), `init_h`, `init_c`, `f_beta`, `fc`. Its checkpoints hold pickled modules;
    save the decoder's state_dict first.

    The Theano code differs in three options: `activation="tanh"`, `scalar_gate=True` and `tanh_init=True`. Its
    parameters need a conversion: matrices transposed, gates ordered i, f, o, g instead of i, f, g, o. Its deep output
    (tanh of h, word and z in front of the last layer) and its stacked attention layers are not built here.

    Hard attention is deterministic here: it takes the most probable position, which is the Theano code's `argmax` mode.
    By default the Theano code evaluates hard attention in expectation, which is soft attention. The sampled form, the
    doubly stochastic penalty and dropout belong to training.

    One graph per step: `keys` and `initial_state` run once per image, then `step` per word, with the state (h, c) as
    inputs and outputs. `forward` is the same unrolled. It always takes `steps` words; the caller cuts at the end token.

    Args:
        attention_dim: features in which positions and the state are compared.
        embed_dim: features of a word.
        decoder_dim: features of the state.
        vocab_size: number of words.
        encoder_dim: features of a position.
        hard: take the features of the most probable position instead of the expectation.
        activation: "relu" or "tanh", in front of w.
        scalar_gate: one gate for all features of z, instead of one each.
        tanh_init: the initial state passes tanh.
        steps: number of words that `forward` produces.
        start_token: index of the word in front of the first.

    Raises:
        ValueError: an unknown activation, no steps, or a start token outside the vocabulary.
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
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        if steps < 1:
            raise ValueError(f"steps has to be at least 1, got {steps}; captions of COCO have 20 words or fewer")
        if not 0 <= start_token < vocab_size:
            raise ValueError(
                f"start_token has to be in the vocabulary, 0 to {vocab_size - 1}, got {start_token}. "
                "Give the index of <start> in the word map."
            )
        self.attention_dim = attention_dim
        self.decoder_dim = decoder_dim
        self.encoder_dim = encoder_dim
        self.hard = hard
        self.activation = activation
        self.tanh_init = tanh_init
        self.steps = steps
        self.start_token = start_token
        self.gates = 1 if scalar_gate else encoder_dim
        self.attention = _Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, self.gates)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        self.locate = Fp32Step(_located)
        self.from_state: nn.Linear | None = None
        self.from_input: nn.Linear | None = None

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Describe images greedily: every word is the most probable one after the words before it.

        Args:
            features: (batch, positions, encoder_dim).

        Returns:
            Words (batch, steps), their logits (batch, steps, vocab_size) and attention (batch, steps, positions).
        """
        keys = self.keys(features)
        h, c = self.initial_state(features)
        word = self.embedding.weight[self.start_token].expand(features.shape[0], -1)
        tokens, scores, maps = [], [], []
        for _ in range(self.steps):
            logits, h, c, alpha = self.step(features, keys, word, h, c)
            token = logits.argmax(dim=1)
            word = self.embedding(token)
            tokens.append(token)
            scores.append(logits)
            maps.append(alpha)
        return torch.stack(tokens, dim=1), torch.stack(scores, dim=1), torch.stack(maps, dim=1)

    def keys(self, features: torch.Tensor) -> torch.Tensor:
        """Return the part of the energies that only depends on the image.

        Args:
            features: (batch, positions, encoder_dim).

        Returns:
            (batch, positions, attention_dim).
        """
        keys: torch.Tensor = self.attention.encoder_att(features)
        return keys

    def initial_state(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state in front of the first word.

        Args:
            features: (batch, positions, encoder_dim).

        Returns:
            h and c, each (batch, decoder_dim).
        """
        mean = features.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)
        return (h.tanh(), c.tanh()) if self.tanh_init else (h, c)

    def decode(
        self, features: torch.Tensor, keys: torch.Tensor, token: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take one step from the index of a word.

        Args:
            features: (batch, positions, encoder_dim).
            keys: (batch, positions, attention_dim), of `keys`.
            token: int64 (batch).
            h: (batch, decoder_dim).
            c: (batch, decoder_dim).

        Returns:
            See `step`.
        """
        return self.step(features, keys, self.embedding(token), h, c)

    def step(
        self, features: torch.Tensor, keys: torch.Tensor, word: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take one step from the embedding of a word.

        Args:
            features: (batch, positions, encoder_dim).
            keys: (batch, positions, attention_dim), of `keys`.
            word: (batch, embed_dim).
            h: (batch, decoder_dim).
            c: (batch, decoder_dim).

        Returns:
            Logits of the next word (batch, vocab_size), h and c after the step, and the attention (batch, positions),
            which is the softmax also where hard attention takes one position.
        """
        size, seen = self.decoder_dim, self.attention_dim
        projected = F.linear(h, *self._from_state()) if self.from_state is None else self.from_state(h)
        z, alpha = self._attend(features, keys, projected[:, :seen])
        z = projected[:, seen : seen + self.gates].sigmoid() * z
        recurrent = projected[:, seen + self.gates :]
        given = torch.cat([word, z], dim=1)
        gates = self._from_input(given) + recurrent
        sigmoids = gates[:, : 2 * size].sigmoid()
        cell = sigmoids[:, size:] * c + sigmoids[:, :size] * gates[:, 2 * size : 3 * size].tanh()
        state = gates[:, 3 * size :].sigmoid() * cell.tanh()
        return self.fc(state), state, cell, alpha

    def _attend(
        self, features: torch.Tensor, keys: torch.Tensor, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z (batch, encoder_dim) and alpha (batch, positions) for a query (batch, attention_dim)."""
        compared = keys + query.unsqueeze(1)
        compared = compared.relu() if self.activation == "relu" else compared.tanh()
        energy = torch.matmul(compared, self.attention.full_att.weight.t()).squeeze(2)
        if not self.hard:
            alpha = energy.softmax(dim=1)
            return torch.matmul(alpha.unsqueeze(1), features).squeeze(1), alpha
        alpha, position = self.locate(energy)
        index = position.unsqueeze(2).expand(-1, -1, self.encoder_dim)
        return features.gather(1, index).squeeze(1), alpha

    def _from_input(self, given: torch.Tensor) -> torch.Tensor:
        """Return what the LSTM's input (batch, embed_dim + encoder_dim) adds to its gates."""
        if self.from_input is not None:
            return self.from_input(given)
        return F.linear(given, self.decode_step.weight_ih, self.decode_step.bias_ih)

    def _from_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of all that the state is multiplied with: attention, gate, LSTM."""
        attention, gate, lstm = self.attention.decoder_att, self.f_beta, self.decode_step
        weight = torch.cat([attention.weight, gate.weight, lstm.weight_hh])
        return weight, torch.cat([attention.bias, gate.bias, lstm.bias_hh])

    def prepare_for_export(self) -> ShowAttendTell:
        """Return a copy with one matrix for the state, without the bias that cancels."""
        folded = copy.deepcopy(self)
        weight, bias = self._from_state()
        folded.from_state = _linear(weight, bias)
        folded.from_input = _linear(self.decode_step.weight_ih, self.decode_step.bias_ih)
        del folded.attention.decoder_att, folded.f_beta, folded.decode_step
        folded.attention.full_att.register_parameter("bias", None)
        return folded


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return a linear layer with copies of a weight and a bias."""
    layer = nn.Linear(1, 1)
    layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of what is compared and the projections of the state."""
    projected = arguments["attention_dim"] + arguments["encoder_dim"] + 4 * arguments["decoder_dim"]
    return sizes["batch"] * int(max(sizes["positions"] * arguments["attention_dim"], projected))


_SMALL: Arguments = {"attention_dim": 8, "embed_dim": 4, "decoder_dim": 6, "vocab_size": 11, "encoder_dim": 12}
_COCO: Arguments = {"attention_dim": 512, "embed_dim": 512, "decoder_dim": 512, "encoder_dim": 2048}
_STEP = (
    TensorInput("features", ("batch", "positions", "encoder_dim")),
    TensorInput("keys", ("batch", "positions", "attention_dim")),
    TensorInput("word", ("batch", "embed_dim")),
    TensorInput("h", ("batch", "decoder_dim")),
    TensorInput("c", ("batch", "decoder_dim")),
)
_KEYS = {r"^(decoder|module)\.": ""}

BLOCKS.add(
    BlockSpec(
        name="show-attend-tell",
        title="caption decoder with soft or hard attention",
        paper="Show, Attend and Tell: Neural Image Caption Generation with Visual Attention, ICML 2015",
        year=2015,
        code=(
            "https://github.com/kelvinxu/arctic-captions, "
            "https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning"
        ),
        build=ShowAttendTell,
        original="edgeattn.validation.originals.show_attend_tell:ShowAttendTell",
        variants=(
            Variant(
                "official",
                {**_SMALL, "activation": "tanh", "scalar_gate": True, "tanh_init": True, "steps": 3, "start_token": 2},
            ),
            Variant(
                "step",
                _SMALL,
                key_map=_KEYS,
                references={"sat_step": _SMALL},
                published=Published("ResNet-101 decoder, COCO 2014", _COCO, {"batch": 1, "positions": 196}),
                inputs=_STEP,
                method="step",
                overflow=Overflow(50.0, {"batch": 2, "positions": 7}, state={r"full_att": 1e5}),
            ),
            Variant(
                "greedy",
                {**_SMALL, "steps": 3, "start_token": 2},
                key_map=_KEYS,
                references={"sat_greedy": {**_SMALL, "steps": 4, "start_token": 2}},
            ),
            Variant("hard", {**_SMALL, "hard": True, "steps": 3}, key_map=_KEYS),
        ),
        largest=_largest,
        precision=(
            "the softmax with the energies, the choice of the hard position and the mean over positions stay in FP32"
        ),
        int8="the linear layers; the weighted sums stay in FP16",
        inputs=_STEP[:1],
        sizes=(
            {"batch": 2, "positions": 7},
            {"batch": 1, "positions": 12},
            {"batch": 3, "positions": 5},
            {"batch": 1, "positions": 1},
        ),
    )
)
