"""Asymmetric non-local blocks, original.

Paper: Zhu et al., "Asymmetric Non-local Neural Networks for Semantic Segmentation", ICCV 2019, sections 3.2 to 3.4.
Behaviour: MendelXu/ANN, `models/seg/utils/afnb.py`, `models/seg/utils/apnb.py`; mmseg, `decode_heads/ann_head.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def _sample(features: torch.Tensor, grids: Sequence[int]) -> torch.Tensor:
    """Average (B, C, H, W) over the cells of every grid and line them up: (B, C, S)."""
    return torch.cat([F.adaptive_avg_pool2d(features, (grid, grid)).flatten(2) for grid in grids], dim=2)


def _conv_norm_relu(inputs: int, outputs: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=bias), nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU()))


class _Stage(nn.Module):
    """softmax(query key / sqrt(ck)) value, where key and value are sampled from projected maps."""

    def __init__(self, low: int, high: int, ck: int, cv: int, out: int, grids: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.factor = ck**-0.5
        self.f_key = _conv_norm_relu(low, ck, bias)
        self.f_query = _conv_norm_relu(high, ck, bias)
        self.f_value = nn.Conv2d(low, cv, 1)
        self.W = nn.Conv2d(cv, out, 1)

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = high.shape
        value = _sample(self.f_value(low), self.grids).permute(0, 2, 1)  # (B, S, cv)
        query = self.f_query(high).flatten(2).permute(0, 2, 1)  # (B, N, ck)
        key = _sample(self.f_key(low), self.grids)  # (B, ck, S)
        similarity = F.softmax(self.factor * torch.matmul(query, key), dim=-1)
        context = torch.matmul(similarity, value).permute(0, 2, 1).contiguous()
        result: torch.Tensor = self.W(context.view(batch, value.shape[2], height, width))
        return result


class AFNB(nn.Module):
    """Keys and values come from the low-level map, queries from the high-level one.

    Args:
        low_in_channels: channels of the low-level map.
        high_in_channels: channels of the high-level map.
        out_channels: channels of the result.
        key_channels: channels ck of key and query.
        value_channels: channels cv of value.
        stages: number of attention stages, which are summed.
        psp_size: sampled grids.
        norm_bias: bias of the convolutions that a batch normalisation follows.
    """

    def __init__(
        self,
        low_in_channels: int,
        high_in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        stages: int = 1,
        psp_size: Sequence[int] = (1, 3, 6, 8),
        norm_bias: bool = True,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for _ in range(stages):
            self.stages.append(
                _Stage(
                    low_in_channels, high_in_channels, key_channels, value_channels, out_channels, psp_size, norm_bias
                )
            )
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(out_channels + high_in_channels, out_channels, 1, bias=norm_bias),
            nn.BatchNorm2d(out_channels),
            nn.Dropout2d(0.05),
        )

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return (B, out, H, W) from low (B, low, H', W') and high (B, high, H, W)."""
        context = self.stages[0](low, high)
        for stage in self.stages[1:]:
            context = context + stage(low, high)
        result: torch.Tensor = self.conv_bn_dropout(torch.cat((context, high), dim=1))
        return result


class APNB(nn.Module):
    """Keys, values and queries come from one map; the query's projection is the key's.

    Args:
        channels: channels of the map and of the result.
        key_channels: channels ck of key and query.
        value_channels: channels cv of value.
        stages: number of attention stages, which are summed.
        psp_size: sampled grids.
        norm_bias: bias of the convolutions that a batch normalisation follows.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int,
        value_channels: int,
        stages: int = 1,
        psp_size: Sequence[int] = (1, 3, 6, 8),
        norm_bias: bool = True,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for _ in range(stages):
            stage = _Stage(channels, channels, key_channels, value_channels, channels, psp_size, norm_bias)
            stage.f_query = stage.f_key
            self.stages.append(stage)
        self.conv_bn_dropout = _conv_norm_relu(2 * channels, channels, norm_bias)
        self.conv_bn_dropout.append(nn.Dropout2d(0.05))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) from (B, C, H, W)."""
        context = self.stages[0](x, x)
        for stage in self.stages[1:]:
            context = context + stage(x, x)
        result: torch.Tensor = self.conv_bn_dropout(torch.cat((context, x), dim=1))
        return result
