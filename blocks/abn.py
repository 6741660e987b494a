"""Activated batch normalisation with the semantics of InPlaceABN.

Paper: Rota Bulò et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", CVPR 2018.
Code: https://github.com/mapillary/inplace_abn.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Variant


class ABN(nn.BatchNorm2d):
    """What Mapillary's InPlaceABN computes, from its own state_dict.

    `y = activation((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias)`: the scale is the magnitude of the stored
    weight plus eps, unlike in BatchNorm (https://github.com/mapillary/inplace_abn, issues 92 and 180). State names
    are those of BatchNorm.

    Args:
        channels: number of channels.
        activation: "leaky_relu" (slope 0.01) or "identity".

    Raises:
        ValueError: another activation.
    """

    def __init__(self, channels: int, activation: str = "leaky_relu") -> None:
        if activation not in ("leaky_relu", "identity"):
            raise ValueError(f"ABN knows the activations leaky_relu and identity, not {activation!r}")
        super().__init__(channels, eps=1e-5)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise and activate a map (batch, channels, height, width)."""
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        normal = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight.abs() + self.eps,
            self.bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )
        return normal if self.activation == "identity" else F.leaky_relu(normal, 0.01)

    def prepare_for_export(self) -> nn.Module:
        """Return a plain BatchNorm with the effective weight, followed by the activation."""
        plain = nn.BatchNorm2d(self.num_features, eps=self.eps).to(self.weight)
        plain.load_state_dict(copy.deepcopy(self.state_dict()))
        with torch.no_grad():
            plain.weight.copy_(self.weight.abs() + self.eps)
        plain.train(self.training)
        return plain if self.activation == "identity" else nn.Sequential(plain, nn.LeakyReLU(0.01))


BLOCKS.add(
    BlockSpec(
        name="abn",
        title="activated batch normalisation",
        paper="In-Place Activated BatchNorm for Memory-Optimized Training of DNNs, CVPR 2018",
        year=2018,
        code="https://github.com/mapillary/inplace_abn",
        build=ABN,
        original="edgeattn.validation.originals.abn:ABN",
        variants=(Variant("official", {"channels": 6}),),
        largest=lambda arguments, sizes: arguments["channels"] * sizes["batch"] * sizes["height"] * sizes["width"],
        precision="all of it may run in FP16",
        int8="part of the convolution before it",
    )
)
