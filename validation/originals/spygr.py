"""Spatial pyramid graph reasoning, original.

Paper: Li et al., "Spatial Pyramid Based Graph Reasoning for Semantic Segmentation", CVPR 2020, section 3. The authors
published no code; nothing else is known of their numerics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GraphReasoning(nn.Module):
    """The similarity matrix of all pairs of positions, its normalised Laplacian, and one graph convolution.

    Args:
        channels: channels C.
        nodes: dimension M of the similarity.
    """

    def __init__(self, channels: int, nodes: int) -> None:
        super().__init__()
        self.phi = nn.Conv2d(channels, nodes, 1)
        self.lam = nn.Conv2d(channels, nodes, 1)
        self.weight = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) for x of the same shape."""
        batch, channels, height, width = x.shape
        nodes = x.view(batch, channels, -1).transpose(1, 2)  # (B, N, C)
        phi = torch.relu(self.phi(x)).view(batch, -1, height * width).transpose(1, 2)  # (B, N, M)
        lam = torch.sigmoid(self.lam(F.adaptive_avg_pool2d(x, 1))).view(batch, 1, -1)
        similarity = torch.bmm(phi * lam, phi.transpose(1, 2))  # (B, N, N)
        degree = similarity.sum(dim=2).clamp(min=1e-6) ** -0.5
        identity = torch.eye(height * width, dtype=x.dtype, device=x.device)
        laplacian = identity - degree.unsqueeze(2) * similarity * degree.unsqueeze(1)
        reasoned = torch.bmm(laplacian, nodes).transpose(1, 2).reshape(x.shape)
        return torch.relu(self.weight(reasoned))


class SpatialPyramidGraphReasoning(nn.Module):
    """Max-pool the map again and again, reason on each, and sum from coarse to fine.

    Args:
        channels: channels C.
        nodes: dimension M of the similarity.
        levels: how many maps there are.
        shared: whether all maps use the same weights.
        upsampling: interpolation of a coarser result.
    """

    def __init__(
        self, channels: int, nodes: int = 64, levels: int = 4, shared: bool = False, upsampling: str = "nearest"
    ) -> None:
        super().__init__()
        self.count = levels
        self.shared = shared
        self.upsampling = upsampling
        self.levels = nn.ModuleList([GraphReasoning(channels, nodes) for _ in range(1 if shared else levels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W) for x of the same shape."""
        return self._from(0, x)

    def _from(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the result of level `index` and all coarser ones."""
        fine: torch.Tensor = self.levels[0 if self.shared else index](x)
        if index == self.count - 1:
            return fine
        coarse = self._from(index + 1, F.max_pool2d(x, 2, 2))
        return fine + F.interpolate(coarse, size=fine.shape[2:], mode=self.upsampling)
