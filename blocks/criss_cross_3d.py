"""Criss-cross attention in three dimensions.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019 (arXiv 1811.11721), which has
two dimensions. Code: https://github.com/speedinghzl/CCNet, `cc_attention/functions3d.py`.

    y_p = gamma * sum over r in H(p), W(p), D(p) of softmax_r(q_p . k_r) v_r + x_p

with the three lines through the voxel p, one softmax over all of them. H(p) leaves p itself out, W(p) and D(p) do not.
The published code reads the weights of W(p) in another order than it wrote them, see `CrissCrossAttention3D`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgeattn.blocks.criss_cross import CCNET
from edgeattn.blocks.folding import fold_gamma
from edgeattn.blocks.precision import LOWEST
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant


def _gather(attention: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum the values of every line, weighted by its attention.

    The lines are folded into the batch, because channels-last results are cheap to permute, and the transposed values
    stay a transpose of the last two axes, which ONNX Runtime absorbs into the product.

    Args:
        attention: (batch, a, b, length, length), the last axis gives.
        value: (batch, a, b, channels, length).

    Returns:
        (batch, a, b, length, channels).
    """
    gathered = torch.matmul(attention.flatten(0, 2), value.transpose(1, 2))
    return gathered.unflatten(0, attention.shape[:3])


class CrissCrossAttention3D(nn.Module):
    """One recurrence of criss-cross attention in a volume: `gamma * attended + x`.

    State names and shapes are the official ones: `query_conv`, `key_conv` (in_dim // 8), `value_conv`, `gamma` (1,).
    Every voxel is its own neighbour twice, on the lines along width and frames, as in the official code.

    The official code lays the weights along the width out as (batch, height, giving column, receiving column, frame)
    and then reads the same memory as (batch, height, frame, receiving column, giving column), so that they meet other
    values than they were made for. Weights trained with it need the same order.

    Args:
        in_dim: number of input and output channels, at least 8.
        published_order: read the weights along the width as the official code does; otherwise as the equation says.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, in_dim: int, *, published_order: bool = True) -> None:
        super().__init__()
        if in_dim < 8:
            raise ValueError(
                f"in_dim={in_dim} is too small: queries have in_dim // 8 channels. Give 8 channels or more."
            )
        self.published_order = published_order
        self.query_conv = nn.Conv3d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv3d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv3d(in_dim, in_dim, kernel_size=1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_dim, height, width, frames) to the same shape, for any height, width and frames.

        The largest intermediate is (batch, height, width, frames, height + width + frames).
        """
        value = self.value_conv(x)
        if self.gamma is not None:
            value = self.gamma * value
        value_h, value_w, value_d = (
            value.permute(0, 3, 4, 1, 2).flatten(0, 2),
            value.permute(0, 2, 4, 1, 3).flatten(0, 2),
            value.permute(0, 2, 3, 1, 4).flatten(0, 2),
        )
        query, key = self.query_conv(x), self.key_conv(x)
        height, width = x.shape[2:4]
        index = torch.arange(height, device=x.device)
        energy_h = torch.matmul(query.permute(0, 3, 4, 2, 1), key.permute(0, 3, 4, 1, 2))
        energy_h = energy_h.masked_fill(index[:, None] == index, LOWEST).permute(0, 3, 1, 2, 4)
        energy_w = torch.matmul(query.permute(0, 2, 4, 3, 1), key.permute(0, 2, 4, 1, 3)).transpose(2, 3)
        energy_d = torch.matmul(query.permute(0, 2, 3, 4, 1), key.permute(0, 2, 3, 1, 4))
        attention = torch.cat([energy_h, energy_w, energy_d], dim=4).softmax(dim=4)
        attention_h = attention[..., :height].permute(0, 2, 3, 1, 4)
        attention_w = attention[..., height : height + width]
        if self.published_order:
            lines = (x.shape[0], height, x.shape[4], width, width)
            attention_w = attention_w.permute(0, 1, 4, 2, 3).reshape(lines)
        else:
            attention_w = attention_w.transpose(2, 3)
        attention_d = attention[..., height + width :]
        out_h = _gather(attention_h, value_h).permute(0, 3, 1, 2, 4)
        out_w = _gather(attention_w, value_w).transpose(2, 3)
        out_d = _gather(attention_d, value_d)
        return (out_h + out_w + out_d).permute(0, 4, 1, 2, 3) + x

    def prepare_for_export(self) -> CrissCrossAttention3D:
        """Return a copy whose value projection carries gamma (exact: attention is linear in the values)."""
        folded = copy.deepcopy(self)
        fold_gamma(folded.gamma, folded.value_conv)
        folded.gamma = None
        return folded


BLOCKS.add(
    BlockSpec(
        name="criss-cross-3d",
        title="criss-cross attention in three dimensions",
        paper=CCNET,
        year=2020,
        code="https://github.com/speedinghzl/CCNet",
        build=CrissCrossAttention3D,
        original="edgeattn.validation.originals.criss_cross_3d:CrissCrossAttention3D",
        variants=(
            Variant(
                "official",
                {"in_dim": 16},
                listings={"ccnet_cca3d": {"in_dim": 64}},
                references={"ccnet_cca3d": {"in_dim": 8}},
                published=Published(
                    "the module's own example", {"in_dim": 64}, {"batch": 1, "height": 32, "width": 48, "frames": 16}
                ),
                overflow=Overflow(200.0, {"batch": 1, "height": 3, "width": 4, "frames": 2}),
            ),
            Variant("as-defined", {"in_dim": 16, "published_order": False}),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"]
            * (sizes["height"] * sizes["width"] * sizes["frames"])
            * max(sizes["height"] + sizes["width"] + sizes["frames"], arguments["in_dim"])
        ),
        precision="energies, mask and softmax stay in FP32 (dot products overflow); the sum over values runs in FP16",
        int8="the three projections; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_dim", "height", "width", "frames")),),
    )
)
