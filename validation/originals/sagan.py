"""SAGAN self-attention, originals.

Paper: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, section 3.
Behaviour: ajbrock/BigGAN-PyTorch, `layers.py`; heykeetae/Self-Attention-GAN, `sagan_models.py`;
rosinality/sagan-pytorch, `model.py` (its first call after loading).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _NormalisedConv2d(nn.Module):
    """Bias-free 1x1 convolution whose weight is divided by u' W v^T after one step of the power method from u0."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 1, 1))
        self.u0: torch.Tensor
        self.register_buffer("u0", torch.zeros(1, out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.weight.view(self.weight.shape[0], -1)
        v = F.normalize(torch.matmul(self.u0, matrix), eps=1e-12)  # (1, in)
        u = F.normalize(torch.matmul(v, matrix.t()), eps=1e-12)  # (1, out)
        sigma = torch.matmul(torch.matmul(v, matrix.t()), u.t()).squeeze()
        return F.conv2d(x, self.weight / sigma)


class PooledSelfAttention(nn.Module):
    """Queries from every position, keys and values from the 2x2 max-pooled map, output convolution, gate, residual.

    Args:
        channels: channels C; theta and phi have C // 8, g has C // 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = _NormalisedConv2d(channels, channels // 8)
        self.phi = _NormalisedConv2d(channels, channels // 8)
        self.g = _NormalisedConv2d(channels, channels // 2)
        self.o = _NormalisedConv2d(channels // 2, channels)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; x and the result are (B, C, H, W) with H and W from 2 on."""
        batch, channels, height, width = x.shape
        theta = self.theta(x).view(batch, channels // 8, height * width)
        phi = F.max_pool2d(self.phi(x), [2, 2]).view(batch, channels // 8, (height // 2) * (width // 2))
        g = F.max_pool2d(self.g(x), [2, 2]).view(batch, channels // 2, (height // 2) * (width // 2))
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)  # (B, N, N / 4)
        o: torch.Tensor = self.o(torch.bmm(g, beta.transpose(1, 2)).view(batch, channels // 2, height, width))
        return self.gamma * o + x


class FullSelfAttention(nn.Module):
    """Every position attends to every position; plain convolutions with bias, no output convolution.

    Args:
        in_dim: channels C; query and key have C // 8.
        return_attention: also return the N x N attention.
    """

    def __init__(self, in_dim: int, return_attention: bool = False) -> None:
        super().__init__()
        self.return_attention = return_attention
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend; x and the result are (B, C, H, W), the attention (B, N, N) has one query per row."""
        batch, channels, height, width = x.shape
        query = self.query_conv(x).view(batch, -1, height * width).permute(0, 2, 1)
        key = self.key_conv(x).view(batch, -1, height * width)
        value = self.value_conv(x).view(batch, -1, height * width)
        attention = F.softmax(torch.bmm(query, key), dim=-1)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(batch, channels, height, width)
        out = self.gamma * out + x
        return (out, attention) if self.return_attention else out


class _NormalisedConv1d(nn.Module):
    """1x1 convolution with bias whose weight_orig is divided by u'^T W v after one step from weight_u, without eps."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_orig = nn.Parameter(torch.zeros(out_channels, in_channels, 1))
        self.register_buffer("weight", torch.zeros(out_channels, in_channels, 1))
        self.weight_u: torch.Tensor
        self.register_buffer("weight_u", torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.weight_orig.view(self.weight_orig.shape[0], -1)
        v = matrix.t() @ self.weight_u
        v = v / v.norm()
        u = matrix @ v
        u = u / u.norm()
        return F.conv1d(x, self.weight_orig / (u @ matrix @ v), self.bias)


class SelfAttentionOverQueries(nn.Module):
    """value @ softmax(query^T key), the softmax over dimension 1, the queries.

    Args:
        in_channel: channels C; query and key have C // 8.
    """

    def __init__(self, in_channel: int) -> None:
        super().__init__()
        self.query = _NormalisedConv1d(in_channel, in_channel // 8)
        self.key = _NormalisedConv1d(in_channel, in_channel // 8)
        self.value = _NormalisedConv1d(in_channel, in_channel)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; x and the result are (B, C, H, W)."""
        shape = x.shape
        flat = x.view(shape[0], shape[1], -1)
        energy = torch.bmm(self.query(flat).permute(0, 2, 1), self.key(flat))  # (B, queries, keys)
        attended = torch.bmm(self.value(flat), F.softmax(energy, 1)).view(*shape)
        return self.gamma * attended + x
