"""CARAFE: upsampling with predicted kernels (content-aware reassembly of features).

Paper: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019 (arXiv 1905.02188).
Code: https://github.com/myownskyW7/CARAFE, `carafe/carafe.py`; mmcv `ops/carafe.py`, class CARAFEPack.

    m        = softmax over taps of pixel_shuffle(content_encoder(channel_compressor(x)))
    y[c,i,j] = sum over taps (a, b) of m[g(c), (a, b), i, j] * x[c, floor(i / s) + a - r, floor(j / s) + b - r]

with k x k taps, r = (k - 1) / 2, scale s and groups of neighbouring channels g(c); taps outside the map count as 0, and
the weights of the others are not raised for it.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, Variant
from edgeattn.blocks.taps import taps


class CARAFEPack(nn.Module):
    """Kernel prediction and reassembly, all of it at the low resolution until one last pixel shuffle.

    The s * s output pixels of an input pixel have the same k x k neighbourhood, so each tap is one slice of the padded
    input, multiplied by s * s weights.

    State names are the official ones: `channel_compressor` and `content_encoder`, both with bias.

    Args:
        channels: input and output channels.
        scale_factor: how many times larger the output is.
        up_kernel: side k of the predicted kernels, odd.
        up_group: number of groups of channels with kernels of their own.
        encoder_kernel: side of the content encoder's convolution.
        encoder_dilation: its dilation.
        compressed_channels: its input channels.

    Raises:
        ValueError: an even `up_kernel`, channels that the groups do not divide, or an encoder that would change the
            size of the map.
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
        reach = (encoder_kernel - 1) * encoder_dilation
        if scale_factor < 1:
            raise ValueError(f"CARAFE needs scale_factor >= 1, got {scale_factor}; published networks have 2")
        if up_kernel < 1 or up_kernel % 2 == 0:
            raise ValueError(f"CARAFE needs an odd up_kernel, got {up_kernel}; published networks have 5")
        if up_group < 1 or channels % up_group:
            raise ValueError(
                f"CARAFE needs an up_group that divides channels = {channels}, got {up_group}; 1 always does"
            )
        if encoder_kernel < 1 or reach % 2:
            raise ValueError(
                f"CARAFE needs an encoder that keeps the size: (encoder_kernel - 1) * encoder_dilation must be even, "
                f"got encoder_kernel {encoder_kernel} and encoder_dilation {encoder_dilation}; make the kernel odd"
            )
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, kernel_size=1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            (up_kernel * scale_factor) ** 2 * up_group,
            encoder_kernel,
            padding=reach // 2,
            dilation=encoder_dilation,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, channels, scale * height, scale * width)."""
        kernels = self.content_encoder(self.channel_compressor(x))
        kernels = kernels.unflatten(1, (self.up_group, self.up_kernel**2, self.scale_factor**2)).softmax(dim=2)
        padded = F.pad(x, [(self.up_kernel - 1) // 2] * 4)
        grouped = padded.unflatten(1, (self.up_group, x.shape[1] // self.up_group)).unsqueeze(3)
        # All products precede the additions in the graph: ONNX Runtime visits the later of two inputs first, and would
        # otherwise hold every product at once.
        products = [tap * kernels[:, :, index].unsqueeze(2) for index, tap in enumerate(taps(grouped, self.up_kernel))]
        return F.pixel_shuffle(functools.reduce(torch.add, products).flatten(1, 3), self.scale_factor)


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of the output, the kernels and the padded input."""
    scale, kernel = arguments["scale_factor"], arguments.get("up_kernel", 5)
    height, width = sizes["height"], sizes["width"]
    kernels = kernel**2 * arguments.get("up_group", 1) * scale**2
    widest = max(arguments["channels"] * scale**2, kernels, arguments.get("compressed_channels", 64))
    padded = arguments["channels"] * (height + kernel - 1) * (width + kernel - 1)
    return sizes["batch"] * max(widest * height * width, padded)


_SMALL = {"channels": 6, "scale_factor": 2, "compressed_channels": 4}
_GROUPED = {
    "channels": 8,
    "scale_factor": 3,
    "up_kernel": 3,
    "up_group": 2,
    "encoder_dilation": 2,
    "compressed_channels": 5,
}

BLOCKS.add(
    BlockSpec(
        name="carafe",
        title="CARAFE upsampling",
        paper="CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019",
        year=2019,
        code="https://github.com/myownskyW7/CARAFE, https://github.com/open-mmlab/mmcv",
        build=CARAFEPack,
        original="edgeattn.validation.originals.carafe:CARAFEPack",
        variants=(
            Variant(
                "official",
                _SMALL,
                references={"carafe": _SMALL},
                published=Published(
                    "FPN_CARAFE (Faster R-CNN, ResNet-50), COCO 800x1333, finest level",
                    {"channels": 256, "scale_factor": 2},
                    {"batch": 1, "height": 100, "width": 168},
                ),
            ),
            Variant("grouped", _GROUPED, references={"carafe_grouped": _GROUPED}),
        ),
        largest=_largest,
        precision="the softmax over taps stays in FP32; the reassembly is a weighted mean, which FP16 holds",
        int8="the channel compressor; the content encoder gives the logits of the kernels and stays in FP16",
        int8_exclude=("content_encoder",),
    )
)
