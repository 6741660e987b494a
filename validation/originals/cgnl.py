"""Compact generalised non-local block and the non-local block of the same repository, originals.

Paper: Yue et al., "Compact Generalized Non-local Network", NeurIPS 2018, equations 7, 11 and 12.
Behaviour: KaiyuYue/cgnl-network.pytorch, `model/resnet.py`: SpatialCGNL, SpatialCGNLx and SpatialNL.
"""

from __future__ import annotations

import math

import torch
from torch import nn

GAMMA = 1e-4


class CGNL(nn.Module):
    """Non-local attention over all positions and channels of a group, through a kernel that factorises.

    Args:
        inplanes: channels of the input.
        planes: channels of theta (t), phi (p) and g.
        use_scale: divide the attention by the square root of the number of elements of a group.
        groups: number of channel groups.
        order: Taylor order of the Gaussian kernel, or None for the dot product.
    """

    def __init__(
        self, inplanes: int, planes: int, use_scale: bool = False, groups: int = 8, order: int | None = None
    ) -> None:
        super().__init__()
        self.use_scale = use_scale
        self.groups = groups
        self.order = order
        self.t = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.p = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.g = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.z = nn.Conv2d(planes, inplanes, 1, groups=groups, bias=False)
        self.gn = nn.GroupNorm(groups, inplanes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, inplanes, H, W) to the same shape."""
        theta, phi, g = self.t(x), self.p(x), self.g(x)
        if self.groups == 1:
            attended = self._attend(theta, phi, g)
        else:
            size = theta.shape[1] // self.groups
            parts = zip(*(torch.split(tensor, size, dim=1) for tensor in (theta, phi, g)), strict=True)
            attended = torch.cat([self._attend(*part) for part in parts], dim=1)
        out: torch.Tensor = self.gn(self.z(attended)) + x
        return out

    def _attend(self, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Attend within one group: kernel features of theta times (kernel features of phi times g)."""
        batch, channels, height, width = theta.shape
        elements = channels * height * width
        queries = self._features(theta.reshape(batch, 1, elements))
        keys = self._features(phi.reshape(batch, 1, elements))
        attention = torch.bmm(keys, g.reshape(batch, elements, 1))
        if self.use_scale:
            attention = attention.div(elements**0.5)
        return torch.bmm(attention.transpose(1, 2), queries).view(theta.shape)

    def _features(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what the kernel is the inner product of: (B, 1, M), or (B, order + 1, M) for the Gaussian."""
        if self.order is None:
            return flat
        beta = math.exp(-2 * GAMMA)
        alphas = [(2 * GAMMA) ** power / math.factorial(power) * beta for power in range(self.order + 1)]
        return torch.cat([flat.pow(power).mul(math.sqrt(alpha)) for power, alpha in enumerate(alphas)], dim=1)


class SpatialNL(nn.Module):
    """Embedded Gaussian non-local block without biases.

    Args:
        inplanes: channels of the input.
        planes: channels of theta (t), phi (p) and g.
        use_scale: divide the energies by sqrt(planes).
    """

    def __init__(self, inplanes: int, planes: int, use_scale: bool = False) -> None:
        super().__init__()
        self.use_scale = use_scale
        self.t = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.p = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.g = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.z = nn.Conv2d(planes, inplanes, 1, bias=False)
        self.bn = nn.BatchNorm2d(inplanes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, inplanes, H, W) to the same shape."""
        theta = self.t(x).flatten(2).permute(0, 2, 1)
        phi = self.p(x).flatten(2)
        g = self.g(x).flatten(2).permute(0, 2, 1)
        energy = torch.bmm(theta, phi)
        if self.use_scale:
            energy = energy.div(theta.shape[2] ** 0.5)
        attended = torch.bmm(energy.softmax(dim=2), g).permute(0, 2, 1).contiguous()
        out: torch.Tensor = self.bn(self.z(attended.view(x.shape[0], -1, *x.shape[2:]))) + x
        return out
