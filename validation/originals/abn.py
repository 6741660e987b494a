"""Activated batch normalisation (InPlaceABN), original.

Paper: Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", CVPR 2018.
Behaviour: mapillary/inplace_abn, where the scale is `|weight| + eps`, so that the layer stays invertible.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ABN(nn.Module):
    """Normalise with the running statistics, scale by |weight| + eps, shift, activate.

    y = activation((|weight| + eps) * (x - running_mean) / sqrt(running_var + eps) + bias)

    Args:
        channels: number of channels C.
        activation: "leaky_relu" (slope 0.01, the library's default) or "identity".

    Raises:
        ValueError: the activation is neither of the two.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    eps = 1e-5
    slope = 0.01

    def __init__(self, channels: int, activation: str = "leaky_relu") -> None:
        super().__init__()
        if activation not in ("leaky_relu", "identity"):
            raise ValueError(f"activation {activation!r} is not known; choose 'leaky_relu' or 'identity'")
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x (B, C, H, W); the result has the same shape."""
        weight = self.weight.abs() + self.eps
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, eps=self.eps)
        return F.leaky_relu(y, self.slope) if self.activation == "leaky_relu" else y
