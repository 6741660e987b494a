"""Local relation, original.

Paper: Hu et al., "Local Relation Networks for Image Recognition", ICCV 2019, section 3.
Behaviour of the operator: microsoft/Swin-Transformer, branch LR-Net, `ops/local_relation/src`, which is CUDA code; here
the neighbourhoods come from F.unfold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LocalRelation(nn.Module):
    """Weights a window by softmax(similarity + position weight) in each group of channels.

    Args:
        kernel_size: side of the window.
        groups: number of groups that query and value channels are divided into.
        stride: step between windows.
        dilation: step between neighbours.
        scale: multiplies each channel's similarity.
        no_define_value: similarity of neighbours that lie outside the image.
        sim_method: 0 to 5, see `_similarity`.
    """

    def __init__(
        self,
        kernel_size: int = 7,
        groups: int = 1,
        stride: int = 1,
        dilation: int = 1,
        scale: float = 1.0,
        no_define_value: float = -100.0,
        sim_method: int = 0,
    ) -> None:
        super().__init__()
        self.kernel_size, self.groups = kernel_size, groups
        self.stride, self.dilation = stride, dilation
        self.scale, self.no_define_value, self.sim_method = scale, no_define_value, sim_method

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pos_weight: torch.Tensor
    ) -> torch.Tensor:
        """Aggregate; query is (B, Cq, h, w), key (B, >= Cq, H, W), value (B, C, H, W), pos_weight (G, K, K)."""
        batch, query_channels, height, width = query.shape
        per_group = query_channels // self.groups
        extra = key.shape[1] - query_channels
        windows = self._windows(key)  # (B, Ck, K * K, N)
        near = windows[:, :query_channels].reshape(batch, self.groups, per_group, -1, height * width)
        here = query.reshape(batch, self.groups, per_group, 1, height * width)
        similarity = (self._similarity(here, near) * self.scale).sum(dim=2)  # (B, G, K * K, N)
        if extra:
            channel_of_group = torch.arange(self.groups) * extra // self.groups + query_channels
            similarity = similarity + per_group * windows[:, channel_of_group]
        known = self._windows(torch.ones_like(key[:1, :1])) == 1
        similarity = torch.where(known, similarity, self.no_define_value)
        weights = torch.softmax(similarity + pos_weight.reshape(1, self.groups, -1, 1), dim=2)
        values = self._windows(value).reshape(batch, self.groups, -1, self.kernel_size**2, height * width)
        return (weights.unsqueeze(2) * values).sum(dim=3).reshape(batch, -1, height, width)

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """Return (B, C, K * K, N): the window of each position, zero outside the image."""
        first = self.kernel_size // 2 * self.dilation
        last = (self.kernel_size - 1 - self.kernel_size // 2) * self.dilation
        columns = F.unfold(
            F.pad(features, (first, last, first, last)), self.kernel_size, dilation=self.dilation, stride=self.stride
        )
        return columns.reshape(features.shape[0], features.shape[1], self.kernel_size**2, columns.shape[2])

    def _similarity(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return the similarity of numbers, by `sim_method`."""
        distance = torch.abs(query - key)
        if self.sim_method == 0:
            return query * key
        if self.sim_method == 1:
            return key
        if self.sim_method == 2:
            return -distance
        if self.sim_method == 3:
            return -distance / (torch.abs(query) + torch.abs(key) + 1)
        if self.sim_method == 4:
            return -distance * distance / (torch.abs(query * key) + 1)
        return -distance * distance


class LocalRelationLayer(nn.Module):
    """The layer of the paper; each group of channels has one scalar query and key, and the value is the input.

    Args:
        channels: channels of input and output.
        kernel_size: side of the window.
        group_channels: number of channels m of a group.
        hidden: width of the two-layer network that maps a relative position (x, y) to the prior.
        stride: step between windows.
        sim_method: see `LocalRelation`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        group_channels: int = 8,
        hidden: int = 16,
        stride: int = 1,
        sim_method: int = 0,
    ) -> None:
        super().__init__()
        groups = channels // group_channels
        self.kernel_size, self.stride = kernel_size, stride
        self.query_conv = nn.Conv2d(channels, groups, 1)
        self.key_conv = nn.Conv2d(channels, groups, 1)
        self.prior = nn.Sequential(nn.Conv2d(2, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, groups, 1))
        self.output_conv = nn.Conv2d(channels, channels, 1)
        self.relation = LocalRelation(kernel_size, groups, stride=stride, sim_method=sim_method)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride), sizes rounded up."""
        query = self.query_conv(x)[:, :, :: self.stride, :: self.stride]
        reach = self.kernel_size // 2
        offset = torch.arange(-reach, reach + 1).to(x) / reach
        y, x_offset = torch.meshgrid(offset, offset, indexing="ij")
        prior = self.prior(torch.stack([x_offset, y]).unsqueeze(0)).squeeze(0)
        return self.output_conv(self.relation(query, self.key_conv(x), x, prior))
