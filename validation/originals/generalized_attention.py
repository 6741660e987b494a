"""Generalised attention, original.

Paper: Zhu et al., "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", ICCV 2019, section 3.
Behaviour: open-mmlab/mmcv, `mmcv/cnn/bricks/generalized_attention.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GeneralizedAttention(nn.Module):
    """Sum of up to four energies over all pairs of positions, softmax over keys, weighted values, shortcut.

    Args:
        in_channels: channels.
        spatial_range: local range, or -1.
        num_heads: heads.
        position_embedding_dim: size of the position embedding of both axes together; in_channels if not positive.
        position_magnitude: factor of coordinate differences.
        kv_stride: stride of keys.
        q_stride: stride of queries.
        attention_type: which of query-key content, query-position, key content, position to add.
        transposed_query: see the published code of types with the second but not the fourth digit: its row term meets
            the queries in column-major order. None or False: in row-major order, as the paper has it.
        export_size: without meaning here.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_range: int = -1,
        num_heads: int = 9,
        position_embedding_dim: int = -1,
        position_magnitude: int = 1,
        kv_stride: int = 2,
        q_stride: int = 1,
        attention_type: str = "1111",
        transposed_query: bool | None = None,
        export_size: int = 256,
    ) -> None:
        super().__init__()
        self.terms = [digit == "1" for digit in attention_type]
        self.heads, self.dim = num_heads, in_channels // num_heads
        self.position_dim = in_channels if position_embedding_dim <= 0 else position_embedding_dim
        self.magnitude = position_magnitude
        self.spatial_range, self.kv_stride, self.q_stride = spatial_range, kv_stride, q_stride
        self.transposed_query = transposed_query
        inner = self.heads * self.dim
        if self.terms[0] or self.terms[1]:
            self.query_conv = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        if self.terms[0] or self.terms[2]:
            self.key_conv = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        if self.terms[1] or self.terms[3]:
            self.appr_geom_fc_x = nn.Linear(self.position_dim // 2, inner, bias=False)
            self.appr_geom_fc_y = nn.Linear(self.position_dim // 2, inner, bias=False)
        if self.terms[2]:
            self.appr_bias = nn.Parameter(torch.zeros(inner))
        if self.terms[3]:
            self.geom_bias = nn.Parameter(torch.zeros(inner))
        self.proj_conv = nn.Conv2d(inner, in_channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        if spatial_range >= 0:
            self.local_constraint_map = nn.Parameter(self.constraint_map(in_channels), requires_grad=False)

    def constraint_map(self, in_channels: int) -> torch.Tensor:
        """Return the published map (L, L, L', L'): 1 where a key is out of a query's range."""
        length = {256: 84, 512: 42}[in_channels]
        kv_length = int((length - 1.0) / self.kv_stride + 1)
        bounds = []
        for i in range(length):
            low = max((i - self.spatial_range) // self.kv_stride, 0)
            high = min((i + self.spatial_range + 1) // self.kv_stride + 1, length)
            bounds.append((low, high))
        constraint = torch.ones(length, length, kv_length, kv_length, dtype=torch.uint8)
        for iy, (top, bottom) in enumerate(bounds):
            for ix, (left, right) in enumerate(bounds):
                constraint[iy, ix, top:bottom, left:right] = 0
        return constraint

    def embedding(self, queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
        """Return the embedding (queries, keys, position_dim / 2) of coordinate differences on one axis."""
        query = torch.arange(queries, dtype=like.dtype, device=like.device).view(-1, 1, 1) * self.q_stride
        key = torch.arange(keys, dtype=like.dtype, device=like.device).view(1, -1, 1) * self.kv_stride
        difference = (query - key) * self.magnitude
        index = torch.arange(0, self.position_dim / 4, dtype=like.dtype, device=like.device)
        wave = 1000.0 ** ((4.0 / self.position_dim) * index)
        scaled = difference / wave.view(1, 1, -1)
        return torch.cat((scaled.sin(), scaled.cos()), dim=2)

    def forward(self, x_input: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        x_q = F.avg_pool2d(x_input, kernel_size=1, stride=self.q_stride)
        x_kv = F.avg_pool2d(x_input, kernel_size=1, stride=self.kv_stride)
        n, _, h, w = x_q.shape
        h_kv, w_kv = x_kv.shape[2:]
        m, d = self.heads, self.dim
        content, query_position, key_only, position_only = self.terms
        query = key = x_q
        if content or query_position:
            query = self.query_conv(x_q).view(n, m, d, h * w).permute(0, 1, 3, 2)
        if content or key_only:
            key = self.key_conv(x_kv).view(n, m, d, h_kv * w_kv)
        if self.terms == [False, False, True, False]:
            saliency = self.appr_bias.view(1, m, 1, d).repeat(n, 1, 1, 1)
            energy = torch.matmul(saliency, key)
            h = w = 1
        else:
            energy = torch.zeros((n, m, h, w, h_kv, w_kv), dtype=x_input.dtype, device=x_input.device)
            if content:
                biased = query + self.appr_bias.view(1, m, 1, d) if key_only else query
                energy = torch.matmul(biased, key).view(n, m, h, w, h_kv, w_kv)
            elif key_only:
                saliency = self.appr_bias.view(1, m, 1, d).repeat(n, 1, 1, 1)
                energy = energy + torch.matmul(saliency, key).view(n, m, 1, 1, h_kv, w_kv)
            if query_position or position_only:
                energy_x, energy_y = self.position_energies(query, x_input, n, (h, w), (h_kv, w_kv))
                energy = energy + (energy_x + energy_y)
            energy = energy.view(n, m, h * w, h_kv * w_kv)
            if self.spatial_range >= 0:
                local = self.constraint_map(x_input.shape[1]).to(x_input.device)[:h, :w, :h_kv, :w_kv]
                energy = energy.masked_fill(local.reshape(1, 1, h * w, h_kv * w_kv).bool(), float("-inf"))
        attention = F.softmax(energy, dim=3)
        value = self.value_conv(x_kv).view(n, m, d, h_kv * w_kv).permute(0, 1, 3, 2)
        out = torch.matmul(attention, value).permute(0, 1, 3, 2).contiguous().view(n, m * d, h, w)
        out = self.proj_conv(out)
        if self.q_stride > 1:
            out = F.interpolate(out, size=x_input.shape[2:], mode="bilinear", align_corners=False)
        return self.gamma * out + x_input

    def position_energies(
        self, query: torch.Tensor, x: torch.Tensor, n: int, size: tuple[int, int], kv_size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the energies of columns (n, M, H, W, 1, w) and of rows (n, M, H, W, h, 1), broadcastable."""
        (h, w), (h_kv, w_kv) = size, kv_size
        m, d = self.heads, self.dim
        feature_x = self.appr_geom_fc_x(self.embedding(w, w_kv, x)).view(1, w, w_kv, m, d)
        feature_y = self.appr_geom_fc_y(self.embedding(h, h_kv, x)).view(1, h, h_kv, m, d)
        feature_x = feature_x.permute(0, 3, 1, 2, 4).repeat(n, 1, 1, 1, 1) / 2**0.5
        feature_y = feature_y.permute(0, 3, 1, 2, 4).repeat(n, 1, 1, 1, 1) / 2**0.5
        if not self.terms[1]:
            bias = self.geom_bias.view(1, m, d, 1).repeat(n, 1, 1, 1)
            energy_x = torch.matmul(feature_x.reshape(n, m, w * w_kv, d), bias).view(n, m, 1, w, 1, w_kv)
            energy_y = torch.matmul(feature_y.reshape(n, m, h * h_kv, d), bias).view(n, m, h, 1, h_kv, 1)
            return energy_x, energy_y
        if self.terms[3]:
            query = query + self.geom_bias.view(1, m, 1, d)
        rows = query.view(n, m, h, w, d)
        columns = rows.permute(0, 1, 3, 2, 4)
        if self.transposed_query:
            rows = columns
        energy_x = torch.matmul(columns, feature_x.permute(0, 1, 2, 4, 3)).permute(0, 1, 3, 2, 4).unsqueeze(4)
        energy_y = torch.matmul(rows, feature_y.permute(0, 1, 2, 4, 3)).unsqueeze(5)
        return energy_x, energy_y
