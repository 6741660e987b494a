"""Criss-cross attention.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019 (arXiv 1811.11721).
Code: https://github.com/speedinghzl/CCNet, `cc_attention/functions.py`.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import nn

from edgeattn.blocks.core import AttentionCore
from edgeattn.blocks.folding import fold_gamma
from edgeattn.blocks.precision import LOWEST
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


class CrissCrossCore(AttentionCore):
    """Each pixel attends to its column (own position excluded) and its row (own position included)."""

    op_type: ClassVar[str] = "CrissCrossAttention"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Attend along both lines with one softmax and add the residual.

        Args:
            query: (batch, head_channels, height, width).
            key: (batch, head_channels, height, width).
            value: (batch, channels, height, width).
            residual: (batch, channels, height, width), added to the result.

        Returns:
            (batch, channels, height, width). The largest intermediate is (batch, height, width, height + width).
        """
        height = query.shape[2]
        own_row = torch.eye(height, dtype=torch.bool, device=query.device)
        energy_columns = torch.matmul(query.permute(0, 3, 2, 1), key.permute(0, 3, 1, 2))
        energy_columns = energy_columns.masked_fill(own_row, LOWEST).transpose(1, 2)
        energy_rows = torch.matmul(query.permute(0, 2, 3, 1), key.transpose(1, 2))
        attention = torch.cat([energy_columns, energy_rows], dim=3).softmax(dim=3)
        attention_columns = attention[..., :height].permute(0, 2, 3, 1)
        attention_rows = attention[..., height:].transpose(2, 3)
        out_columns = torch.matmul(value.permute(0, 3, 1, 2), attention_columns).permute(0, 2, 3, 1)
        out_rows = torch.matmul(value.transpose(1, 2), attention_rows).transpose(1, 2)
        return out_columns + out_rows + residual


class CrissCrossAttention(nn.Module):
    """One recurrence of criss-cross attention: `gamma * attended + x`.

    State names and shapes are the official ones: `query_conv`, `key_conv` (channels // 8), `value_conv`, `gamma` (1,).

    Args:
        in_dim: number of input and output channels, at least 8.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        if in_dim < 8:
            raise ValueError(
                f"criss-cross attention needs at least 8 channels (queries have in_dim // 8), got {in_dim}"
            )
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(1))
        self.core = CrissCrossCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_dim, height, width) to the same shape, for any height and width."""
        value = self.value_conv(x)
        if self.gamma is not None:
            value = self.gamma * value
        return self.core(self.query_conv(x), self.key_conv(x), value, x)

    def prepare_for_export(self) -> CrissCrossAttention:
        """Return a copy whose value projection carries gamma (exact: attention is linear in the values)."""
        folded = copy.deepcopy(self)
        fold_gamma(folded.gamma, folded.value_conv)
        folded.gamma = None
        return folded


CCNET = "CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019"
CODE = "https://github.com/speedinghzl/CCNet, https://github.com/open-mmlab/mmcv"
PRECISION = "energies, mask and softmax stay in FP32 (dot products overflow); the sum over values runs in FP16"


def largest_of_cross(channels: int, sizes: Sizes) -> int:
    """Return the elements of the larger of the attention (batch, height, width, height + width) and a feature map."""
    return sizes["batch"] * sizes["height"] * sizes["width"] * max(sizes["height"] + sizes["width"], channels)


BLOCKS.add(
    BlockSpec(
        name="criss-cross",
        title="criss-cross attention",
        paper=CCNET,
        year=2019,
        code=CODE,
        build=CrissCrossAttention,
        original="edgeattn.validation.originals.criss_cross:CrissCrossAttention",
        variants=(
            Variant(
                "official",
                {"in_dim": 16},
                listings={"ccnet_cca": {"in_dim": 512}},
                published=Published(
                    "CCNet, ResNet-101, Cityscapes 769x769", {"in_dim": 512}, {"batch": 1, "height": 97, "width": 97}
                ),
                overflow=Overflow(200.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant("mmcv", {"in_dim": 16}, key_map={r"gamma\.scale": "gamma"}, listings={"mmcv_cca": {"in_dim": 512}}),
        ),
        largest=lambda arguments, sizes: largest_of_cross(arguments["in_dim"], sizes),
        precision=PRECISION,
        int8="the three projections; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_dim", "height", "width")),),
    )
)
