"""Synthesizer: self-attention whose energies come from each position alone, or from no input at all.

Paper: Tay et al., "Synthesizer: Rethinking Self-Attention for Transformer Models", ICML 2021 (arXiv 2005.00743).
Code: https://github.com/tensorflow/mesh, `mesh_tensorflow/transformer/attention.py` (synthetic_attention) and
`transformer_layers.py` (Synthesizer). Third-party PyTorch:
https://github.com/leaderj1001/Synthesizer-Rethinking-Self-Attention-Transformer-Models, `synthesizer.py`;
https://github.com/10-zin/Synthesizer, `synth/synthesizer/sub_layers.py`.

    Y = softmax(S) V,  cut to the length L of the input from tables for the longest input l

    dense               S_i = W2 relu(W1 x_i + b1) + b2
    factorized_dense    S_i = the l products a_p b_q of A(x_i) with a and B(x_i) with l / a entries
    random              S = R
    factorized_random   S = R1 R2^T
    mixture             S = R + Q K^T, or (1 - s) Q K^T + s R with s = sigmoid(alpha)

Energies that read no input give weights that are known before the input is: for a fixed length without a mask, an
export holds the softmax of the table instead of the table, and the attention is one product with a constant.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.precision import LOWEST
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

MODES = ("dense", "random", "factorized_dense", "factorized_random", "mixture", "low_rank")
"""Forms of the energies of `Synthesizer`."""

HEAD_MODES: Mapping[str, tuple[str, ...]] = {
    "random": ("kv", "R"),
    "factorized": ("kv", "R1", "R2"),
    "dense_minus": ("q", "kv", "pi"),
    "random_plus": ("q", "k", "v", "R"),
    "random_plus_alpha": ("q", "k", "v", "R", "alpha"),
    "dense_plus": ("q", "k", "v", "pi"),
    "dense_plus_alpha": ("q", "k", "v", "pi", "alpha"),
}
"""Forms of the energies of `MultiHeadSynthesizer`, each with its parameters besides the output projection."""


def _check_length(length: int | torch.SymInt, longest: int) -> None:
    """Refuse an input that the tables do not reach."""
    if isinstance(length, int) and length > longest:
        raise UserError(
            f"the synthesizer was trained for at most {longest} positions, got {length}. Cut the input, or train a "
            "longer one."
        )


def _same(length: int | torch.SymInt, size: int) -> bool:
    """Return whether a length is a plain number equal to a size; a symbol is never asked, for it would be fixed."""
    return isinstance(length, int) and length == size


def _first_outputs(linear: nn.Module, x: torch.Tensor, count: int | torch.SymInt) -> torch.Tensor:
    """Return the first outputs of a linear layer."""
    weight, bias = linear.parameters()
    if _same(count, len(weight)):
        return F.linear(x, weight, bias)
    return F.linear(x, weight[:count], bias[:count])


class EnergyTable(nn.Module):
    """Energies that read no input, and their softmax, which a fixed length needs only once.

    Weights of a length are computed by the first call, and kept. An export with a fixed length, which calls the model
    before tracing it, finds them there and holds them as a constant.

    Args:
        table: energies (heads, l, l).
        normalise: whether the weights are a softmax of the energies, or the energies themselves.
    """

    def __init__(self, table: torch.Tensor, normalise: bool = True) -> None:
        super().__init__()
        self.table: torch.Tensor
        self.register_buffer("table", table)
        self.normalise = normalise

    def energies(self, length: int | torch.SymInt) -> torch.Tensor:
        """Return the energies (heads, length, length)."""
        if _same(length, self.table.shape[1]):
            return self.table
        return self.table[:, :length, :length]

    def forward(self, length: int | torch.SymInt) -> torch.Tensor:
        """Return the weights (heads, length, length)."""
        if not isinstance(length, int):
            return self._weights(length)
        name = f"weights_{length}"
        if name in self._buffers:
            return self.get_buffer(name)
        weights = self._weights(length)
        if not torch.compiler.is_exporting():
            self.register_buffer(name, weights, persistent=False)
        return weights

    def _weights(self, length: int | torch.SymInt) -> torch.Tensor:
        energies = self.energies(length)
        return energies.softmax(dim=2) if self.normalise else energies


class Synthesizer(nn.Module):
    """Single-head synthesizer as the paper defines it; also reads what leaderj1001's port trains.

    There is no official PyTorch code, so the state names are leaderj1001's: `value_fc` (d, d) in every mode,
    `dense.{0,2}` (l, d) and (l, l), `attention` (1, l, l) for R, `a_proj` (a, d) and `b_proj` (l / a, d), `query_fc`
    and `key_fc`; with the factorised table R1 and R2 (l, rank), which the port lacks. Its departures from the paper
    are options:
    - its random form has no softmax: `softmax=False`.
    - its factorised dense form repeats A and B in the same way, so that not every pair (p, q) occurs unless a and l / a
      have no common divisor: `tile_both=True`.
    - its "factorised random" form has no table at all, but is Q K^T with `rank` channels: mode "low_rank".

    Args:
        in_dims: number of features d.
        sentence_length: longest input l.
        mode: one of `MODES`.
        a: first factor of l in the factorised dense form.
        rank: columns of the factors in the factorised random and the low-rank form.
        softmax: whether the weights of the random form are a softmax.
        tile_both: repeat both factors of the factorised dense form as wholes.

    Raises:
        ValueError: an unknown mode, a size below 1, a factor that does not divide l, or an option of another mode.
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
        sizes = {"in_dims": in_dims, "sentence_length": sentence_length, "a": a, "rank": rank}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: a synthesizer needs at least 1")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
        if mode == "factorized_dense" and sentence_length % a:
            raise ValueError(f"a={a}: it has to divide sentence_length={sentence_length}")
        if not softmax and mode != "random":
            raise ValueError(f"softmax=False: only mode='random' was trained without; leave it true for {mode}")
        if tile_both and mode != "factorized_dense":
            raise ValueError(f"tile_both=True: only mode='factorized_dense' has two factors to repeat, not {mode}")
        self.sentence_length = sentence_length
        self.mode = mode
        self.softmax = softmax
        self.tile_both = tile_both
        self.table: EnergyTable | None = None
        self.value_fc = nn.Linear(in_dims, in_dims)
        if mode == "dense":
            first, second = nn.Linear(in_dims, sentence_length), nn.Linear(sentence_length, sentence_length)
            self.dense = nn.Sequential(first, nn.ReLU(), second)
        if mode == "factorized_dense":
            self.a_proj = nn.Linear(in_dims, a)
            self.b_proj = nn.Linear(in_dims, sentence_length // a)
        if mode in ("random", "mixture"):
            self.attention = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, sentence_length, sentence_length)))
        if mode == "factorized_random":
            self.R1 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(sentence_length, rank)))
            self.R2 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(sentence_length, rank)))
        if mode in ("mixture", "low_rank"):
            self.query_fc = nn.Linear(in_dims, rank if mode == "low_rank" else in_dims)
            self.key_fc = nn.Linear(in_dims, rank if mode == "low_rank" else in_dims)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            x: (batch, length, in_dims), length at most `sentence_length`.

        Returns:
            The features, shaped as x, and the weights (batch, length, length); (1, length, length) where they are
            equal for all inputs.

        Raises:
            UserError: an input that is too long.
        """
        length = x.shape[1]
        _check_length(length, self.sentence_length)
        value = self.value_fc(x)
        if self.mode in ("random", "factorized_random"):
            weights = (self.table or self._table())(length)
        else:
            weights = self._energies(x, length).softmax(dim=2)
        return torch.matmul(weights, value), weights

    def _table(self) -> EnergyTable:
        """Return the energies of the whole table."""
        if self.mode == "factorized_random":
            return EnergyTable(torch.matmul(self.R1, self.R2.transpose(0, 1))[None])
        return EnergyTable(self.attention, self.softmax)

    def _energies(self, x: torch.Tensor, length: int | torch.SymInt) -> torch.Tensor:
        """Return energies (batch, length, length) that read the input."""
        if self.mode == "dense":
            return _first_outputs(self.dense[2], self.dense[1](self.dense[0](x)), length)
        if self.mode == "factorized_dense":
            first, second = self.a_proj(x), self.b_proj(x)
            if self.tile_both:
                energies = first.repeat(1, 1, second.shape[2]) * second.repeat(1, 1, first.shape[2])
            else:
                energies = (first[..., None] * second[:, :, None]).flatten(2)
            return energies if _same(length, energies.shape[2]) else energies[:, :, :length]
        energies = torch.matmul(self.query_fc(x), self.key_fc(x).transpose(1, 2))
        return energies + (self.table or self._table()).energies(length) if self.mode == "mixture" else energies

    def prepare_for_export(self) -> Synthesizer:
        """Return a copy with the table computed: the product of its factors, and later its softmax."""
        folded = copy.deepcopy(self)
        if self.mode in ("random", "factorized_random", "mixture"):
            with torch.no_grad():
                folded.table = folded._table()
            for name in ("attention", "R1", "R2"):
                folded._parameters.pop(name, None)
        return folded


class MultiHeadSynthesizer(nn.Module):
    """Multi-head synthesizer of Mesh TensorFlow, with the output projection.

    State names and shapes are the TensorFlow variables', (inputs, outputs) where torch has the reverse: `q`, `k`, `v`
    (d, heads * d_kv), or `kv` where keys are not needed or shared with the values; `o` (heads * d_kv, d); `R` (l,
    heads, l); `R1`, `R2` (rank, heads, l); `pi` (d_kv, l), published as `pi/kernel`; `alpha` (1,).

    Energies are not divided by sqrt(d_kv), which is part of the initialisation there. dense_minus and dense_plus use
    relu(q), with one `pi` for all heads, so a dense_plus that is scaled by 1 - sigmoid(alpha) scales its keys and not
    its queries. The factorised form sums R1[t, h, i] R2[t, h, j] over t, as in the paper; the published line gives both
    factors the axis of the memory and none that of the queries.

    Args:
        d_model: number of features d.
        num_heads: number of heads.
        d_kv: number of channels of a head.
        mode: one of `HEAD_MODES`.
        max_length: longest input l.
        rank: rows of R1 and R2.

    Raises:
        ValueError: an unknown mode or a size below 1.
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
        sizes = {"d_model": d_model, "num_heads": num_heads, "d_kv": d_kv, "max_length": max_length, "rank": rank}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: a synthesizer needs at least 1")
        if mode not in HEAD_MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(HEAD_MODES)}")
        self.num_heads = num_heads
        self.max_length = max_length
        self.mode = mode
        inner = num_heads * d_kv
        shapes = {
            **dict.fromkeys(("q", "k", "v", "kv"), (d_model, inner)),
            "R": (max_length, num_heads, max_length),
            **dict.fromkeys(("R1", "R2"), (rank, num_heads, max_length)),
            "pi": (d_kv, max_length),
        }
        for name in HEAD_MODES[mode]:
            initial = torch.zeros(1) if name == "alpha" else torch.randn(shapes[name]) * shapes[name][0] ** -0.5
            self.register_parameter(name, nn.Parameter(initial))
        self.o = nn.Parameter(torch.randn(inner, d_model) * inner**-0.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend.

        Args:
            x: (batch, length, d_model), length at most `max_length`.
            mask: (batch, length), true at positions that may not be attended.

        Returns:
            The features, shaped as x.

        Raises:
            UserError: an input that is too long.
        """
        return self._heads()(x, mask)

    def prepare_for_export(self) -> SynthesizerHeads:
        """Return the heads with alpha in the keys and tables, and the factors of a table multiplied."""
        with torch.no_grad():
            return self._heads()

    def _heads(self) -> SynthesizerHeads:
        given: dict[str, torch.Tensor] = {name: self.get_parameter(name) for name in HEAD_MODES[self.mode]}
        query, key, dense = given.get("q"), given.get("k"), given.get("pi")
        table = given["R"].transpose(0, 1) if "R" in given else None
        if "R1" in given:
            table = torch.matmul(given["R1"].permute(1, 2, 0), given["R2"].transpose(0, 1))
        if "alpha" in given:
            share = given["alpha"].sigmoid()
            assert key is not None
            key = key * (1 - share)
            table, dense = (None if part is None else part * share for part in (table, dense))
        value = given["v"] if "v" in given else given["kv"]
        return SynthesizerHeads(self.num_heads, self.max_length, query, key, value, self.o, table, dense)


class SynthesizerHeads(nn.Module):
    """What `MultiHeadSynthesizer` computes in all modes: the energies are a sum of up to two parts.

    Args:
        num_heads: number of heads.
        max_length: longest input l.
        query: (d, heads * d_kv), or None.
        key: (d, heads * d_kv), or None for energies without a product of queries and keys.
        value: (d, heads * d_kv).
        output: (heads * d_kv, d).
        table: energies that read no input (heads, l, l), or None.
        dense: from a query behind its ReLU to energies (d_kv, l), or None.
    """

    def __init__(
        self,
        num_heads: int,
        max_length: int,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor,
        output: torch.Tensor,
        table: torch.Tensor | None,
        dense: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.query: torch.Tensor | None
        self.key: torch.Tensor | None
        self.value: torch.Tensor
        self.output: torch.Tensor
        self.dense: torch.Tensor | None
        parts = {"query": query, "key": key, "value": value, "output": output, "dense": dense}
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.table = None if table is None else EnergyTable(table.contiguous())

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend; arguments, result and errors are those of `MultiHeadSynthesizer.forward`."""
        length = x.shape[1]
        _check_length(length, self.max_length)
        value = self._split(x, self.value)
        if self.query is None and mask is None:
            assert self.table is not None
            weights = self.table(length)
        else:
            energies = self._energies(x, length)
            if mask is not None:
                energies = energies.masked_fill(mask[:, None, None], LOWEST)
            weights = energies.softmax(dim=3)
        heads = torch.matmul(weights, value)
        return torch.matmul(heads.transpose(1, 2).flatten(2), self.output)

    def _energies(self, x: torch.Tensor, length: int | torch.SymInt) -> torch.Tensor:
        """Return energies (batch or 1, heads, length, length)."""
        energies = None
        if self.query is not None:
            query = self._split(x, self.query)
            if self.key is not None:
                energies = torch.matmul(query, self._split(x, self.key).transpose(2, 3))
            if self.dense is not None:
                dense = self.dense if _same(length, self.max_length) else self.dense[:, :length]
                synthesised = torch.matmul(query.relu(), dense)
                energies = synthesised if energies is None else energies + synthesised
        if self.table is None:
            assert energies is not None
            return energies
        table = self.table.energies(length)
        return table[None] if energies is None else energies + table

    def _split(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Project (batch, length, d) to (batch, heads, length, d_kv)."""
        return torch.matmul(x, weight).unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class DenseSynthesizerLayer(nn.Module):
    """Dense multi-head synthesizer of 10-zin/Synthesizer with residual and normalisation.

    State names: `w_qs`, `w_vs` and `fc` (linear without bias), `attention.w_1` (64, d_k) and `attention.w_2` (l, 64),
    which all heads share and which see the projected query, and `layer_norm` (eps 1e-6). The same repository's random
    form is not here: its table is no parameter, so no checkpoint holds it. Its factorised classes cannot be built.

    Args:
        max_seq_len: longest input l.
        n_head: number of heads.
        d_model: number of features.
        d_k: number of channels of a head's query.
        d_v: number of channels of a head's value.
        d_hid: hidden channels of the energies.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, max_seq_len: int, n_head: int, d_model: int, d_k: int, d_v: int, d_hid: int = 64) -> None:
        super().__init__()
        sizes = {"max_seq_len": max_seq_len, "n_head": n_head, "d_model": d_model, "d_k": d_k, "d_v": d_v}
        for name, value in {**sizes, "d_hid": d_hid}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: a synthesizer needs at least 1")
        self.max_seq_len = max_seq_len
        self.n_head = n_head
        self.w_qs = nn.Linear(d_model, n_head * d_k, bias=False)
        self.w_vs = nn.Linear(d_model, n_head * d_v, bias=False)
        self.attention = nn.ModuleDict({"w_1": nn.Linear(d_k, d_hid), "w_2": nn.Linear(d_hid, max_seq_len)})
        self.fc = nn.Linear(n_head * d_v, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-6)
        self.hidden: nn.Linear | None = None

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend, add and normalise.

        Args:
            x: (batch, length, d_model), length at most `max_seq_len`.
            mask: (batch, length), true at positions that may not be attended.

        Returns:
            The features, shaped as x, and the weights (batch, heads, length, length).

        Raises:
            UserError: an input that is too long.
        """
        length = x.shape[1]
        _check_length(length, self.max_seq_len)
        if self.hidden is not None:
            hidden = self._split(self.hidden(x))
        else:
            hidden = self.attention["w_1"](self._split(self.w_qs(x)))
        energies = _first_outputs(self.attention["w_2"], hidden.relu(), length)
        if mask is not None:
            energies = energies.masked_fill(mask[:, None, None], LOWEST)
        weights = energies.softmax(dim=3)
        heads = torch.matmul(weights, self._split(self.w_vs(x)))
        return self.layer_norm(self.fc(heads.transpose(1, 2).flatten(2)) + x), weights

    def prepare_for_export(self) -> DenseSynthesizerLayer:
        """Return a copy in which the query's projection and the first layer of the energies, linear both, are one."""
        folded = copy.deepcopy(self)
        first: nn.Linear = folded.attention["w_1"]  # type: ignore[assignment]
        with torch.no_grad():
            weight = torch.matmul(first.weight, folded.w_qs.weight.unflatten(0, (self.n_head, -1))).flatten(0, 1)
            merged = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
            merged.weight.copy_(weight)
            merged.bias.copy_(first.bias.repeat(self.n_head))
        folded.hidden = merged
        del folded.w_qs, folded.attention["w_1"]
        return folded

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, heads * channels) to (batch, heads, length, channels)."""
        return x.unflatten(2, (self.n_head, -1)).transpose(1, 2)


_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "length": 6},
    {"batch": 3, "length": 8},
    {"batch": 1, "length": 3},
    {"batch": 1, "length": 1},
)
_SINGLE: Arguments = {"in_dims": 5, "sentence_length": 8}
_HEADS: Arguments = {"d_model": 6, "num_heads": 2, "d_kv": 4, "max_length": 8, "rank": 3}
_MESH = {
    r"^(.*/)?(q|k|v|kv|o|R|R1|R2|alpha)$": r"\2",
    r"^(.*/)?pi/kernel$": "pi",
}
_TEN_ZIN = {r"^(.*\.)?(slf_attn|enc_attn)\.": ""}
_T5: Arguments = {"d_model": 768, "num_heads": 12, "d_kv": 64, "max_length": 512}
_LONGEST: Sizes = {"batch": 1, "length": 512}
_LEADERJ: Arguments = {"in_dims": 6, "sentence_length": 8}
_X = (TensorInput("x", ("batch", "length", "in_dims")),)
_HEADS_X = TensorInput("x", ("batch", "length", "d_model"))
_MASK = TensorInput("mask", ("batch", "length"), values="mask")


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of features, energies and a table cut along one axis."""
    longest: int = arguments["sentence_length"]
    return sizes["batch"] * sizes["length"] * max(longest, int(arguments["in_dims"]))


def _largest_heads(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of projections, energies and a table cut along one axis."""
    batch, length, heads = sizes["batch"], sizes["length"], int(arguments["num_heads"])
    return length * max(batch * heads * int(arguments["d_kv"]), batch * heads * length, heads * arguments["max_length"])


def _largest_layer(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of projections, hidden channels and energies."""
    channels = max(int(arguments.get("d_hid", 64)), int(arguments["d_v"]), sizes["length"])
    return sizes["batch"] * sizes["length"] * int(arguments["n_head"]) * channels


_INT8 = "the products with weights; the attention products stay in FP16"
_PRECISION = (
    "energies and softmax stay in FP32; weights that are known at export time are numbers from 0 to 1 and may be "
    "stored in FP16, and the sums over the positions run in FP16, for the weights sum to 1"
)
_TITLE = "Synthesizer: Rethinking Self-Attention for Transformer Models, ICML 2021"

BLOCKS.add(
    BlockSpec(
        name="synthesizer",
        title="synthesizer with a single head",
        paper=_TITLE,
        year=2021,
        code="https://github.com/leaderj1001/Synthesizer-Rethinking-Self-Attention-Transformer-Models (third party)",
        build=Synthesizer,
        original="edgeattn.validation.originals.synthesizer:Synthesizer",
        variants=(
            Variant(
                "dense",
                _SINGLE,
                references={"synthesizer_leaderj_dense": _LEADERJ},
                published=Published(
                    "leaderj1001's example", {"in_dims": 1024, "sentence_length": 32}, {"batch": 1, "length": 32}
                ),
            ),
            Variant("random", {**_SINGLE, "mode": "random"}),
            Variant("factorized-dense", {**_SINGLE, "mode": "factorized_dense"}),
            Variant("factorized-random", {**_SINGLE, "mode": "factorized_random", "rank": 3}),
            Variant(
                "mixture",
                {**_SINGLE, "mode": "mixture"},
                references={"synthesizer_leaderj_mixture": {**_LEADERJ, "mode": "mixture"}},
                overflow=Overflow(300.0, {"batch": 2, "length": 6}, arguments={"in_dims": 16}),
            ),
            Variant(
                "leaderj1001-random",
                {**_SINGLE, "mode": "random", "softmax": False},
                references={"synthesizer_leaderj_random": {**_LEADERJ, "mode": "random", "softmax": False}},
            ),
            Variant(
                "leaderj1001-factorized-dense",
                {**_SINGLE, "mode": "factorized_dense", "tile_both": True},
                references={"synthesizer_leaderj_fdense": {**_LEADERJ, "mode": "factorized_dense", "tile_both": True}},
            ),
            Variant(
                "leaderj1001-factorized-random",
                {**_SINGLE, "mode": "low_rank"},
                references={"synthesizer_leaderj_frandom": {**_LEADERJ, "mode": "low_rank"}},
            ),
        ),
        largest=_largest,
        precision=_PRECISION,
        int8=_INT8,
        inputs=_X,
        sizes=_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="synthesizer-heads",
        title="multi-head synthesizer of Mesh TensorFlow",
        paper=_TITLE,
        year=2021,
        code="https://github.com/tensorflow/mesh, mesh_tensorflow/transformer/attention.py",
        build=MultiHeadSynthesizer,
        original="edgeattn.validation.originals.synthesizer:MultiHeadSynthesizer",
        variants=(
            Variant(
                "official",
                _HEADS,
                key_map=_MESH,
                inputs=(_HEADS_X, _MASK),
                published=Published("T5 base, random mixed with dot products", _T5, _LONGEST),
                overflow=Overflow(600.0, {"batch": 2, "length": 6}, arguments={"d_kv": 16}),
            ),
            Variant(
                "random",
                {**_HEADS, "mode": "random"},
                key_map=_MESH,
                published=Published("T5 base, random", {**_T5, "mode": "random"}, _LONGEST),
            ),
            Variant("factorized", {**_HEADS, "mode": "factorized"}, key_map=_MESH, inputs=(_HEADS_X, _MASK)),
            Variant("dense", {**_HEADS, "mode": "dense_minus"}, key_map=_MESH),
            Variant("dense-plus-alpha", {**_HEADS, "mode": "dense_plus_alpha"}, key_map=_MESH),
        ),
        largest=_largest_heads,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(_HEADS_X,),
        sizes=_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="synthesizer-10zin",
        title="dense multi-head synthesizer with residual and normalisation",
        paper=_TITLE,
        year=2021,
        code="https://github.com/10-zin/Synthesizer, synth/synthesizer/sub_layers.py (third party)",
        build=DenseSynthesizerLayer,
        original="edgeattn.validation.originals.synthesizer:DenseSynthesizerLayer",
        variants=(
            Variant(
                "dense",
                {"max_seq_len": 8, "n_head": 2, "d_model": 6, "d_k": 4, "d_v": 5},
                key_map=_TEN_ZIN,
                references={
                    "synthesizer_10zin_dense": {"max_seq_len": 8, "n_head": 2, "d_model": 6, "d_k": 4, "d_v": 5}
                },
                published=Published(
                    "train.py's defaults, 50 tokens",
                    {"max_seq_len": 50, "n_head": 8, "d_model": 512, "d_k": 64, "d_v": 64},
                    {"batch": 1, "length": 50},
                ),
            ),
            Variant(
                "masked",
                {"max_seq_len": 8, "n_head": 2, "d_model": 6, "d_k": 4, "d_v": 5},
                key_map=_TEN_ZIN,
                inputs=(_HEADS_X, _MASK),
            ),
        ),
        largest=_largest_layer,
        precision=f"{_PRECISION}; the normalisation stays in FP32",
        int8=_INT8,
        inputs=(_HEADS_X,),
        sizes=_SIZES,
    )
)
