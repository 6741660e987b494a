"""`PixelAttentionCore`: softmax(query^T key) value over positions, the core of non-local blocks and their kin."""

from __future__ import annotations

from typing import ClassVar

import torch

from edgeattn.blocks.core import AttentionCore


class PixelAttentionCore(AttentionCore):
    """Every query position attends to every key position with one softmax; scales are folded into the query."""

    op_type: ClassVar[str] = "PixelAttention"

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            query: (batch, head_channels, queries), positions flattened row by row.
            key: (batch, head_channels, keys).
            value: (batch, channels, keys).

        Returns:
            (batch, channels, queries). The only larger intermediate is (batch, queries, keys), which the plugin never
            stores.
        """
        attention = torch.matmul(query.transpose(1, 2), key).softmax(dim=2)
        return torch.matmul(value, attention.transpose(1, 2))
