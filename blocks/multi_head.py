"""Scaled dot-product and multi-head attention with the state of torch.nn.MultiheadAttention.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762).
Code: torch.nn.MultiheadAttention; https://github.com/jadore801120/attention-is-all-you-need-pytorch,
`transformer/SubLayers.py`; https://github.com/harvardnlp/annotated-transformer; https://github.com/huggingface/
pytorch-image-models, `timm/layers/attention.py`.

    head_h = softmax(q_h k_h^T / sqrt(d) + mask) v_h     with q = W_q x + b_q, k = W_k y + b_k, v = W_v z + b_v
    out    = W_o concat_h(head_h) + b_o

Every layout is (batch, length, channels). A mask is boolean, true is forbidden, or a number that is added to the
energies. Forbidden energies are -65504, not minus infinity: a query that may see nothing sees all keys equally, where
torch gives NaN. Exact at export: b_k cancels in the softmax, b_v passes it (the weights of a query sum to 1) and joins
b_o, 1 / sqrt(d) joins W_q.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.precision import LOWEST
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

Affine = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (out, in) and bias (out,) of a projection."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values (heads, rows, head_channels) that every query sees beside those of the memory."""


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Iterable[torch.Tensor] = (),
    *,
    causal: bool = False,
    extra: Rows | None = None,
) -> torch.Tensor:
    """Return softmax(query key^T + masks) value for every head; scales are the caller's.

    Args:
        query: (batch, heads, length, head_channels).
        key: (batch, heads, memory, head_channels).
        value: (batch, heads, memory, value_channels).
        masks: each of four axes, broadcast to (batch, heads, length, memory): booleans, true is forbidden, or numbers
            to add, of which none counts as less than -65504.
        causal: also forbid every key behind the query's own position.
        extra: keys and values beside those of the memory, never masked.

    Returns:
        (batch, heads, length, value_channels).
    """
    energies = torch.matmul(query, key.transpose(2, 3))
    forbidden: torch.Tensor | None = None
    if causal:
        rows = torch.arange(energies.shape[2], device=query.device)
        forbidden = torch.arange(energies.shape[3], device=query.device) > rows[:, None]
    for mask in masks:
        if mask.dtype != torch.bool:
            energies = energies + mask.clamp(min=LOWEST)
        else:
            forbidden = mask if forbidden is None else forbidden | mask
    if forbidden is not None:
        energies = energies.masked_fill(forbidden, LOWEST)
    if extra is None:
        return torch.matmul(energies.softmax(dim=3), value)
    extra_key, extra_value = extra
    count = extra_key.shape[1]
    weights = torch.cat([energies, torch.matmul(query, extra_key.transpose(1, 2))], dim=3).softmax(dim=3)
    return torch.matmul(weights[..., :-count], value) + torch.matmul(weights[..., -count:], extra_value)


class ScaledDotProductAttention(nn.Module):
    """The core alone: softmax(query key^T / sqrt(head_channels) + mask) value; no parameters.

    A boolean mask has the sense of torch.nn.MultiheadAttention (true is forbidden), which is the opposite of
    torch.nn.functional.scaled_dot_product_attention's.

    Args:
        head_channels: channels of a head.
        causal: forbid every key behind the query's own position.
    """

    def __init__(self, head_channels: int, causal: bool = False) -> None:
        super().__init__()
        self.scale = head_channels**-0.5
        self.causal = causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (batch, heads, length, head_channels).
            key: (batch, heads, memory, head_channels).
            value: (batch, heads, memory, value_channels).
            mask: (length, memory), (batch, length, memory) or (batch, heads, length, memory).

        Returns:
            (batch, heads, length, value_channels).
        """
        masks = () if mask is None else (_of_heads(mask),)
        return dot_product_attention(query * self.scale, key, value, masks, causal=self.causal)


class HeadedAttention(nn.Module):
    """What all forms of multi-head attention share; they differ in where their projections come from.

    Args:
        num_heads: heads.
        scale: factor of the queries.
        causal: forbid every key behind the query's own position.
    """

    def __init__(self, num_heads: int, scale: float, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.causal = causal
        self.layer_norm: nn.Module | None = None

    def projections(self) -> tuple[Affine, Affine, Affine]:
        """Return the projections to queries, keys and values; head h has the h-th block of their rows."""
        raise NotImplementedError

    def output(self) -> Affine:
        """Return the projection of the concatenated heads."""
        raise NotImplementedError

    def extra(self) -> Rows | None:
        """Return the keys and values beside those of the memory."""
        return None

    def gates(self) -> torch.Tensor | None:
        """Return the factor of each head (heads,)."""
        return None

    def forward(
        self,
        x: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let a sequence (batch, length, channels) attend to itself; masks and result as in `attend`."""
        return self.attend(x, x, x, key_padding_mask, attn_mask)

    def cross(
        self,
        query: torch.Tensor,
        memory: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let queries attend to a memory (batch, memory, channels); masks and result as in `attend`."""
        return self.attend(query, memory, memory, key_padding_mask, attn_mask)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let queries attend to a memory whose keys and values come from different features.

        Args:
            query: (batch, length, channels).
            key: (batch, memory, key channels).
            value: (batch, memory, value channels).
            key_padding_mask: (batch, memory), boolean (true is forbidden) or added.
            attn_mask: (length, memory), (batch, length, memory) or (batch, heads, length, memory), boolean (true is
                forbidden) or added. torch's (batch * heads, length, memory) has to be reshaped.

        Returns:
            (batch, length, channels).
        """
        masks = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
        masks += [] if attn_mask is None else [_of_heads(attn_mask)]
        rows = zip((query, key, value), self.projections(), strict=True)
        heads_q, heads_k, heads_v = (
            F.linear(tensor, *affine).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for tensor, affine in rows
        )
        if self.scale != 1:
            heads_q = heads_q * self.scale
        heads = dot_product_attention(heads_q, heads_k, heads_v, masks, causal=self.causal, extra=self.extra())
        gates = self.gates()
        if gates is not None:
            heads = heads * gates[:, None, None]
        attended = F.linear(heads.transpose(1, 2).flatten(2), *self.output())
        return attended if self.layer_norm is None else self.layer_norm(attended + query)

    def prepare_for_export(self) -> nn.Module:
        """Return the form without b_k, b_v and scale, and without the heads whose gate is closed."""
        return FoldedAttention(self)


class FoldedAttention(HeadedAttention):
    """Multi-head attention as it is exported: one matrix per role, no key or value bias, no scale, no gates.

    Args:
        trained: what to fold, with at least one open gate; it stays as it is.
    """

    @torch.no_grad()
    def __init__(self, trained: HeadedAttention) -> None:
        gates = trained.gates()
        alive = list(range(trained.num_heads)) if gates is None else gates.nonzero().flatten().tolist()
        super().__init__(len(alive), 1.0, trained.causal)
        (query, query_bias), (key, key_bias), (value, value_bias) = trained.projections()
        out, out_bias = trained.output()
        width = len(query) // trained.num_heads
        kept = torch.cat([torch.arange(head * width, (head + 1) * width) for head in alive])
        if gates is not None:
            out = out * gates.repeat_interleave(width)
        if value_bias is not None:
            passed = torch.mv(out, value_bias)
            out_bias = passed if out_bias is None else out_bias + passed
        self.query = _linear(
            query[kept] * trained.scale, None if query_bias is None else query_bias[kept] * trained.scale
        )
        self.key = _linear(key[kept], None)
        self.value = _linear(value[kept], None)
        self.out = _linear(out[:, kept], out_bias)
        self.layer_norm = copy.deepcopy(trained.layer_norm)
        self.extra_key: torch.Tensor | None
        self.extra_value: torch.Tensor | None
        biases = (("extra_key", key_bias), ("extra_value", value_bias))
        for (name, bias), rows in zip(biases, trained.extra() or (None, None), strict=True):
            if rows is not None and bias is not None:
                rows = rows - bias.reshape(trained.num_heads, 1, width)
            self.register_buffer(name, None if rows is None else rows[alive])

    def projections(self) -> tuple[Affine, Affine, Affine]:
        """Return the folded projections."""
        return (self.query.weight, self.query.bias), (self.key.weight, None), (self.value.weight, None)

    def output(self) -> Affine:
        """Return the folded output projection."""
        return self.out.weight, self.out.bias

    def extra(self) -> Rows | None:
        """Return the extra rows, free of the biases that were folded."""
        return None if self.extra_key is None or self.extra_value is None else (self.extra_key, self.extra_value)


class MultiHeadAttention(HeadedAttention):
    """Multi-head attention of a trained network.

    State names are those of torch.nn.MultiheadAttention: `in_proj_weight` (3 embed_dim, embed_dim), or `q_proj_weight`,
    `k_proj_weight`, `v_proj_weight` where kdim or vdim differ from embed_dim; `in_proj_bias` (3 embed_dim,),
    `out_proj`, `bias_k` and `bias_v` (1, 1, embed_dim). Codes with three layers of their own load with `separate`:
    `q_proj`, `k_proj`, `v_proj`. Attention weights are not returned.

    Args:
        embed_dim: channels of the queries and of the result.
        num_heads: heads; divides embed_dim.
        bias: the projections to queries, keys and values have biases.
        out_bias: the output projection has a bias; as `bias` when None.
        add_bias_kv: a learned key and value beside those of the memory.
        add_zero_attn: a key and value of zeros beside those of the memory.
        kdim: channels of the keys' features; embed_dim when None.
        vdim: channels of the values' features; embed_dim when None.
        separate: three layers instead of torch's packed parameters.
        causal: forbid every key behind the query's own position.
        layer_norm_eps: where a number, the query features are added to the result, and `layer_norm` normalises the
            sum, as in jadore801120's module.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        out_bias: bool | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        separate: bool = False,
        causal: bool = False,
        layer_norm_eps: float | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}. Give a divisor of embed_dim, which is {embed_dim}.")
        super().__init__(num_heads, (embed_dim // num_heads) ** -0.5, causal)
        self.add_zero_attn = add_zero_attn
        widths = {"q": embed_dim, "k": kdim or embed_dim, "v": vdim or embed_dim}
        self.names = tuple(f"{role}_proj" for role in widths)
        self.in_proj_weight: nn.Parameter | None = None
        self.in_proj_bias: nn.Parameter | None = None
        self.separate = separate
        if separate:
            for name, width in zip(self.names, widths.values(), strict=True):
                self.add_module(name, nn.Linear(width, embed_dim, bias=bias))
        else:
            if set(widths.values()) == {embed_dim}:
                self.in_proj_weight = _weight(3 * embed_dim, embed_dim)
            else:
                for name, width in zip(self.names, widths.values(), strict=True):
                    self.register_parameter(f"{name}_weight", _weight(embed_dim, width))
            if bias:
                self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias if out_bias is None else out_bias)
        self.bias_k = _weight(1, 1, embed_dim) if add_bias_kv else None
        self.bias_v = _weight(1, 1, embed_dim) if add_bias_kv else None
        if layer_norm_eps is not None:
            self.layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)

    def projections(self) -> tuple[Affine, Affine, Affine]:
        """Return weight and bias per role, out of whichever form they are stored in."""
        if self.separate:
            layers = [getattr(self, name) for name in self.names]
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        else:
            packed = self.in_proj_weight
            weights = [getattr(self, f"{name}_weight") for name in self.names] if packed is None else _thirds(packed)
            biases = [None] * 3 if self.in_proj_bias is None else _thirds(self.in_proj_bias)
        query, key, value = zip(weights, biases, strict=True)
        return query, key, value

    def output(self) -> Affine:
        """Return the output projection."""
        return self.out_proj.weight, self.out_proj.bias

    def extra(self) -> Rows | None:
        """Return the learned row, then the row of zeros, as far as there are."""
        zeros = self.out_proj.weight.new_zeros(1, self.out_proj.in_features)

        def rows(learned: torch.Tensor | None) -> torch.Tensor:
            found = ([] if learned is None else [learned[0]]) + ([zeros] if self.add_zero_attn else [])
            return torch.cat(found).unflatten(1, (self.num_heads, -1)).transpose(0, 1)

        return (rows(self.bias_k), rows(self.bias_v)) if self.add_zero_attn or self.bias_k is not None else None


def _of_heads(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask (length, memory), (batch, length, memory) or of four axes with an axis of heads."""
    if mask.ndim == 2:
        return mask[None, None]
    return mask[:, None] if mask.ndim == 3 else mask


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(shape)))


def _thirds(packed: torch.Tensor) -> list[torch.Tensor]:
    size = len(packed) // 3
    return [packed[index * size : (index + 1) * size] for index in range(3)]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a layer with copies of a weight (out, in) and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear


TRANSFORMER = "Attention Is All You Need, NeurIPS 2017"
TRANSFORMER_CODE = (
    "torch.nn, https://github.com/jadore801120/attention-is-all-you-need-pytorch, "
    "https://github.com/harvardnlp/annotated-transformer, https://github.com/huggingface/pytorch-image-models"
)
PRECISION = "energies, masks and softmax stay in FP32 (dot products overflow); projections and sums over values in FP16"
INT8 = "the linear layers; the attention products stay in FP16"
SEQUENCE_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "length": 5, "memory": 7},
    {"batch": 1, "length": 9, "memory": 4},
    {"batch": 3, "length": 3, "memory": 11},
    {"batch": 3, "length": 1, "memory": 6},
    {"batch": 1, "length": 1, "memory": 1},
)
BASE = "Transformer base, WMT 2014: sentences of 128 sub-words"
ANNOTATED = {
    r"linears\.0\.": "q_proj.",
    r"linears\.1\.": "k_proj.",
    r"linears\.2\.": "v_proj.",
    r"linears\.3\.": "out_proj.",
}
JADORE = {r"w_qs\.": "q_proj.", r"w_ks\.": "k_proj.", r"w_vs\.": "v_proj.", r"fc\.": "out_proj."}

_SEQUENCE = TensorInput("x", ("batch", "length", "embed_dim"))
_QUERY = TensorInput("query", ("batch", "length", "embed_dim"))
_MEMORY = TensorInput("memory", ("batch", "memory", "embed_dim"))
_PADDING = TensorInput("key_padding_mask", ("batch", "memory"), "mask")
_FORBIDDEN = TensorInput("attn_mask", ("length", "memory"), "mask")
_FOREIGN = (
    _QUERY,
    TensorInput("key", ("batch", "memory", "embed_dim")),
    TensorInput("value", ("batch", "memory", "embed_dim")),
    _PADDING,
)
_SMALL = {"embed_dim": 12, "num_heads": 3}
_JADORE = {"bias": False, "separate": True, "layer_norm_eps": 1e-6}


def largest_of_attention(channels: int, heads: int, sizes: Sizes) -> int:
    """Return the elements of the larger of the energies (batch, heads, length, memory) and a projected sequence."""
    longest = max(sizes["length"], sizes["memory"])
    return sizes["batch"] * longest * max(channels, heads * longest)


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    extra = arguments.get("add_bias_kv", False) + arguments.get("add_zero_attn", False)
    longer = {**sizes, "memory": max(sizes["memory"], sizes["length"]) + extra}
    return largest_of_attention(arguments["embed_dim"], arguments["num_heads"], longer)


_HEADS = {
    name: TensorInput(name, ("batch", "heads", axis, "head_channels"))
    for name, axis in (("query", "length"), ("key", "memory"), ("value", "memory"))
}
_CORE_SIZES = tuple({**sizes, "heads": heads} for heads, sizes in zip((2, 3, 1, 4, 1), SEQUENCE_SIZES, strict=True))

BLOCKS.add(
    BlockSpec(
        name="scaled-dot-product",
        title="scaled dot-product attention",
        paper=TRANSFORMER,
        year=2017,
        code=TRANSFORMER_CODE,
        build=ScaledDotProductAttention,
        original="edgeattn.validation.originals.multi_head:ScaledDotProductAttention",
        variants=(
            Variant(
                "official",
                {"head_channels": 4},
                published=Published(
                    BASE, {"head_channels": 64}, {"batch": 1, "heads": 8, "length": 128, "memory": 128}
                ),
                overflow=Overflow(600.0, _CORE_SIZES[0]),
            ),
            Variant(
                "masked",
                {"head_channels": 4, "causal": True},
                inputs=(*_HEADS.values(), TensorInput("mask", ("batch", "length", "memory"), "mask")),
            ),
        ),
        largest=lambda arguments, sizes: largest_of_attention(
            sizes["heads"] * arguments["head_channels"], sizes["heads"], sizes
        ),
        precision=PRECISION,
        int8="the linear layers; the attention products stay in FP16",
        inputs=tuple(_HEADS.values()),
        sizes=_CORE_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="multi-head",
        title="multi-head attention",
        paper=TRANSFORMER,
        year=2017,
        code=TRANSFORMER_CODE,
        build=MultiHeadAttention,
        original="edgeattn.validation.originals.multi_head:MultiHeadAttention",
        variants=(
            Variant(
                "official",
                _SMALL,
                published=Published(
                    BASE, {"embed_dim": 512, "num_heads": 8}, {"batch": 1, "length": 128, "memory": 128}
                ),
                overflow=Overflow(600.0, SEQUENCE_SIZES[0]),
            ),
            Variant("cross", _SMALL, inputs=(_QUERY, _MEMORY, _PADDING, _FORBIDDEN), method="cross"),
            Variant(
                "widths",
                {**_SMALL, "kdim": 10, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True},
                inputs=(
                    _QUERY,
                    TensorInput("key", ("batch", "memory", "kdim")),
                    TensorInput("value", ("batch", "memory", "vdim")),
                    _PADDING,
                    TensorInput("attn_mask", ("length", "memory")),
                ),
                method="attend",
            ),
            Variant(
                "jadore",
                {**_SMALL, **_JADORE},
                key_map=JADORE,
                listings={"jadore_mha": {**_JADORE, "embed_dim": 512, "num_heads": 8}},
                references={"jadore_mha": {**_JADORE, **_SMALL}},
                inputs=_FOREIGN,
                method="attend",
            ),
            Variant(
                "annotated",
                {**_SMALL, "separate": True},
                key_map=ANNOTATED,
                references={"annotated_mha": {**_SMALL, "separate": True}},
                inputs=_FOREIGN,
                method="attend",
            ),
            Variant(
                "timm",
                {**_SMALL, "bias": False, "out_bias": True},
                key_map={
                    r"qkv\.weight": "in_proj_weight",
                    r"qkv\.bias": "in_proj_bias",
                    r"(^|\.)proj\.": r"\1out_proj.",
                },
                references={
                    "timm_attention": _SMALL,
                    "timm_attention_plain": {**_SMALL, "bias": False, "out_bias": True},
                },
                published=Published(
                    "ViT-B/16, ImageNet 224x224",
                    {"embed_dim": 768, "num_heads": 12},
                    {"batch": 1, "length": 197, "memory": 197},
                ),
            ),
        ),
        largest=_largest,
        precision=PRECISION,
        int8=INT8,
        inputs=(_SEQUENCE,),
        sizes=SEQUENCE_SIZES,
    )
)
