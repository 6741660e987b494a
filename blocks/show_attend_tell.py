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
What the state is multiplied with is one matrix: attention, gate and LSTM share it. The Theano code puts more layers in
front of the energies, the initial state and the logits; `StackedShowAttendTell` is that decoder.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

ACTIVATIONS = ("relu", "tanh")


def _located(energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of the energy (batch, positions) and its largest position (batch, 1)."""
    return energy.softmax(dim=1), energy.argmax(dim=1, keepdim=True)


def _seen(features: torch.Tensor, energy: torch.Tensor, locate: Fp32Step | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z (batch, encoder_dim) and alpha (batch, positions).

    Args:
        features: (batch, positions, encoder_dim).
        energy: (batch, positions).
        locate: `_located` for hard attention; None for soft attention.
    """
    if locate is None:
        alpha = energy.softmax(dim=1)
        return torch.matmul(alpha.unsqueeze(1), features).squeeze(1), alpha
    alpha, position = locate(energy)
    index = position.unsqueeze(2).expand(-1, -1, features.shape[2])
    return features.gather(1, index).squeeze(1), alpha


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

    The paper's equations without its deep output are the options `activation="tanh"`, `scalar_gate=True` and
    `tanh_init=True`. Parameters of the Theano code load into `StackedShowAttendTell`.

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
        return _seen(features, energy, self.locate if self.hard else None)

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


class StackedShowAttendTell(nn.Module):
    """The caption decoder of the Theano code, with all its layers.

        keys    = tanh(... tanh((v W_a + b_a) W_1 + b_1) ...)          n_layers_att layers, the first without tanh
        (h, c)  = tanh(F W_s + b_s), tanh(F W_m + b_m)                 F: n_layers_init - 1 relu layers of the mean of v
        logits  = L(R(tanh(h W_h + word + z W_z + b)))                 R: n_layers_out - 1 relu layers; z is gated

    State names and shapes are those of its archives, matrices as (in, out), gates in the order i, f, o, g: `Wemb`,
    `ff_init_k_*`, `ff_state_*`, `ff_memory_*`, `decoder_{W,U,b,Wc,Wc_att,Wd_att,b_att,W_att_k,b_att_k,U_att,c_tt,
    W_sel,b_sel}`, `ff_logit_lstm_*`, `ff_logit_ctx_*`, `ff_logit_hk_*`, `ff_logit_*`. An archive is an npz file: save
    its arrays under their names as safetensors first. `history_errs` is the one array that is no parameter.

    Its dropout does not rescale in training: in evaluation it halves what it passes. That factor belongs to the
    following matrix in an export, as do all matrices of one input to each other. More than one LSTM and the LSTM over
    the positions (`n_layers_lstm`, `lstm_encoder`), untested there, are not built.

    The word in front of the first has the embedding zero. Hard attention is the code's `argmax` mode; without it, hard
    attention is evaluated in expectation, which is soft attention.

    Args:
        ctx_dim: features of a position, and those in which positions and the state are compared.
        dim: features of the state.
        dim_word: features of a word.
        n_words: number of words.
        n_layers_att: layers of the keys.
        n_layers_init: layers of the initial state.
        n_layers_out: layers between the deep output and the logits.
        prev2out: the deep output sees the previous word.
        ctx2out: the deep output sees z.
        selector: z has a gate, one number.
        use_dropout: the network was trained with dropout.
        use_dropout_lstm: the network was trained with dropout on the gates i, f, o.
        hard: take the features of the most probable position instead of the expectation.
        steps: number of words that `forward` produces.

    Raises:
        ValueError: no layers or no steps.
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
        counts = {
            "n_layers_att": n_layers_att,
            "n_layers_init": n_layers_init,
            "n_layers_out": n_layers_out,
            "steps": steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} has to be at least 1, got {count}")
        self.ctx_dim, self.dim, self.dim_word, self.steps = ctx_dim, dim, dim_word, steps
        self.layers_att, self.layers_init, self.layers_out = n_layers_att, n_layers_init, n_layers_out
        self.prev2out, self.ctx2out, self.selector, self.hard = prev2out, ctx2out, selector, hard
        self.kept = 0.5 if use_dropout else 1.0
        self.gates_kept = 0.5 if use_dropout_lstm else 1.0
        self._add("Wemb", n_words, dim_word)
        for layer in range(1, n_layers_init):
            self._add_layer(f"ff_init_{layer}", ctx_dim, ctx_dim)
        self._add_layer("ff_state", ctx_dim, dim)
        self._add_layer("ff_memory", ctx_dim, dim)
        for name, rows in (("W", dim_word), ("U", dim), ("Wc", ctx_dim)):
            self._add(f"decoder_{name}", rows, 4 * dim)
        self._add("decoder_b", 4 * dim)
        self._add("decoder_Wc_att", ctx_dim, ctx_dim)
        self._add("decoder_Wd_att", dim, ctx_dim)
        self._add("decoder_b_att", ctx_dim)
        for layer in range(1, n_layers_att):
            self._add(f"decoder_W_att_{layer}", ctx_dim, ctx_dim)
            self._add(f"decoder_b_att_{layer}", ctx_dim)
        self._add("decoder_U_att", ctx_dim, 1)
        self._add("decoder_c_tt", 1)
        if selector:
            self._add("decoder_W_sel", dim, 1)
            self._add("decoder_b_sel")
        self._add_layer("ff_logit_lstm", dim, dim_word)
        if ctx2out:
            self._add_layer("ff_logit_ctx", ctx_dim, dim_word)
        for layer in range(1, n_layers_out):
            self._add_layer(f"ff_logit_h{layer}", dim_word, dim_word)
        self._add_layer("ff_logit", dim_word, n_words)
        self.locate = Fp32Step(_located)
        self.prepared: nn.ModuleDict | None = None

    def _add(self, name: str, *shape: int) -> None:
        """Add a parameter."""
        self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.01))

    def _add_layer(self, prefix: str, inputs: int, outputs: int) -> None:
        """Add the matrix and the bias of a layer."""
        self._add(f"{prefix}_W", inputs, outputs)
        self._add(f"{prefix}_b", outputs)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Describe images greedily: every word is the most probable one after the words before it.

        Args:
            features: (batch, positions, ctx_dim).

        Returns:
            Words (batch, steps), their logits (batch, steps, n_words) and attention (batch, steps, positions).
        """
        keys = self.keys(features)
        h, c = self.initial_state(features)
        word = torch.zeros_like(self.get_parameter("Wemb")[:1]).expand(features.shape[0], -1)
        tokens, scores, maps = [], [], []
        for _ in range(self.steps):
            logits, h, c, alpha = self.step(features, keys, word, h, c)
            token = logits.argmax(dim=1)
            word = F.embedding(token, self.get_parameter("Wemb"))
            tokens.append(token)
            scores.append(logits)
            maps.append(alpha)
        return torch.stack(tokens, dim=1), torch.stack(scores, dim=1), torch.stack(maps, dim=1)

    def keys(self, features: torch.Tensor) -> torch.Tensor:
        """Return the part of the energies that only depends on the image.

        Args:
            features: (batch, positions, ctx_dim).

        Returns:
            (batch, positions, ctx_dim).
        """
        keys = self._linear("keys0", features)
        for layer in range(1, self.layers_att):
            keys = self._linear(f"keys{layer}", keys).tanh()
        return keys

    def initial_state(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state in front of the first word.

        Args:
            features: (batch, positions, ctx_dim).

        Returns:
            h and c, each (batch, dim).
        """
        passed = features.mean(dim=1)
        for layer in range(1, self.layers_init):
            passed = self._linear(f"init{layer}", passed).relu()
        state = self._linear("state", passed).tanh()
        return state[:, : self.dim], state[:, self.dim :]

    def step(
        self, features: torch.Tensor, keys: torch.Tensor, word: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take one step from the embedding of a word.

        Args:
            features: (batch, positions, ctx_dim).
            keys: (batch, positions, ctx_dim), of `keys`.
            word: (batch, dim_word), a row of `Wemb`; zeros in front of the first word.
            h: (batch, dim).
            c: (batch, dim).

        Returns:
            Logits of the next word (batch, n_words), h and c after the step, and the attention (batch, positions),
            which is the softmax also where hard attention takes one position.
        """
        size = self.dim
        projected = self._linear("from_state", h)
        compared = (keys + projected[:, : self.ctx_dim].unsqueeze(1)).tanh()
        energy = torch.matmul(compared, self.get_parameter("decoder_U_att")).squeeze(2)
        z, alpha = _seen(features, energy, self.locate if self.hard else None)
        if self.selector:
            z = projected[:, -1:].sigmoid() * z
        gates = self._linear("from_input", torch.cat([word, z], dim=1))
        gates = gates + projected[:, self.ctx_dim : self.ctx_dim + 4 * size]
        sigmoids = gates[:, : 3 * size].sigmoid()
        cell = sigmoids[:, size : 2 * size] * c + sigmoids[:, :size] * gates[:, 3 * size :].tanh()
        state = sigmoids[:, 2 * size :] * cell.tanh()
        out = self._linear("deep", torch.cat([state, z], dim=1) if self.ctx2out else state)
        out = (out + word if self.prev2out else out).tanh()
        for layer in range(1, self.layers_out):
            out = self._linear(f"out{layer}", out).relu()
        return self._linear("words", out), state, cell, alpha

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply one of `_layers`."""
        if self.prepared is not None:
            result: torch.Tensor = self.prepared[name](x)
            return result
        return F.linear(x, *self._layers()[name]())

    def _layers(self) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
        """Return, by name, what gives weight (out, in) and bias of a matrix product, dropout's factor included."""
        affine, kept = functools.partial, self.kept
        layers = {"keys0": affine(self._affine, "decoder_Wc_att", "decoder_b_att")}
        for index in range(1, self.layers_att):
            layers[f"keys{index}"] = affine(self._affine, f"decoder_W_att_{index}", f"decoder_b_att_{index}")
        for index in range(1, self.layers_init):
            factor = 1.0 if index == 1 else kept
            layers[f"init{index}"] = affine(self._affine, f"ff_init_{index}_W", f"ff_init_{index}_b", factor)
        for index in range(1, self.layers_out):
            layers[f"out{index}"] = affine(self._affine, f"ff_logit_h{index}_W", f"ff_logit_h{index}_b", kept)
        return {
            **layers,
            "state": self._initial,
            "from_state": self._from_state,
            "from_input": self._from_input,
            "deep": self._deep,
            "words": affine(self._affine, "ff_logit_W", "ff_logit_b", kept),
        }

    def _affine(self, weight: str, bias: str, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a published matrix times a factor, transposed, and its bias."""
        return self.get_parameter(weight).t() * factor, self.get_parameter(bias)

    def _initial(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of h and c in front of the first word."""
        factor = 1.0 if self.layers_init == 1 else self.kept
        weight = torch.cat([self.get_parameter("ff_state_W"), self.get_parameter("ff_memory_W")], dim=1).t() * factor
        return weight, torch.cat([self.get_parameter("ff_state_b"), self.get_parameter("ff_memory_b")])

    def _kept_gates(self) -> torch.Tensor:
        """Return what the dropout of the gates leaves of each (4 dim, 1); g has none."""
        kept = torch.ones_like(self.get_parameter("decoder_b"))
        kept[: 3 * self.dim] = self.gates_kept
        return kept[:, None]

    def _from_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of all that the state is multiplied with: attention, LSTM, gate."""
        parts = [self.get_parameter("decoder_Wd_att").t(), self.get_parameter("decoder_U").t() * self._kept_gates()]
        zeros = parts[0].new_zeros(self.ctx_dim + 4 * self.dim)
        if not self.selector:
            return torch.cat(parts), zeros
        return torch.cat([*parts, self.get_parameter("decoder_W_sel").t()]), torch.cat(
            [zeros, self.get_parameter("decoder_b_sel")[None]]
        )

    def _from_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the LSTM's input, word and z."""
        kept = self._kept_gates()
        return torch.cat(
            [self.get_parameter("decoder_W"), self.get_parameter("decoder_Wc")]
        ).t() * kept, self.get_parameter("decoder_b") * kept[:, 0]

    def _deep(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the deep output, without the word."""
        weight, bias = self._affine("ff_logit_lstm_W", "ff_logit_lstm_b", self.kept)
        if not self.ctx2out:
            return weight, bias
        return torch.cat([weight, self.get_parameter("ff_logit_ctx_W").t()], dim=1), bias + self.get_parameter(
            "ff_logit_ctx_b"
        )

    def prepare_for_export(self) -> StackedShowAttendTell:
        """Return a copy with one matrix per input, without dropout's factors and the bias that cancels."""
        folded = copy.deepcopy(self)
        with torch.no_grad():
            folded.prepared = nn.ModuleDict({name: _linear(*layer()) for name, layer in self._layers().items()})
        for name in [name for name, _ in folded.named_parameters(recurse=False)]:
            if name not in ("Wemb", "decoder_U_att"):
                delattr(folded, name)
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


def _largest_stacked(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of what is compared and the projections of the state."""
    projected = arguments["ctx_dim"] + 4 * arguments["dim"] + 1
    return sizes["batch"] * int(max(sizes["positions"] * arguments["ctx_dim"], projected))


_SMALL_STACKED: Arguments = {
    "ctx_dim": 8,
    "dim": 6,
    "dim_word": 4,
    "n_words": 11,
    "n_layers_att": 2,
    "n_layers_init": 2,
    "steps": 3,
}
_DEEP: Arguments = {
    **_SMALL_STACKED,
    "dim_word": 12,
    "n_layers_att": 3,
    "n_layers_init": 3,
    "n_layers_out": 3,
    "use_dropout_lstm": True,
    "steps": 2,
}
_PLAIN: Arguments = {
    **_SMALL_STACKED,
    "n_layers_att": 1,
    "n_layers_init": 1,
    "prev2out": False,
    "ctx2out": False,
    "selector": False,
    "use_dropout": False,
    "steps": 2,
}
_STACKED_STEP = (
    TensorInput("features", ("batch", "positions", "ctx_dim")),
    TensorInput("keys", ("batch", "positions", "ctx_dim")),
    TensorInput("word", ("batch", "dim_word")),
    TensorInput("h", ("batch", "dim")),
    TensorInput("c", ("batch", "dim")),
)
_ARCHIVE = {r"^history_errs$": ""}

BLOCKS.add(
    BlockSpec(
        name="show-attend-tell-stacked",
        title="caption decoder with stacked attention layers and deep output",
        paper="Show, Attend and Tell: Neural Image Caption Generation with Visual Attention, ICML 2015",
        year=2015,
        code="https://github.com/kelvinxu/arctic-captions",
        build=StackedShowAttendTell,
        original="edgeattn.validation.originals.show_attend_tell:StackedShowAttendTell",
        variants=(
            Variant(
                "official",
                _SMALL_STACKED,
                key_map=_ARCHIVE,
                references={"sat_theano": {**_SMALL_STACKED, "steps": 4}},
            ),
            Variant(
                "deep",
                _DEEP,
                key_map=_ARCHIVE,
                references={"sat_theano_deep": {**_DEEP, "steps": 3}},
            ),
            Variant("plain", _PLAIN, key_map=_ARCHIVE, references={"sat_theano_plain": {**_PLAIN, "steps": 3}}),
            Variant(
                "step",
                _SMALL_STACKED,
                key_map=_ARCHIVE,
                published=Published(
                    "VGG decoder, COCO 2014",
                    {"ctx_dim": 512, "dim": 1800, "dim_word": 512, "n_words": 10000},
                    {"batch": 1, "positions": 196},
                ),
                inputs=_STACKED_STEP,
                method="step",
                overflow=Overflow(50.0, {"batch": 2, "positions": 7}, state={r"U_att": 1e5}),
            ),
            Variant("hard", {**_SMALL_STACKED, "hard": True}, key_map=_ARCHIVE),
        ),
        largest=_largest_stacked,
        precision=(
            "the softmax with the energies, the choice of the hard position and the mean over positions stay in FP32"
        ),
        int8="the linear layers; the weighted sums stay in FP16",
        inputs=_STACKED_STEP[:1],
        sizes=BLOCKS.get("show-attend-tell").sizes,
    )
)
