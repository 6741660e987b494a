"""Double attention, original.

Paper: Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018, equations 4 to 6.
Behaviour: nguyenvo09/Double-Attention-Network, `double_attention_layer.py`; xmu-xiaoma666/External-Attention-pytorch,
`model/attention/A2Atttention.py`, where the softmax axis is left out and torch takes the first, the batch.
"""

from __future__ import annotations

import torch
from torch import nn

_GATHER_AND_DISTRIBUTE = {"paper": (2, 1), "legacy_batch": (0, 0)}


class DoubleAttention(nn.Module):
    """Gather c_n descriptors of c_m channels from the whole map, then give every position a mixture of them.

    Args:
        in_channels: channels of the input.
        c_m: channels of a descriptor.
        c_n: number of descriptors.
        reconstruct: map the result back to the input's channels.
        softmax_axes: "paper" (positions, then descriptors) or "legacy_batch" (the batch, twice).
    """

    def __init__(
        self, in_channels: int, c_m: int, c_n: int, reconstruct: bool = False, softmax_axes: str = "paper"
    ) -> None:
        super().__init__()
        self.axes = _GATHER_AND_DISTRIBUTE[softmax_axes]
        self.reconstruct = reconstruct
        self.convA = nn.Conv2d(in_channels, c_m, 1)
        self.convB = nn.Conv2d(in_channels, c_n, 1)
        self.convV = nn.Conv2d(in_channels, c_n, 1)
        if reconstruct:
            self.conv_reconstruct = nn.Conv2d(c_m, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Z of x (B, C, H, W): (B, c_m, H, W), or (B, C, H, W) when reconstructed; nothing is added to it."""
        batch, _, height, width = x.shape
        features = self.convA(x).view(batch, -1, height * width)
        maps = self.convB(x).view(batch, -1, height * width).softmax(dim=self.axes[0])
        vectors = self.convV(x).view(batch, -1, height * width).softmax(dim=self.axes[1])
        descriptors = torch.bmm(features, maps.permute(0, 2, 1))
        z = torch.bmm(descriptors, vectors).view(batch, -1, height, width)
        return self.conv_reconstruct(z) if self.reconstruct else z
