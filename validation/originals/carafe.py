"""CARAFE upsampling, original.

Paper: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, section 3.
Behaviour: myownskyW7/CARAFE, `carafe/carafe.py` and `carafe/src/cuda/carafe_naive_cuda_kernel.cu`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class CARAFEPack(nn.Module):
    """Predict one k x k kernel per output pixel and group, and apply it around the source pixel.

    Args:
        channels: channels of the map.
        scale_factor: ratio s of the sizes.
        up_kernel: k.
        up_group: groups of consecutive channels that share kernels.
        encoder_kernel: kernel of the encoder.
        encoder_dilation: dilation of the encoder.
        compressed_channels: channels that the encoder sees.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        self.scale = scale_factor
        self.kernel = up_kernel
        self.groups = up_group
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel * up_kernel * up_group * scale_factor * scale_factor,
            encoder_kernel,
            padding=int((encoder_kernel - 1) * encoder_dilation / 2),
            dilation=encoder_dilation,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, s * H, s * W) from (B, C, H, W)."""
        mask = F.pixel_shuffle(self.content_encoder(self.channel_compressor(x)), self.scale)
        batch, _, height, width = mask.shape
        mask = F.softmax(mask.view(batch, self.groups, self.kernel * self.kernel, height, width), dim=2)
        radius = (self.kernel - 1) // 2
        source = F.pad(x, (radius, radius, radius, radius))
        source = source.view(batch, self.groups, -1, source.shape[2], source.shape[3])
        rows = torch.arange(height, device=x.device) // self.scale
        columns = torch.arange(width, device=x.device) // self.scale
        result = torch.zeros_like(source[..., :1, :1])
        for a in range(self.kernel):
            for b in range(self.kernel):
                values = source[:, :, :, rows + a][..., columns + b]  # (B, G, C / G, s * H, s * W)
                result = result + values * mask[:, :, a * self.kernel + b].unsqueeze(2)
        return result.flatten(1, 2)
