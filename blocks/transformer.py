"""Encoder and decoder layers of the Transformer with the state of torch.nn's layers.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762).
Code: torch.nn.TransformerEncoderLayer and TransformerDecoderLayer; https://github.com/jadore801120/
attention-is-all-you-need-pytorch, `transformer/Layers.py`; https://github.com/harvardnlp/annotated-transformer.

    norm last:  x <- LN_i(x + f_i(x))      norm first:  x <- x + f_i(LN_i(x))

f is self-attention, in a decoder then attention to the encoder's memory, then W_2 act(W_1 x + b_1) + b_2. Masks and
what is folded at export are those of `MultiHeadAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.multi_head import (
    ANNOTATED,
    BASE,
    INT8,
    JADORE,
    PRECISION,
    SEQUENCE_SIZES,
    TRANSFORMER,
    TRANSFORMER_CODE,
    MultiHeadAttention,
    largest_of_attention,
)
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}
"""Non-linearities of the feed-forward part; GELU is the exact one."""


class UnbiasedLayerNorm(nn.Module):
    """The annotated Transformer's normalisation: weight * (x - mean) / (std + eps) + bias.

    Other than in LayerNorm the variance is divided by channels - 1, and eps is added to the standard deviation.

    Args:
        channels: size of the last axis, at least 2.
        eps: what is added.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., channels) along the last axis."""
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred * centred).sum(dim=-1, keepdim=True) / (x.shape[-1] - 1)
        return self.weight * (centred / (variance.sqrt() + self.eps)) + self.bias


class TransformerLayer(nn.Module):
    """What encoder and decoder layers share: the feed-forward part, the norms and where they stand.

    Args:
        d_model: channels.
        dim_feedforward: channels between the two matrices of the feed-forward part.
        norms: number of norms.
        activation: "relu" or "gelu".
        layer_norm_eps: of the norms.
        norm_first: normalise what enters a part, rather than the sum behind it.
        bias: matrices and norms have biases.
        unbiased_norm: `UnbiasedLayerNorm` instead of LayerNorm.

    Raises:
        ValueError: another activation, or an unbiased norm without bias.
    """

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        norms: int,
        *,
        activation: str,
        layer_norm_eps: float,
        norm_first: bool,
        bias: bool,
        unbiased_norm: bool,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}. Give one of {', '.join(ACTIVATIONS)}.")
        if unbiased_norm and not bias:
            raise ValueError("unbiased_norm is True and bias is False. Give bias=True: that norm always has one.")
        self.activation = activation
        self.norm_first = norm_first
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias)
        for index in range(1, norms + 1):
            norm = (
                UnbiasedLayerNorm(d_model, layer_norm_eps)
                if unbiased_norm
                else nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias)
            )
            self.add_module(f"norm{index}", norm)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, d_model) to the same shape, every position by itself."""
        hidden: torch.Tensor = self.linear2(ACTIVATIONS[self.activation](self.linear1(x)))
        return hidden

    def add(self, x: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor], norm: nn.Module) -> torch.Tensor:
        """Add what a part gives, with the norm where this layer has it."""
        if self.norm_first:
            return x + part(norm(x))
        normalised: torch.Tensor = norm(x + part(x))
        return normalised


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention and feed-forward part.

    State names are those of torch.nn.TransformerEncoderLayer: `self_attn.*` (see `MultiHeadAttention`), `linear1`,
    `linear2`, `norm1`, `norm2`.

    Args:
        d_model: channels.
        nhead: heads; divides d_model.
        dim_feedforward: channels between the two matrices of the feed-forward part.
        activation: "relu" or "gelu" (the exact one).
        layer_norm_eps: of the norms.
        norm_first: normalise what enters a part, rather than the sum behind it.
        bias: matrices and norms have biases.
        attention_bias: the attention's matrices have biases; as `bias` when None.
        separate: three matrices for queries, keys and values instead of torch's packed one.
        unbiased_norm: `UnbiasedLayerNorm` instead of LayerNorm.
        causal: no position sees a later one.

    Raises:
        ValueError: another activation, nhead does not divide d_model, or an unbiased norm without bias.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        attention_bias: bool | None = None,
        separate: bool = False,
        unbiased_norm: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            dim_feedforward,
            2,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            norm_first=norm_first,
            bias=bias,
            unbiased_norm=unbiased_norm,
        )
        biased = bias if attention_bias is None else attention_bias
        self.self_attn = MultiHeadAttention(d_model, nhead, bias=biased, separate=separate, causal=causal)

    def forward(
        self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            x: (batch, length, d_model).
            key_padding_mask: (batch, length), boolean (true is forbidden) or added to the energies.
            attn_mask: (length, length), (batch, length, length) or (batch, nhead, length, length), likewise.

        Returns:
            (batch, length, d_model).
        """
        x = self.add(x, lambda part: self.self_attn(part, key_padding_mask, attn_mask), self.norm1)
        return self.add(x, self.feed_forward, self.norm2)


class TransformerDecoderLayer(TransformerLayer):
    """Self-attention, attention to the encoder's memory and feed-forward part.

    State names are those of torch.nn.TransformerDecoderLayer: `self_attn.*`, `multihead_attn.*` (see
    `MultiHeadAttention`), `linear1`, `linear2`, `norm1`, `norm2`, `norm3`.

    Args:
        d_model: channels of the sequence and of the memory.
        nhead: heads; divides d_model.
        dim_feedforward: channels between the two matrices of the feed-forward part.
        activation: "relu" or "gelu" (the exact one).
        layer_norm_eps: of the norms.
        norm_first: normalise what enters a part, rather than the sum behind it.
        bias: matrices and norms have biases.
        attention_bias: the attentions' matrices have biases; as `bias` when None.
        separate: three matrices for queries, keys and values instead of torch's packed one.
        unbiased_norm: `UnbiasedLayerNorm` instead of LayerNorm.
        causal: no position of the sequence sees a later one. torch takes this as an argument of forward.

    Raises:
        ValueError: another activation, nhead does not divide d_model, or an unbiased norm without bias.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        attention_bias: bool | None = None,
        separate: bool = False,
        unbiased_norm: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__(
            d_model,
            dim_feedforward,
            3,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            norm_first=norm_first,
            bias=bias,
            unbiased_norm=unbiased_norm,
        )
        biased = bias if attention_bias is None else attention_bias
        self.self_attn = MultiHeadAttention(d_model, nhead, bias=biased, separate=separate, causal=causal)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, bias=biased, separate=separate)

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer; all masks are boolean (true is forbidden) or added to the energies.

        Args:
            tgt: (batch, length, d_model).
            memory: (batch, memory, d_model).
            tgt_key_padding_mask: (batch, length).
            memory_key_padding_mask: (batch, memory).
            tgt_mask: (length, length), (batch, length, length) or (batch, nhead, length, length).
            memory_mask: (length, memory), (batch, length, memory) or (batch, nhead, length, memory).

        Returns:
            (batch, length, d_model).
        """

        def read(part: torch.Tensor) -> torch.Tensor:
            return self.multihead_attn.cross(part, memory, memory_key_padding_mask, memory_mask)

        x = self.add(tgt, lambda part: self.self_attn(part, tgt_key_padding_mask, tgt_mask), self.norm1)
        x = self.add(x, read, self.norm2)
        return self.add(x, self.feed_forward, self.norm3)


_SMALL = {"d_model": 12, "nhead": 3, "dim_feedforward": 20}
_JADORE = {"attention_bias": False, "separate": True, "layer_norm_eps": 1e-6}
_ANNOTATED = {"separate": True, "norm_first": True, "unbiased_norm": True, "layer_norm_eps": 1e-6}
_SEQUENCE = TensorInput("x", ("batch", "length", "d_model"))
_PADDING = TensorInput("key_padding_mask", ("batch", "length"), "mask")
_PAIR = (TensorInput("tgt", ("batch", "length", "d_model")), TensorInput("memory", ("batch", "memory", "d_model")))
_PAIR_PADDING = (
    TensorInput("tgt_key_padding_mask", ("batch", "length"), "mask"),
    TensorInput("memory_key_padding_mask", ("batch", "memory"), "mask"),
)
_FEED_FORWARD = {r"(pos_ffn|feed_forward)\.w_1\.": "linear1.", r"(pos_ffn|feed_forward)\.w_2\.": "linear2."}


def _inside(name: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return a key map of an attention for a layer that calls it `name`."""
    return {rf"{name}\.{pattern}": f"{ours}.{template}" for pattern, template in names.items()}


def _jadore(norms: Mapping[str, str]) -> dict[str, str]:
    """Return the key map of a jadore801120 layer; its norms lie in the parts that they follow."""
    return {
        **{rf"{part}\.layer_norm\.": f"{norm}." for part, norm in norms.items()},
        **_inside("slf_attn", "self_attn", JADORE),
        **_inside("enc_attn", "multihead_attn", JADORE),
        **_FEED_FORWARD,
    }


_ANNOTATED_KEYS = {
    **{
        rf"sublayer\.{index}\.norm\.{old}$": f"norm{index + 1}.{new}"
        for index in range(3)
        for old, new in (("a_2", "weight"), ("b_2", "bias"))
    },
    **_inside("self_attn", "self_attn", ANNOTATED),
    **_inside("src_attn", "multihead_attn", ANNOTATED),
    **_FEED_FORWARD,
}


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the energies and the hidden features of the feed-forward part."""
    return largest_of_attention(arguments["dim_feedforward"], arguments["nhead"], sizes)


_PUBLISHED = Published(
    BASE, {"d_model": 512, "nhead": 8, "dim_feedforward": 2048}, {"batch": 1, "length": 128, "memory": 128}
)
_LAYER_PRECISION = f"{PRECISION}; layer normalisation stays in FP32 (it sums squares)"

BLOCKS.add(
    BlockSpec(
        name="transformer-encoder-layer",
        title="Transformer encoder layer",
        paper=TRANSFORMER,
        year=2017,
        code=TRANSFORMER_CODE,
        build=TransformerEncoderLayer,
        original="edgeattn.validation.originals.transformer:TransformerEncoderLayer",
        variants=(
            Variant("official", _SMALL, published=_PUBLISHED, overflow=Overflow(600.0, SEQUENCE_SIZES[0])),
            Variant("norm-first", {**_SMALL, "norm_first": True, "causal": True, "bias": False}),
            Variant("gelu", {**_SMALL, "activation": "gelu"}),
            Variant(
                "jadore",
                {**_SMALL, **_JADORE},
                key_map=_jadore({"slf_attn": "norm1", "pos_ffn": "norm2"}),
                references={"jadore_encoder": {**_SMALL, **_JADORE}},
                inputs=(_SEQUENCE, _PADDING),
            ),
            Variant(
                "annotated",
                {**_SMALL, **_ANNOTATED},
                key_map=_ANNOTATED_KEYS,
                references={"annotated_encoder": {**_SMALL, **_ANNOTATED}},
                inputs=(_SEQUENCE, _PADDING),
            ),
        ),
        largest=_largest,
        precision=_LAYER_PRECISION,
        int8=INT8,
        inputs=(_SEQUENCE,),
        sizes=SEQUENCE_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="transformer-decoder-layer",
        title="Transformer decoder layer",
        paper=TRANSFORMER,
        year=2017,
        code=TRANSFORMER_CODE,
        build=TransformerDecoderLayer,
        original="edgeattn.validation.originals.transformer:TransformerDecoderLayer",
        variants=(
            Variant(
                "official",
                _SMALL,
                published=_PUBLISHED,
                overflow=Overflow(400.0, {"batch": 1, "length": 5, "memory": 7}),
            ),
            Variant("norm-first", {**_SMALL, "norm_first": True, "causal": False}, inputs=(*_PAIR, *_PAIR_PADDING)),
            Variant(
                "jadore",
                {**_SMALL, **_JADORE},
                key_map=_jadore({"slf_attn": "norm1", "enc_attn": "norm2", "pos_ffn": "norm3"}),
                references={"jadore_decoder": {**_SMALL, **_JADORE}},
                inputs=(*_PAIR, *_PAIR_PADDING),
            ),
            Variant(
                "annotated",
                {**_SMALL, **_ANNOTATED},
                key_map=_ANNOTATED_KEYS,
                references={"annotated_decoder": {**_SMALL, **_ANNOTATED}},
                inputs=(*_PAIR, *_PAIR_PADDING),
            ),
        ),
        largest=_largest,
        precision=_LAYER_PRECISION,
        int8=INT8,
        inputs=_PAIR,
        sizes=SEQUENCE_SIZES,
    )
)
