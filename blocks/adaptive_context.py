"""Adaptive context module (ACM) and the head of the adaptive pyramid context network.

Paper: He et al., "Adaptive Pyramid Context Network for Semantic Segmentation", CVPR 2019. Code:
https://github.com/Junjun2016/APCNet, `apc_head.py`, the same as mmseg's `models/decode_heads/apc_head.py`.

    u = reduce(x), P = reduce'(average of x over each cell of an s x s grid), g = info(mean of u)
    A = sigmoid(gla(u + g))                      one affinity per position and cell, not normalised
    y = fuse(relu(residual(A P) + u))            every projection: 1x1 convolution, batch normalisation, ReLU
    head = conv_seg(bottleneck([x, y_1, y_2, y_3, y_6]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.pooling import pyramid_pool
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, TensorInput, Variant


class _ConvNormReLU(nn.Module):
    """Convolution `conv` without bias that keeps the size, batch normalisation `bn`, ReLU.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel_size: odd side of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return torch.relu(self.bn(self.conv(x)))


class ACM(nn.Module):
    """Adaptive context module of one scale: every position gathers s x s region averages with its own weights.

    State names are the official ones: `pooled_redu_conv`, `input_redu_conv`, `global_info`, `residual_conv` and
    `fusion_conv` (each `conv` without bias and `bn`), and `gla` (a convolution with bias).

    What is linear moves to where it is cheap, exactly: the residual convolution works on the s * s cells instead of all
    positions, and `gla` takes the global vector as an addition to its bias.

    Args:
        in_channels: input channels.
        channels: output channels.
        pool_scale: side s of the grid.
        fusion: whether `fusion_conv` exists.

    Raises:
        ValueError: a grid without cells.
    """

    def __init__(self, in_channels: int, channels: int, pool_scale: int, fusion: bool = True) -> None:
        super().__init__()
        if pool_scale < 1:
            raise ValueError(f"ACM needs pool_scale >= 1, got {pool_scale}; published networks have 1, 2, 3 and 6")
        self.pool_scale = pool_scale
        self.pooled_redu_conv = _ConvNormReLU(in_channels, channels)
        self.input_redu_conv = _ConvNormReLU(in_channels, channels)
        self.global_info = _ConvNormReLU(channels, channels)
        self.gla = nn.Conv2d(channels, pool_scale**2, kernel_size=1)
        self.residual_conv = _ConvNormReLU(channels, channels)
        self.fusion_conv = _ConvNormReLU(channels, channels) if fusion else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height, width)."""
        return self.attend(x, pyramid_pool(x, (self.pool_scale,)))

    def attend(self, x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Compute the module from given averages of its input.

        Args:
            x: (batch, in_channels, height, width).
            cells: averages of x, (batch, in_channels, pool_scale ** 2), row by row.

        Returns:
            (batch, channels, height, width).
        """
        reduced = self.input_redu_conv(x)
        overall = self.global_info(reduced.mean(dim=(2, 3), keepdim=True))
        shift = torch.matmul(self.gla.weight.flatten(1), overall.flatten(2)).unsqueeze(3)
        affinity = torch.sigmoid(self.gla(reduced) + shift)
        regions = self.residual_conv.conv(self.pooled_redu_conv(cells.unsqueeze(3)))
        context = torch.matmul(regions.flatten(2), affinity.flatten(2)).unflatten(2, x.shape[2:])
        context = torch.relu(torch.relu(self.residual_conv.bn(context)) + reduced)
        return context if self.fusion_conv is None else self.fusion_conv(context)


class APCHead(nn.Module):
    """Adaptive context modules of several scales, a 3x3 bottleneck over [x, contexts] and the classifier.

    The input is averaged once for all scales. State names are the official ones: `acm_modules.N` (see `ACM`),
    `bottleneck.conv`, `bottleneck.bn`, `conv_seg`.

    Args:
        in_channels: input channels.
        channels: channels of the contexts and of the bottleneck.
        num_classes: output channels.
        pool_scales: side of the grid of each module.
        fusion: whether the modules have a `fusion_conv`.

    Raises:
        ValueError: no scale, or a grid without cells.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        fusion: bool = True,
    ) -> None:
        super().__init__()
        if not pool_scales:
            raise ValueError("APCHead needs at least one scale in pool_scales; published networks have (1, 2, 3, 6)")
        self.pool_scales = tuple(pool_scales)
        self.acm_modules = nn.ModuleList(ACM(in_channels, channels, scale, fusion) for scale in pool_scales)
        self.bottleneck = _ConvNormReLU(in_channels + len(self.pool_scales) * channels, channels, kernel_size=3)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to class scores (batch, num_classes, height, width)."""
        cells = pyramid_pool(x, self.pool_scales)
        joined, start = [x], 0
        for scale, module in zip(self.pool_scales, self.acm_modules, strict=True):
            joined.append(module.attend(x, cells[..., start : start + scale**2]))  # type: ignore[operator]
            start += scale**2
        return self.conv_seg(self.bottleneck(torch.cat(joined, dim=1)))


def _largest(scales: Sequence[int], joined: int, arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of a map of `joined` channels, the affinity and the pooling's steps."""
    height, width = sizes["height"], sizes["width"]
    cells = sum(scale**2 for scale in scales)
    pooled = arguments["in_channels"] * max(cells, height * sum(scales))
    return sizes["batch"] * max(height * width * max(joined, max(scales) ** 2), pooled)


_PAPER = "Adaptive Pyramid Context Network for Semantic Segmentation, CVPR 2019"
_CODE = "https://github.com/Junjun2016/APCNet, https://github.com/open-mmlab/mmsegmentation"
_PRECISION = (
    "the global mean stays in FP32 (a sum over all positions); a position sums 36 regions at most, with weights below "
    "1, which FP16 holds"
)
_INPUT = (TensorInput("x", ("batch", "in_channels", "height", "width")),)
_CITYSCAPES = {"batch": 1, "height": 64, "width": 128}
_NETWORK = "APCNet, ResNet-50-D8 (mmseg), Cityscapes 512x1024"

BLOCKS.add(
    BlockSpec(
        name="adaptive-context",
        title="adaptive context module (ACM)",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=ACM,
        original="edgeattn.validation.originals.adaptive_context:ACM",
        variants=(
            Variant(
                "official",
                {"in_channels": 12, "channels": 8, "pool_scale": 3},
                references={"apcnet_acm": {"in_channels": 12, "channels": 8, "pool_scale": 3}},
                published=Published(_NETWORK, {"in_channels": 2048, "channels": 512, "pool_scale": 6}, _CITYSCAPES),
            ),
            Variant(
                "without-fusion",
                {"in_channels": 8, "channels": 6, "pool_scale": 2, "fusion": False},
                references={
                    "apcnet_acm_plain": {"in_channels": 8, "channels": 6, "pool_scale": 2, "fusion": False},
                },
            ),
        ),
        largest=lambda arguments, sizes: _largest((arguments["pool_scale"],), arguments["channels"], arguments, sizes),
        precision=_PRECISION,
        int8="all convolutions but gla, whose few outputs are the logits of the affinities; products stay in FP16",
        int8_exclude=("gla",),
        inputs=_INPUT,
    )
)

BLOCKS.add(
    BlockSpec(
        name="adaptive-pyramid-context-head",
        title="adaptive pyramid context head",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=APCHead,
        original="edgeattn.validation.originals.adaptive_context:APCHead",
        variants=(
            Variant(
                "official",
                {"in_channels": 12, "channels": 4, "num_classes": 3},
                key_map={r"^decode_head\.": "", r"^(?:backbone|auxiliary_head)\..*": ""},
                references={"apcnet_head": {"in_channels": 12, "channels": 4, "num_classes": 3}},
                published=Published(_NETWORK, {"in_channels": 2048, "channels": 512, "num_classes": 19}, _CITYSCAPES),
            ),
        ),
        largest=lambda arguments, sizes: _largest(
            arguments.get("pool_scales", (1, 2, 3, 6)),
            arguments["in_channels"] + len(arguments.get("pool_scales", (1, 2, 3, 6))) * arguments["channels"],
            arguments,
            sizes,
        ),
        precision=_PRECISION,
        int8="all convolutions but gla and the classifier; products stay in FP16",
        int8_exclude=(*(f"acm_modules.{index}.gla" for index in range(4)), "conv_seg"),
        inputs=_INPUT,
    )
)
