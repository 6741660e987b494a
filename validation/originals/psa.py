"""Point-wise spatial attention of PSANet, original.

Paper: Zhao et al., "PSANet: Point-wise Spatial Attention Network for Scene Parsing", ECCV 2018, section 3.
Behaviour: hszhao/semseg, `model/psanet.py` and `lib/psa/src`; open-mmlab/mmsegmentation, `decode_heads/psa_head.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PointwiseSpatialAttention(nn.Module):
    """Reduce, shrink, predict a mask at each pixel, spread it over the map, aggregate, project, enlarge, concatenate.

    Args:
        in_channels: channels of the input.
        mid_channels: channels C of the aggregated features.
        psa_type: 0 for collect, 1 for distribute, 2 for both.
        compact: whether masks are absolute (as large as the map) instead of relative to the pixel.
        shrink_factor: how many times smaller the map is on which masks are predicted.
        mask_h: mask height.
        mask_w: mask width.
        normalization_factor: divisor of the aggregated features; None for the number of mask entries.
        psa_softmax: whether the weights of each receiver are normalised by a softmax.
        proj_padding: padding of the last 1x1 convolution (mmsegmentation: 1).
        align_corners: of all resizing; None for mmsegmentation's rule.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        mid_channels: int = 512,
        psa_type: int = 2,
        compact: bool = False,
        shrink_factor: int = 2,
        mask_h: int = 59,
        mask_w: int = 59,
        normalization_factor: float | None = 1.0,
        psa_softmax: bool = True,
        proj_padding: int = 0,
        align_corners: bool | None = True,
    ) -> None:
        super().__init__()
        self.psa_type = psa_type
        self.compact = compact
        self.shrink_factor = shrink_factor
        self.mask = (mask_h, mask_w)
        self.normalization_factor = normalization_factor or mask_h * mask_w
        self.psa_softmax = psa_softmax
        self.proj_padding = proj_padding
        self.align_corners = align_corners
        self.reduce = _conv_bn_relu(in_channels, mid_channels)
        self.attention = _conv_bn_relu(mid_channels, mid_channels)
        self.attention.append(nn.Conv2d(mid_channels, mask_h * mask_w, 1, bias=False))
        if psa_type == 2:
            self.reduce_p = _conv_bn_relu(in_channels, mid_channels)
            self.attention_p = _conv_bn_relu(mid_channels, mid_channels)
            self.attention_p.append(nn.Conv2d(mid_channels, mask_h * mask_w, 1, bias=False))
        self.proj = _conv_bn_relu(mid_channels * (2 if psa_type == 2 else 1), in_channels, proj_padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, in_channels, H, W) and the update of the same shape, concatenated along the channels."""
        if self.psa_type == 2:
            aggregated = torch.cat(
                [
                    self._aggregate(self._shrink(self.reduce(x)), self.attention, receiver_predicts=True),
                    self._aggregate(self._shrink(self.reduce_p(x)), self.attention_p, receiver_predicts=False),
                ],
                dim=1,
            )
        else:
            reduced = self._shrink(self.reduce(x))
            aggregated = self._aggregate(reduced, self.attention, receiver_predicts=self.psa_type == 0)
        update = self.proj(aggregated)
        if self.shrink_factor != 1 or self.proj_padding:
            size, aligned = x.shape[2:], self._aligned(x)
            update = F.interpolate(update, size=size, mode="bilinear", align_corners=aligned)
        return torch.cat((x, update), 1)

    def _aligned(self, x: torch.Tensor) -> bool:
        """Say whether a map of this size is resized with aligned corners."""
        if self.align_corners is None:
            return bool(x.shape[2] % self.shrink_factor and x.shape[3] % self.shrink_factor)
        return self.align_corners

    def _shrink(self, reduced: torch.Tensor) -> torch.Tensor:
        if self.shrink_factor == 1:
            return reduced
        aligned = self._aligned(reduced)
        extra = 1 if aligned else 0
        size = [(length - extra) // self.shrink_factor + extra for length in reduced.shape[2:]]
        return F.interpolate(reduced, size=size, mode="bilinear", align_corners=aligned)

    def _aggregate(self, features: torch.Tensor, attention: nn.Module, *, receiver_predicts: bool) -> torch.Tensor:
        """Return for each receiver the sum of the senders' features (B, C, h, w) under its column of the map."""
        batch, channels, height, width = features.shape
        mask = attention(features)
        if self.compact:
            attention_map = mask.view(batch, height * width, height * width)
            if not receiver_predicts:
                attention_map = attention_map.transpose(1, 2)
        else:
            attention_map = self._spread(mask, receiver_predicts)
        if self.psa_softmax:
            attention_map = torch.softmax(attention_map, dim=1)
        aggregated = torch.bmm(features.view(batch, channels, height * width), attention_map)
        return aggregated.view(batch, channels, height, width) * (1.0 / self.normalization_factor)

    def _spread(self, mask: torch.Tensor, receiver_predicts: bool) -> torch.Tensor:
        """Write mask entries to (B, senders, receivers), one by one as the published kernel does; the rest stays 0."""
        batch, _, height, width = mask.shape
        mask_h, mask_w = self.mask
        half_h, half_w = (mask_h - 1) // 2, (mask_w - 1) // 2
        entries, owners, others = [], [], []
        for row in range(height):
            for column in range(width):
                for mask_row in range(max(0, half_h - row), min(mask_h, height + half_h - row)):
                    for mask_column in range(max(0, half_w - column), min(mask_w, width + half_w - column)):
                        entries.append(mask_row * mask_w + mask_column)
                        owners.append(row * width + column)
                        others.append((row + mask_row - half_h) * width + column + mask_column - half_w)
        entry, owner, other = (torch.tensor(indices, device=mask.device) for indices in (entries, owners, others))
        sender, receiver = (other, owner) if receiver_predicts else (owner, other)
        spread = mask.new_zeros(batch, height * width, height * width)
        spread[:, sender, receiver] = mask.flatten(2)[:, entry, owner]
        return spread


def _conv_bn_relu(in_channels: int, out_channels: int, padding: int = 0) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 1, padding=padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
