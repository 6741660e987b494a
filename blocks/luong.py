"""Luong attention: global or local over the source's hidden states, and one step of the decoder around it.

Paper: Luong et al., "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015 (arXiv
1508.04025). Code: https://github.com/lmthang/nmt.matlab, `code/layers/attnLayerForward.m` (MATLAB);
https://github.com/OpenNMT/OpenNMT-py, `onmt/modules/global_attention.py`.

    score       h_s . h_t (dot), h_s . W_a h_t (general), v_a . tanh(h_s + W_a h_t) (concat)
    global      a = softmax_s(score)
    local-m     the same over |s - p| <= D with p = min(t, S - 1)
    local-p     p = sigmoid(v_pos . tanh(W_pos h_t)) (S - 1) + 1,  over |s - floor(p)| <= D,
                a_s = softmax_s(score) exp(-(s - p)^2 / (2 (D / 2)^2))
    output      tanh(W_h [sum_s a_s h_s; h_t])

S counts the source's words and its end symbol; the end symbol's state is not attended. The published code gathers
a window of 2 D + 1 states for each target. Here all states are scored, and those outside the window are masked, so that
no index depends on the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from edgeattn.blocks.precision import LOWEST, Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

SCORES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "dot": {},
    "general": {"W_a": (1, 1)},
    "concat": {"W_a": (1, 1), "v_a": (0, 1)},
    "concat_both": {"W_a": (1, 2), "v_a": (0, 1)},
    "mlp": {"W_a": (1, 1), "b_a": (1,), "U_a": (1, 1), "v_a": (0, 1), "b_h": (1,)},
}
"""Parameters by score, their shapes in multiples of the state's size; 0 stands for an axis of 1."""

WINDOWS = (None, "monotonic", "predictive")
"""Global attention, local-m and local-p."""


def _numbers(mask: torch.Tensor, like: torch.Tensor, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of each position's word, counted from 1 (length,), and how many there are (batch, 1)."""
    length = mask.shape[1]
    index = torch.arange(length, device=mask.device)
    numbers = (length - index if reverse else index + 1).to(like.dtype)
    return numbers, (~mask).to(like.dtype).sum(dim=1, keepdim=True)


def _monotonic(position: torch.Tensor, mask: torch.Tensor, *, reach: int, reverse: bool) -> torch.Tensor:
    """Return whether each state lies in each target's window (batch, targets, length)."""
    numbers, words = _numbers(mask, position, reverse)
    centre = torch.minimum(position, words)[:, :, None]
    return ((numbers - centre).abs() <= reach) & ~mask[:, None]


def _predictive(
    query: torch.Tensor,
    weight: torch.Tensor,
    vector: torch.Tensor,
    mask: torch.Tensor,
    *,
    reach: int,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each state lies in each target's window, and the Gaussian there (both batch, targets, length)."""
    numbers, words = _numbers(mask, query, reverse)
    hidden = torch.matmul(query, weight.transpose(0, 1)).tanh()
    centre = torch.matmul(hidden, vector.transpose(0, 1)).sigmoid() * words[:, :, None] + 1
    inside = ((numbers - centre.floor()).abs() <= reach) & ~mask[:, None]
    away = (numbers - centre) * (2 / reach)
    return inside, (away * away * -0.5).exp()


def _carried(forget: torch.Tensor, cell: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    return forget * cell + update


def _clipped(cell: torch.Tensor) -> torch.Tensor:
    return cell.clamp(-50.0, 50.0)


class _Attention(nn.Module):
    """Parameters and arithmetic of `LuongAttention`, without a forward method."""

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
        rows = size if position_size is None else position_size
        for name, value in (("size", size), ("reach", reach), ("position_size", rows)):
            if value < 1:
                raise ValueError(f"{name}={value}: Luong attention needs at least 1")
        if score not in SCORES:
            raise ValueError(f"score={score!r}: choose one of {', '.join(SCORES)}")
        if window not in WINDOWS:
            raise ValueError(f"window={window!r}: choose None (global), 'monotonic' or 'predictive'")
        if gaussian_first and window != "predictive":
            raise ValueError("gaussian_first=True: only a predictive window has a Gaussian; set window='predictive'")
        self.score = score
        self.gaussian_first = gaussian_first
        shapes = {name: tuple(max(1, axis * size) for axis in shape) for name, shape in SCORES[score].items()}
        shapes["W_h"] = (size, 2 * size)
        if window == "predictive":
            shapes |= {"W_pos": (rows, size), "v_pos": (1, rows)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-0.1, 0.1)))
        self.monotonic = self.predictive = None
        if window == "monotonic":
            self.monotonic = Fp32Step(partial(_monotonic, reach=reach, reverse=reverse))
        if window == "predictive":
            self.predictive = Fp32Step(partial(_predictive, reach=reach, reverse=reverse))

    def attend(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None,
        position: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; arguments, results and errors are those of `LuongAttention.forward`."""
        if (position is None) != (self.monotonic is None):
            raise ValueError("position: local-m needs the numbers of the target words, the other forms take none")
        scores = self._scores(query, memory)
        weights = self._weights(scores, query, mask, position)
        both = torch.cat([torch.matmul(weights, memory), query], dim=2)
        output = nn.functional.linear(both, self.get_parameter("W_h"), self._parameters.get("b_h"))
        return output if self.score == "mlp" else output.tanh(), weights

    def _scores(self, query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, targets, length)."""
        if self.score == "dot":
            return torch.matmul(query, memory.transpose(1, 2))
        weight = self.get_parameter("W_a")
        if self.score == "general":
            return torch.matmul(nn.functional.linear(query, weight), memory.transpose(1, 2))
        if self.score == "concat_both":
            on_query, on_memory = weight[:, : len(weight)], weight[:, len(weight) :]
            memory = nn.functional.linear(memory, on_memory)
        else:
            on_query = weight
        if self.score == "mlp":
            memory = nn.functional.linear(memory, self.get_parameter("U_a"))
        query = nn.functional.linear(query, on_query, self._parameters.get("b_a"))
        hidden = (query[:, :, None] + memory[:, None]).tanh()
        return torch.matmul(hidden, self.get_parameter("v_a").transpose(0, 1)).squeeze(3)

    def _weights(
        self, scores: torch.Tensor, query: torch.Tensor, mask: torch.Tensor | None, position: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weights of the scores (batch, targets, length)."""
        if self.monotonic is None and self.predictive is None:
            return (scores if mask is None else scores.masked_fill(mask[:, None], LOWEST)).softmax(dim=2)
        if mask is None:
            mask = torch.zeros(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
        gaussian = None
        if self.monotonic is not None:
            inside = self.monotonic(position, mask)
        else:
            assert self.predictive is not None
            inside, gaussian = self.predictive(query, self.get_parameter("W_pos"), self.get_parameter("v_pos"), mask)
            if self.gaussian_first:
                scores, gaussian = scores * gaussian, None
        weights = torch.where(inside, scores, LOWEST).softmax(dim=2)
        if gaussian is not None:
            weights = weights * gaussian
        return torch.where(inside, weights, 0.0)


class LuongAttention(_Attention):
    """Attention of decoder states over encoder states, with the attentional vector behind it.

    State names are those of nmt.matlab (there in .mat files), all without biases: `W_a` (L, L) for general and concat,
    `v_a` (1, L) for concat, `W_pos` (position_size, L) and `v_pos` (1, position_size) for local-p, `W_h` (L, 2L) on
    [context; h_t]. Quirks that belong to the definition:
    - concat as coded transforms h_t alone; "concat_both" is the paper's v_a . tanh(W_a [h_t; h_s]), W_a (L, 2L).
    - local-p's window lies around floor(p), its Gaussian around the real p, and its weights do not sum to 1.
    - With `gaussian_first`, an option that the code got after the paper, scores times Gaussian go through the softmax.
    - A window without any state gives weights 0.

    OpenNMT's GlobalAttention has the scores dot, general and mlp. Its mlp, v_a . tanh(W_a h_t + b_a + U_a h_s), also
    has a bias `b_h` behind W_h and no tanh there.

    Args:
        size: size L of the states.
        score: one of `SCORES`.
        window: None for all states, "monotonic" (local-m) or "predictive" (local-p).
        reach: D, how far a window reaches to both sides of its centre.
        position_size: rows of W_pos; size when None.
        gaussian_first: multiply the scores, and not their softmax, by the Gaussian.
        reverse: the source was read from its last word to its first and padded in front, as local attention in the
            published code demands. Otherwise it is in order and padded at the end.

    Raises:
        ValueError: an unknown score or window, a size or reach below 1, or a Gaussian without predictive window.
    """

    def forward(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            query: h_t (batch, targets, L).
            memory: h_s of the words (batch, length, L), without the end symbol's.
            mask: (batch, length), true at padding; none is padding when None.
            position: for local-m, the number t of each target word, counted from 1, (batch, targets).

        Returns:
            The attentional vectors (batch, targets, L) and the weights (batch, targets, length).

        Raises:
            ValueError: local-m without positions, or positions without local-m.
        """
        return self.attend(query, memory, mask, position)


class LuongDecoder(_Attention):
    """One step of the decoder: LSTM layers fed with the last attentional vector, then attention.

    State names are those of nmt.matlab, W_tgt{l} written `W_tgt_{l}`: (4L, 3L) in the first layer, on [word; last
    attentional vector; h], (4L, 2L) on [input; h] in the others; gates in the order i, f, o, candidate, without biases.
    The attention has the names and quirks of `LuongAttention`. The cell state is clipped to 50 on
    both sides behind the output that is computed from it. (The published code clips h too, which is never above 1.)

    Args:
        size: size L of words and states.
        layers: number of LSTM layers.
        score: as in `LuongAttention`.
        window: as in `LuongAttention`.
        reach: as in `LuongAttention`.
        position_size: as in `LuongAttention`.
        gaussian_first: as in `LuongAttention`.
        reverse: as in `LuongAttention`.

    Raises:
        ValueError: fewer than 1 layer, or what `LuongAttention` refuses.
    """

    def __init__(
        self,
        size: int,
        layers: int = 4,
        score: str = "general",
        window: str | None = None,
        reach: int = 10,
        position_size: int | None = None,
        gaussian_first: bool = False,
        reverse: bool = True,
    ) -> None:
        super().__init__(size, score, window, reach, position_size, gaussian_first, reverse)
        if layers < 1:
            raise ValueError(f"layers={layers}: the decoder needs at least 1")
        self.layers = layers
        for layer in range(1, layers + 1):
            weight = torch.empty(4 * size, (3 if layer == 1 else 2) * size).uniform_(-0.1, 0.1)
            self.register_parameter(f"W_tgt_{layer}", nn.Parameter(weight))
        self.carry = Fp32Step(_carried)
        self.clip = Fp32Step(_clipped)

    def forward(
        self,
        word: torch.Tensor,
        attentional: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode one word.

        Args:
            word: embedding of the last word (batch, L).
            attentional: last attentional vector (batch, L); zeros in the first step.
            h: (layers, batch, L).
            c: (layers, batch, L).
            memory: h_s of the words (batch, length, L).
            mask: (batch, length), true at padding.
            position: for local-m, the step's number, counted from 1, (batch, 1).

        Returns:
            The attentional vector (batch, L), the next h and c (layers, batch, L) and the weights (batch, length).
        """
        inputs = torch.cat([word, attentional], dim=1)
        states = []
        for layer in range(self.layers):
            weight = self.get_parameter(f"W_tgt_{layer + 1}")
            inputs, cell = self._step(inputs, h[layer], c[layer], weight)
            states.append((inputs, cell))
        output, weights = self.attend(inputs[:, None], memory, mask, position)
        hidden, cells = (torch.stack(entries) for entries in zip(*states, strict=True))
        return output.squeeze(1), hidden, cells, weights.squeeze(1)

    def _step(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advance one layer's h and c."""
        size = h.shape[1]
        total = nn.functional.linear(torch.cat([x, h], dim=1), weight)
        gates, candidate = total[:, : 3 * size].sigmoid(), total[:, 3 * size :].tanh()
        cell = self.carry(gates[:, size : 2 * size], c, gates[:, :size] * candidate)
        return gates[:, 2 * size :] * cell.tanh(), self.clip(cell)


_QUERY = TensorInput("query", ("batch", "targets", "size"))
_MEMORY = TensorInput("memory", ("batch", "length", "size"))
_MASK = TensorInput("mask", ("batch", "length"), values="mask")
_POSITION = TensorInput("position", ("batch", "targets"))
_STATE = TensorInput("h", ("layers", "batch", "size"))
_STEP = (
    TensorInput("word", ("batch", "size")),
    TensorInput("attentional", ("batch", "size")),
    _STATE,
    TensorInput("c", ("layers", "batch", "size")),
    _MEMORY,
    _MASK,
)

_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "targets": 3, "length": 11},
    {"batch": 3, "targets": 5, "length": 6},
    {"batch": 1, "targets": 4, "length": 17},
    {"batch": 1, "targets": 1, "length": 1},
)
_SENTENCE: Sizes = {"batch": 1, "targets": 50, "length": 50}
_LOUD = {"batch": 2, "targets": 3, "length": 6}
_OPENNMT = {
    r"(^|\.)linear_(in|query)\.weight$": r"\1W_a",
    r"(^|\.)linear_query\.bias$": r"\1b_a",
    r"(^|\.)linear_context\.weight$": r"\1U_a",
    r"(^|attn\.)v\.weight$": r"\1v_a",
    r"(^|\.)linear_out\.weight$": r"\1W_h",
    r"(^|\.)linear_out\.bias$": r"\1b_h",
}


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of states, weights and, for additive scores, all pairs of states."""
    size: int = arguments["size"]
    targets, length = sizes["targets"], sizes["length"]
    additive = "v_a" in SCORES[arguments.get("score", "general")]
    pairs = targets * length * (size if additive else 1)
    return sizes["batch"] * max(pairs, 2 * targets * size, length * size)


def _largest_step(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of gates, inputs of a layer and states of the source."""
    size: int = arguments["size"]
    return sizes["batch"] * size * max(4, sizes["length"], int(arguments.get("layers", 4)))


_PRECISION = (
    "scores and softmax stay in FP32, and so does all that places a window: a centre that is off by a thousandth of "
    "the sentence may move the window by a word. The sum over the states, whose weights sum to 1 at most, runs in FP16"
)
_INT8 = "the products with weights; the attention products stay in FP16"
_PAPER = "Effective Approaches to Attention-based Neural Machine Translation, EMNLP 2015"

BLOCKS.add(
    BlockSpec(
        name="luong",
        title="Luong attention",
        paper=_PAPER,
        year=2015,
        code="https://github.com/lmthang/nmt.matlab, https://github.com/OpenNMT/OpenNMT-py",
        build=LuongAttention,
        original="edgeattn.validation.originals.luong:LuongAttention",
        variants=(
            Variant(
                "official",
                {"size": 6},
                published=Published("nmt.matlab, English to German", {"size": 1000}, _SENTENCE),
                overflow=Overflow(400.0, _LOUD, arguments={"size": 16}),
            ),
            Variant("dot", {"size": 6, "score": "dot"}),
            Variant("concat", {"size": 6, "score": "concat"}),
            Variant("concat-paper", {"size": 6, "score": "concat_both"}),
            Variant(
                "local-m",
                {"size": 6, "score": "dot", "window": "monotonic", "reach": 2},
                inputs=(_QUERY, _MEMORY, _MASK, _POSITION),
            ),
            Variant(
                "local-p",
                {"size": 6, "window": "predictive", "reach": 3, "position_size": 4},
                published=Published("nmt.matlab, English to German", {"size": 1000, "window": "predictive"}, _SENTENCE),
            ),
            Variant(
                "local-p-gaussian-first",
                {"size": 6, "window": "predictive", "reach": 3, "gaussian_first": True, "reverse": False},
            ),
            Variant(
                "opennmt",
                {"size": 6},
                key_map=_OPENNMT,
                inputs=(_QUERY, _MEMORY),
                references={"opennmt_general": {"size": 6}},
            ),
            Variant(
                "opennmt-mlp",
                {"size": 6, "score": "mlp"},
                key_map=_OPENNMT,
                inputs=(_QUERY, _MEMORY),
                references={"opennmt_mlp": {"size": 6, "score": "mlp"}},
            ),
        ),
        largest=_largest,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(_QUERY, _MEMORY, _MASK),
        sizes=_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="luong-decoder",
        title="one step of Luong's decoder, with input feeding",
        paper=_PAPER,
        year=2015,
        code="https://github.com/lmthang/nmt.matlab, code/layers/rnnStepLayerForward.m",
        build=LuongDecoder,
        original="edgeattn.validation.originals.luong:LuongDecoder",
        variants=(
            Variant(
                "official",
                {"size": 6, "layers": 2, "window": "predictive", "reach": 3},
                key_map={r"^W_tgt\{(\d+)\}$": r"W_tgt_\1"},
                published=Published(
                    "nmt.matlab, English to German, local-p",
                    {"size": 1000, "layers": 4, "window": "predictive"},
                    _SENTENCE,
                ),
                overflow=Overflow(400.0, _LOUD, arguments={"size": 16}, state={"W_a": 400.0}),
            ),
        ),
        largest=_largest_step,
        precision=f"{_PRECISION}. The cell states stay in FP32",
        int8=_INT8,
        inputs=_STEP,
        sizes=_SIZES,
    )
)
