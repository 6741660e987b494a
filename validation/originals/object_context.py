"""Object context of OCNet, original: self-attention on the whole map, in tiles, and beside dilated convolutions.

Paper: Yuan et al., "OCNet: Object Context Network for Scene Parsing", arXiv 1809.00916.
Behaviour: openseg-group/OCNet.pytorch, `oc_module/{base_oc_block,pyramid_oc_block,asp_oc_block}.py`. Queries and keys
come from one module that has two names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.validation.originals.abn import ABN


class SelfAttention(nn.Module):
    """Context of every position: W(sum over j of softmax_j(ck^-0.5 * k_i . k_j) v_j), without a residual.

    Args:
        in_channels: channels of the input.
        key_channels: channels ck of queries and keys.
        value_channels: channels of the values.
        out_channels: channels of the context.
        scale: factor by which the input is max-pooled; the context is interpolated back.
    """

    def __init__(
        self, in_channels: int, key_channels: int, value_channels: int, out_channels: int, scale: int = 1
    ) -> None:
        super().__init__()
        self.scale = scale
        self.key_channels = key_channels
        self.f_key = nn.Sequential(nn.Conv2d(in_channels, key_channels, 1), ABN(key_channels))
        self.f_query = self.f_key
        self.f_value = nn.Conv2d(in_channels, value_channels, 1)
        self.W = nn.Conv2d(value_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the context (B, out_channels, H, W) of x (B, in_channels, H, W)."""
        size = x.shape[2:]
        if self.scale > 1:
            x = F.max_pool2d(x, self.scale)
        context = self.W(self.attend(self.f_query(x), self.f_key(x), self.f_value(x)))
        if self.scale > 1:
            context = F.interpolate(context, size=size, mode="bilinear", align_corners=True)
        return context

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend inside one map; query and key are (B, ck, h, w), value and result (B, cv, h, w)."""
        similarity = torch.matmul(query.flatten(2).transpose(1, 2), key.flatten(2))
        similarity = torch.softmax(self.key_channels**-0.5 * similarity, dim=-1)
        context = torch.matmul(similarity, value.flatten(2).transpose(1, 2))
        return context.transpose(1, 2).reshape(value.shape)


class TiledSelfAttention(SelfAttention):
    """Self-attention inside each of scale x scale tiles; the last tiles of a row and a column take the remainder."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the context (B, out_channels, H, W) of x (B, in_channels, H, W)."""
        value, query, key = self.f_value(x), self.f_query(x), self.f_key(x)
        rows = []
        for top, bottom in _cuts(x.shape[2], self.scale):
            tiles = []
            for left, right in _cuts(x.shape[3], self.scale):
                query_tile, key_tile, value_tile = (maps[:, :, top:bottom, left:right] for maps in (query, key, value))
                tiles.append(self.attend(query_tile, key_tile, value_tile))
            rows.append(torch.cat(tiles, dim=3))
        return self.W(torch.cat(rows, dim=2))


def _cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Return begin and end of each part; every part has floor(length / parts) positions, the last one all the rest."""
    step = length // parts
    return [(part * step, length if part == parts - 1 else (part + 1) * step) for part in range(parts)]


class BaseOC(nn.Module):
    """Object context of one or several scales, added up, before the features in a 1x1 convolution; or context alone.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the context and of the output.
        key_channels: channels of queries and keys.
        value_channels: channels of the values.
        sizes: scale of each self-attention.
        concat: whether the convolution takes the features beside the context.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        sizes: Sequence[int] = (1,),
        concat: bool = True,
    ) -> None:
        super().__init__()
        self.concat = concat
        self.stages = nn.ModuleList(
            SelfAttention(in_channels, key_channels, value_channels, out_channels, size) for size in sizes
        )
        inputs = 2 * in_channels if concat else in_channels
        self.conv_bn_dropout = nn.Sequential(nn.Conv2d(inputs, out_channels, 1), ABN(out_channels))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        """Map features (B, in_channels, H, W) to (B, out_channels, H, W)."""
        contexts = [stage(feats) for stage in self.stages]
        context = contexts[0]
        for other in contexts[1:]:
            context = context + other
        return self.conv_bn_dropout(torch.cat([context, feats], dim=1) if self.concat else context)


class PyramidOC(nn.Module):
    """Object context in tiles of several sizes, joined with widened features.

    Args:
        in_channels: channels of the features; the keys have half of them, the values all.
        out_channels: channels of each context and of the output.
        sizes: number of tiles per axis of each self-attention.
    """

    def __init__(self, in_channels: int, out_channels: int, sizes: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        group = len(sizes)
        self.stages = nn.ModuleList(
            TiledSelfAttention(in_channels, in_channels // 2, in_channels, out_channels, size) for size in sizes
        )
        self.conv_bn_dropout = nn.Sequential(nn.Conv2d(2 * in_channels * group, out_channels, 1), ABN(out_channels))
        self.up_dr = nn.Sequential(nn.Conv2d(in_channels, in_channels * group, 1), ABN(in_channels * group))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        """Map features (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return self.conv_bn_dropout(torch.cat([self.up_dr(feats), *(stage(feats) for stage in self.stages)], dim=1))


class ASPOC(nn.Module):
    """Object context beside one 1x1 and three dilated 3x3 convolutions.

    Args:
        features: channels of the features.
        out_features: channels of each of the five branches; the output has twice as many.
        dilations: of the three dilated convolutions.
    """

    def __init__(self, features: int, out_features: int = 256, dilations: tuple[int, int, int] = (12, 24, 36)) -> None:
        super().__init__()
        self.context = nn.Sequential(
            nn.Conv2d(features, out_features, 3, padding=1),
            ABN(out_features),
            BaseOC(out_features, out_features, out_features // 2, out_features, sizes=(2,), concat=False),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(features, out_features, 1, bias=False), ABN(out_features))
        self.conv3, self.conv4, self.conv5 = (
            nn.Sequential(
                nn.Conv2d(features, out_features, 3, padding=dilation, dilation=dilation, bias=False), ABN(out_features)
            )
            for dilation in dilations
        )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(out_features * 5, out_features * 2, 1, bias=False), ABN(out_features * 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (B, features, H, W) to (B, 2 * out_features, H, W)."""
        branches = [self.context(x), self.conv2(x), self.conv3(x), self.conv4(x), self.conv5(x)]
        return self.conv_bn_dropout(torch.cat(branches, dim=1))
