"""Stand-alone self-attention, originals.

Paper: Ramachandran et al., "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019, section 3.
Behaviour of the ports: leaderj1001/Stand-Alone-Self-Attention, `attention.py`; MerHS/SASA-pytorch, `model/sa_layer.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _windows(features: torch.Tensor, kernel: int, stride: int = 1) -> torch.Tensor:
    """Return (B, C, h, w, k, k): the windows of a padded map."""
    return features.unfold(2, kernel, stride).unfold(3, kernel, stride)


class StandAloneAttention(nn.Module):
    """q . (k + r) summed over the channels of a head, softmax over the window, weighted sum of values.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: side of the window.
        groups: number of heads; the first half of a head's channels has row embeddings, the second column embeddings.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7, groups: int = 8) -> None:
        super().__init__()
        self.kernel_size, self.groups = kernel_size, groups
        self.query_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.rel_h = nn.Parameter(torch.zeros(out_channels // 2, 1, 1, kernel_size, 1))
        self.rel_w = nn.Parameter(torch.zeros(out_channels // 2, 1, 1, 1, kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H, W)."""
        batch, _, height, width = x.shape
        size, reach = self.kernel_size, self.kernel_size // 2
        padded = F.pad(x, [reach] * 4)
        query = self.query_conv(x).reshape(batch, self.groups, -1, height, width, 1)
        key = _windows(self.key_conv(padded), size).reshape(batch, self.groups, -1, height, width, size, size)
        value = _windows(self.value_conv(padded), size).reshape(batch, self.groups, -1, height, width, size * size)
        half = key.shape[2] // 2
        row = self.rel_h.reshape(self.groups, half, 1, 1, size, 1)
        column = self.rel_w.reshape(self.groups, half, 1, 1, 1, size)
        key = torch.cat([key[:, :, :half] + row, key[:, :, half:] + column], dim=2).flatten(5)
        attention = torch.softmax((query * key).sum(dim=2, keepdim=True), dim=5)
        return (attention * value).sum(dim=5).reshape(batch, -1, height, width)


class ChannelwiseAttention(nn.Module):
    """q (k + r) and a softmax over the window in each channel, as leaderj1001's AttentionConv computes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result; the first half has row embeddings, the second column embeddings.
        kernel_size: side of the window.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.query_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.rel_h = nn.Parameter(torch.zeros(out_channels // 2, 1, 1, kernel_size, 1))
        self.rel_w = nn.Parameter(torch.zeros(out_channels // 2, 1, 1, 1, kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H, W)."""
        padded = F.pad(x, [self.kernel_size // 2] * 4)
        key = _windows(self.key_conv(padded), self.kernel_size)
        value = _windows(self.value_conv(padded), self.kernel_size)
        upper_half, lower_half = key.tensor_split(2, dim=1)
        key = torch.cat([upper_half + self.rel_h, lower_half + self.rel_w], dim=1)
        attention = torch.softmax((self.query_conv(x)[..., None, None] * key).flatten(4), dim=4)
        return (attention * value.flatten(4)).sum(dim=4)


class ChannelwiseStem(nn.Module):
    """Per-channel attention with values mixed from m projections, as leaderj1001's AttentionStem computes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: side of the window, padded by half of it on each side; surplus windows are dropped.
        groups: the embeddings have out_channels / groups numbers.
        m: number of projections.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 4, groups: int = 1, m: int = 4) -> None:
        super().__init__()
        self.kernel_size, self.m = kernel_size, m
        self.query_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key_conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.value_conv = nn.ModuleList([nn.Conv2d(in_channels, out_channels, 1, bias=False) for _ in range(m)])
        self.emb_a = nn.Parameter(torch.zeros(out_channels // groups, kernel_size))
        self.emb_b = nn.Parameter(torch.zeros(out_channels // groups, kernel_size))
        self.emb_mix = nn.Parameter(torch.zeros(m, out_channels // groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H, W)."""
        height, width = x.shape[2:]
        padded = F.pad(x, [self.kernel_size // 2] * 4)
        key = _windows(self.key_conv(padded), self.kernel_size)[:, :, :height, :width]
        place = (self.emb_mix @ self.emb_a).unsqueeze(2) + (self.emb_mix @ self.emb_b).unsqueeze(1)  # (m, k, k)
        mixture = torch.softmax(place, dim=0)
        projected = torch.stack([projection(padded) for projection in self.value_conv])
        windows = projected.unfold(3, self.kernel_size, 1).unfold(4, self.kernel_size, 1)
        windows = windows[:, :, :, :height, :width]  # (m, B, Co, H, W, k, k)
        value = (mixture.reshape(self.m, 1, 1, 1, 1, self.kernel_size, self.kernel_size) * windows).sum(dim=0)
        attention = torch.softmax((self.query_conv(x)[..., None, None] * key).flatten(4), dim=4)
        return (attention * value.flatten(4)).sum(dim=4)


class SharedMapAttention(nn.Module):
    """One attention map from the logits of all heads together, as MerHS's SelfAttentionConv2d computes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: side of the window, odd, padded by half of it.
        stride: step between windows.
        groups: groups of the projections.
        bias: whether a bias is added to the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        groups: int = 8,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.x_channels = out_channels // groups // 2
        self.weight_query = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.weight_key = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.weight_value = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.relative_x = nn.Parameter(torch.zeros(self.x_channels, kernel_size))
        self.relative_y = nn.Parameter(torch.zeros(self.x_channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H / stride, W / stride), sizes rounded up."""
        reach = self.kernel_size // 2
        padded = F.pad(x, [reach] * 4)
        query = self.weight_query(padded)[:, :, reach:-reach, reach:-reach] if reach else self.weight_query(padded)
        query = query[:, :, :: self.stride, :: self.stride]
        batch, channels, height, width = query.shape
        heads = query.reshape(batch, self.groups, channels // self.groups, height, width)
        x_term = torch.einsum("bgchw,ck->bhwk", heads[:, :, : self.x_channels], self.relative_x)
        y_term = torch.einsum("bgchw,ck->bhwk", heads[:, :, self.x_channels :], self.relative_y)
        key = _windows(self.weight_key(padded), self.kernel_size, self.stride)
        logits = (query[..., None, None] * key).sum(dim=1) + x_term.unsqueeze(3) + y_term.unsqueeze(4)
        attention = torch.softmax(logits.reshape(batch, height, width, -1), dim=3)
        value = _windows(self.weight_value(padded), self.kernel_size, self.stride).flatten(4)
        attended = (attention.unsqueeze(1) * value).sum(dim=4)
        return attended if self.bias is None else attended + self.bias


class PlaceMixtureStem(nn.Module):
    """SharedMapAttention with values mixed from projections at each place of the image, as MerHS's SAMixtureConv2d.

    Args:
        in_height: height of the input.
        in_width: width of the input.
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: side of the window, padded by half of it.
        stride: step between windows.
        groups: groups of the projections.
        mix: number of projections.
        bias: whether a bias is added to the result.
    """

    def __init__(
        self,
        in_height: int,
        in_width: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 4,
        stride: int = 1,
        groups: int = 1,
        mix: int = 4,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.pad, depth = kernel_size // 2, out_channels // groups
        self.x_channels = depth // 2
        self.weight_query = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.weight_key = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.weight_values = nn.ModuleList(
            [nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False) for _ in range(mix)]
        )
        self.relative_x = nn.Parameter(torch.zeros(self.x_channels, kernel_size))
        self.relative_y = nn.Parameter(torch.zeros(self.x_channels, kernel_size))
        self.emb_x = nn.Parameter(torch.zeros(depth, in_width + 2 * self.pad))
        self.emb_y = nn.Parameter(torch.zeros(depth, in_height + 2 * self.pad))
        self.emb_m = nn.Parameter(torch.zeros(mix, depth))
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, (H + 2 pad - k) / stride + 1, the same of W), rounded down."""
        padded = F.pad(x, [self.pad] * 4)
        key = _windows(self.weight_key(padded), self.kernel_size, self.stride)
        height, width = key.shape[2:4]
        first = (self.kernel_size - 1) // 2
        rows = [first + self.stride * row for row in range(height)]
        columns = [first + self.stride * column for column in range(width)]
        query = self.weight_query(padded)[:, :, rows][:, :, :, columns]
        heads = query.unflatten(1, (self.groups, -1))
        x_term = torch.einsum("bgchw,ck->bhwk", heads[:, :, : self.x_channels], self.relative_x)
        y_term = torch.einsum("bgchw,ck->bhwk", heads[:, :, self.x_channels :], self.relative_y)
        logits = (query[..., None, None] * key).sum(dim=1) + x_term.unsqueeze(3) + y_term.unsqueeze(4)
        attention = torch.softmax(logits.flatten(3), dim=3)
        place = (self.emb_m @ self.emb_x).unsqueeze(1) + (self.emb_m @ self.emb_y).unsqueeze(2)
        mixture = torch.softmax(place, dim=0)
        value = sum(p * projection(padded) for p, projection in zip(mixture, self.weight_values, strict=True))
        assert isinstance(value, torch.Tensor)
        windows = _windows(value, self.kernel_size, self.stride).flatten(4)
        attended = (attention.unsqueeze(1) * windows).sum(dim=4)
        return attended if self.bias is None else attended + self.bias
