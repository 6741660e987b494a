"""How published attention modules are called, where that is not how our blocks are called.

Each declaration names a block and the leading parameters of the published `forward`; the wrapper takes that call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from edgeattn.blocks.multi_head import MultiHeadAttention
from edgeattn.blocks.transformer import TransformerEncoderLayer


class TorchMultiHead(nn.Module):
    """A block in the place of torch.nn.MultiheadAttention; attention weights come out as None.

    Args:
        source: the module that is replaced.
        block: the block.
    """

    def __init__(self, source: nn.Module, block: MultiHeadAttention) -> None:
        super().__init__()
        self.batch_first = bool(getattr(source, "batch_first", False))
        self.num_heads = block.num_heads
        self.block = block

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """Attend; arguments as in torch, which also wants the mask where `is_causal` is set."""
        del need_weights, average_attn_weights, is_causal
        if not self.batch_first:
            query, key, value = (features.transpose(0, 1) for features in (query, key, value))
        out = self.block.attend(query, key, value, key_padding_mask, _by_head(attn_mask, self.num_heads))
        return (out if self.batch_first else out.transpose(0, 1)), None


class TorchEncoderLayer(nn.Module):
    """A block in the place of torch.nn.TransformerEncoderLayer.

    Args:
        source: the module that is replaced.
        block: the block.
    """

    def __init__(self, source: nn.Module, block: TransformerEncoderLayer) -> None:
        super().__init__()
        self.batch_first = bool(getattr(getattr(source, "self_attn", None), "batch_first", False))
        self.self_attn = SimpleNamespace(batch_first=self.batch_first)  # torch.nn.TransformerEncoder asks for it
        self.num_heads = block.self_attn.num_heads
        self.block = block

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Run the layer; arguments as in torch, which also wants the mask where `is_causal` is set."""
        del is_causal
        x = src if self.batch_first else src.transpose(0, 1)
        out: torch.Tensor = self.block(x, src_key_padding_mask, _by_head(src_mask, self.num_heads))
        return out if self.batch_first else out.transpose(0, 1)


class TimmAttention(nn.Module):
    """A block in the place of timm's `Attention`, whose boolean mask is true where a key may be seen.

    Args:
        source: the module that is replaced.
        block: the block.
    """

    def __init__(self, source: nn.Module, block: MultiHeadAttention) -> None:
        super().__init__()
        del source
        self.block = block

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Attend.

        Raises:
            ValueError: a causal call, which the block decides on when it is made.
        """
        if is_causal:
            raise ValueError("is_causal=True is not taken; give the mask")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        out: torch.Tensor = self.block(x, None, attn_mask)
        return out


def _by_head(mask: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Return torch's mask (batch * heads, length, memory) with an axis of heads; another as it is."""
    return mask.unflatten(0, (-1, heads)) if mask is not None and mask.dim() == 3 else mask


@dataclass(frozen=True)
class Call:
    """A published way of calling a block.

    Attributes:
        block: name of the block.
        parameters: the leading parameters of the published `forward`.
        wrap: makes, of published module and block, the module that takes such calls.
        outputs: how many of the outputs are compared; the others may be absent. All when None.
    """

    block: str
    parameters: tuple[str, ...]
    wrap: Callable[..., nn.Module]
    outputs: int | None = None


CALLS = (
    Call(
        "multi-head",
        ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
        TorchMultiHead,
        outputs=1,
    ),
    Call("transformer-encoder-layer", ("src", "src_mask", "src_key_padding_mask"), TorchEncoderLayer),
    Call("multi-head", ("x", "attn_mask", "is_causal"), TimmAttention),
)


def call_of(module: nn.Module, block: str) -> Call | None:
    """Return the declared way in which a module is called in the role of a block, or None for the block's own."""
    names = tuple(inspect.signature(module.forward).parameters)
    return next(
        (call for call in CALLS if call.block == block and names[: len(call.parameters)] == call.parameters), None
    )
