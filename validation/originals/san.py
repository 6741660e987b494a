"""SAN's self-attention, originals.

Paper: Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020, sections 3 and 4.
Behaviour: hszhao/SAN, `model/san.py` with the CUDA operators of `lib/sa/functions`; here the neighbourhoods come from
F.unfold of the reflected map, as in that repository's own tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _SelfAttention(nn.Module):
    """The parts that both forms have.

    Args:
        in_planes: channels of the input.
        rel_planes: channels that the weights are computed from.
        out_planes: channels of the result.
        share_planes: number of result channels per weight.
        kernel_size: side of the window.
    """

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.window = kernel_size**2
        self.weight_planes = out_planes // share_planes
        self.conv1 = nn.Conv2d(in_planes, rel_planes, 1)
        self.conv2 = nn.Conv2d(in_planes, rel_planes, 1)
        self.conv3 = nn.Conv2d(in_planes, out_planes, 1)

    def _unfold(self, features: torch.Tensor) -> torch.Tensor:
        """Return (B, C, k * k, N): the window of every position."""
        reflected = F.pad(features, [self.kernel_size // 2] * 4, mode="reflect")
        return F.unfold(reflected, self.kernel_size).unflatten(1, (-1, self.window))

    def _aggregate(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum values (B, C, H, W) with weights (B, G, k * k, N); channel c has the weight c mod G."""
        neighbours = self._unfold(values).unflatten(1, (-1, self.weight_planes))
        return (neighbours * weights.unsqueeze(1)).sum(dim=3).reshape(values.shape)


class PairwiseAttention(_SelfAttention):
    """softmax(conv_w(difference to each neighbour, in features and position)); arguments as in `_SelfAttention`."""

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__(in_planes, rel_planes, out_planes, share_planes, kernel_size)
        self.conv_w = nn.Sequential(
            nn.BatchNorm2d(rel_planes + 2),
            nn.ReLU(),
            nn.Conv2d(rel_planes + 2, rel_planes, 1, bias=False),
            nn.BatchNorm2d(rel_planes),
            nn.ReLU(),
            nn.Conv2d(rel_planes, self.weight_planes, 1),
        )
        self.conv_p = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H, W)."""
        batch, _, height, width = x.shape
        horizontal = torch.linspace(-1, 1, width, dtype=x.dtype).repeat(height, 1)
        vertical = torch.linspace(-1, 1, height, dtype=x.dtype).unsqueeze(1).repeat(1, width)
        position = self.conv_p(torch.stack([horizontal, vertical]).unsqueeze(0))
        difference = self.conv1(x).flatten(2).unsqueeze(2) - self._unfold(self.conv2(x))
        apart = position.flatten(2).unsqueeze(2) - self._unfold(position)
        relation = torch.cat([difference, apart.repeat(batch, 1, 1, 1)], dim=1)
        return self._aggregate(self.conv3(x), torch.softmax(self.conv_w(relation), dim=2))


class PatchwiseAttention(_SelfAttention):
    """conv_w(the position and its whole window), without softmax; arguments as in `_SelfAttention`."""

    def __init__(
        self, in_planes: int, rel_planes: int, out_planes: int, share_planes: int = 8, kernel_size: int = 7
    ) -> None:
        super().__init__(in_planes, rel_planes, out_planes, share_planes, kernel_size)
        planes = rel_planes * (self.window + 1)
        self.conv_w = nn.Sequential(
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, self.weight_planes, 1, bias=False),
            nn.BatchNorm2d(self.weight_planes),
            nn.ReLU(),
            nn.Conv2d(self.weight_planes, self.window * self.weight_planes, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, Ci, H, W) to (B, Co, H, W)."""
        here = self.conv1(x).flatten(2)
        around = self._unfold(self.conv2(x)).flatten(1, 2)
        weights = self.conv_w(torch.cat([here, around], dim=1).unsqueeze(2)).squeeze(2)
        return self._aggregate(self.conv3(x), weights.unflatten(1, (self.weight_planes, self.window)))


class SanBottleneck(nn.Module):
    """Pre-activation residual unit around either form.

    Args:
        form: "pairwise" or "patchwise".
        in_planes: channels of input and result.
        rel_planes: see `_SelfAttention`.
        mid_planes: channels inside the unit.
        share_planes: see `_SelfAttention`.
        kernel_size: side of the window.
    """

    def __init__(
        self,
        form: str,
        in_planes: int,
        rel_planes: int,
        mid_planes: int,
        share_planes: int = 8,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        attention = PairwiseAttention if form == "pairwise" else PatchwiseAttention
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.sam = attention(in_planes, rel_planes, mid_planes, share_planes, kernel_size)
        self.bn2 = nn.BatchNorm2d(mid_planes)
        self.conv = nn.Conv2d(mid_planes, in_planes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""
        out = self.sam(F.relu(self.bn1(x)))
        out = self.conv(F.relu(self.bn2(out)))
        return x + out
