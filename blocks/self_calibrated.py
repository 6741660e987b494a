"""Self-calibrated convolution (SCNet): a convolution gated by its own input at a coarser resolution.

Paper: Liu et al., "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020.
Code: https://github.com/MCG-NKU/SCNet, `scnet.py`.

    y = k4(k3(x) * sigmoid(x + up(k2(pool(x)))))

pool averages squares of r x r pixels and drops incomplete ones; up repeats the nearest pixel, whose index is exactly
floor(i * small / large); k2, k3, k4 are convolutions with batch normalisation and nothing behind it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


def _unambiguous(large: int, small: int) -> bool:
    """Say whether every runtime rounds nearest indices alike.

    i * small / large is a whole number inside the map only if the sizes have a common divisor; elsewhere it is far from
    one. With a ratio that is a power of two, floating point computes it exactly.
    """
    whole, rest = divmod(large, small)
    return math.gcd(large, small) == 1 or (rest == 0 and whole & (whole - 1) == 0)


def _nearest(large: int, small: int, device: torch.device) -> torch.Tensor:
    """Return floor(i * small / large) for i below `large`; where a size is a symbol, by counting."""
    if isinstance(large, int) and isinstance(small, int):
        return torch.tensor([i * small // large for i in range(large)], device=device)
    position = torch.arange(large, device=device)[:, None] * small
    return (torch.arange(small, device=device) * large <= position).sum(dim=1) - 1


def upsample(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Repeat the nearest pixel, as `F.interpolate(mode="nearest")` does, with the same index in every runtime.

    ONNX Runtime's Resize takes other pixels than torch at sizes such as 28 to 114. A Resize therefore stands only where
    rounding cannot matter; elsewhere rows and columns are gathered, columns first because there are fewer rows then.
    """
    sizes = ((height, x.shape[2]), (width, x.shape[3]))
    if all(isinstance(size, int) for pair in sizes for size in pair) and all(_unambiguous(*pair) for pair in sizes):
        return F.interpolate(x, size=(height, width))
    for dim in (3, 2):
        x = x.index_select(dim, _nearest((height, width)[dim - 2], x.shape[dim], x.device))
    return x


def _convolution(in_channels: int, channels: int, stride: int, padding: int, dilation: int, groups: int) -> nn.Module:
    """Return a 3x3 convolution without bias, 0, with batch normalisation, 1."""
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding, dilation, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class SCConv(nn.Module):
    """Self-calibrated convolution.

    State names and shapes are the official ones: `k2.1`, `k2.2`, `k3.0`, `k3.1`, `k4.0`, `k4.1`. Only k4 has the
    stride. At 7x7 and r = 4, one value of the top left 4x4 pixels calibrates the whole map; at 14x14 the last two rows
    and columns are not seen.

    Args:
        inplanes: channels of the input.
        planes: channels of the output; as many as the input has, because the two are added.
        stride: stride of k4.
        padding: zero padding of the three convolutions; what keeps the size of the map when None.
        dilation: dilation of the three convolutions.
        groups: groups of the three convolutions.
        pooling_r: side r of the pooled squares.

    Raises:
        ValueError: `planes` differs from `inplanes`, the groups do not divide them, or a padding that changes sizes.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        pooling_r: int = 4,
    ) -> None:
        super().__init__()
        padding = dilation if padding is None else padding
        if planes != inplanes or planes % groups:
            raise ValueError(f"inplanes={inplanes}, planes={planes}: give two equal multiples of groups={groups}")
        if padding != dilation:
            raise ValueError(f"padding={padding}: give the dilation, {dilation}; the gate needs maps of equal sizes")
        self.pooling_r = pooling_r
        inner = (inplanes, planes, 1, padding, dilation, groups)
        self.k2 = nn.Sequential(nn.AvgPool2d(pooling_r), *_convolution(*inner).children())
        self.k3 = _convolution(*inner)
        self.k4 = _convolution(planes, planes, stride, padding, dilation, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve.

        Args:
            x: (batch, inplanes, height, width); height and width are at least `pooling_r`.

        Returns:
            (batch, planes, height, width), for stride s the sizes divided by s and rounded up.

        Raises:
            UserError: a height or width below `pooling_r`.
        """
        height, width = x.shape[2:]
        if any(isinstance(size, int) and size < self.pooling_r for size in (height, width)):
            raise UserError(
                f"self-calibration pools squares of {self.pooling_r}x{self.pooling_r} pixels, but the map is "
                f"{height}x{width}. Give a larger image: in SCNet, 128 pixels per side or more."
            )
        gate = (x + upsample(self.k2(x), height, width)).sigmoid()
        return self.k4(self.k3(x) * gate)


class SCBottleneck(nn.Module):
    """Residual bottleneck of SCNet: one half of the channels convolved, the other self-calibrated.

    State names and shapes are the official ones: `conv1_a`, `bn1_a`, `conv1_b`, `bn1_b`, `k1.0`, `k1.1`, `scconv`,
    `conv3`, `bn3`; perhaps `downsample.0` and `downsample.1`, with `avg_down` `downsample.1` and `downsample.2`. Each
    half has int(planes * bottleneck_width / 64) * cardinality channels.

    Args:
        inplanes: channels of the input.
        planes: the output has four times as many channels.
        stride: stride of the block.
        cardinality: groups of the 3x3 convolutions.
        bottleneck_width: see above.
        avd: an average pool (3x3, zeros counted) takes the stride, where there is a stride or `is_first`.
        dilation: dilation of the 3x3 convolutions.
        is_first: first block of a stage; the v1d networks set it from the second stage on.
        downsample: whether the shortcut is projected.
        avg_down: whether a projected shortcut is pooled (partial windows at the border) instead of strided.

    Raises:
        ValueError: a shortcut of another shape than the output.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        cardinality: int = 1,
        bottleneck_width: int = 32,
        avd: bool = False,
        dilation: int = 1,
        is_first: bool = False,
        downsample: bool = False,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        if not downsample and (stride != 1 or inplanes != 4 * planes):
            raise ValueError(
                f"inplanes={inplanes}, stride={stride}: the shortcut needs downsample=True unless the stride is 1 and "
                f"inplanes is 4 * planes = {4 * planes}"
            )
        width = int(planes * bottleneck_width / 64) * cardinality
        pooling = avd and (stride > 1 or is_first)
        inner_stride = 1 if pooling else stride
        self.conv1_a = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1_a = nn.BatchNorm2d(width)
        self.conv1_b = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1_b = nn.BatchNorm2d(width)
        self.k1 = _convolution(width, width, inner_stride, dilation, dilation, cardinality)
        self.scconv = SCConv(width, width, inner_stride, dilation=dilation, groups=cardinality)
        self.pool = nn.AvgPool2d(3, stride, padding=1) if pooling else None
        self.conv3 = nn.Conv2d(2 * width, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample: nn.Sequential | None = None
        if downsample:
            pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if avg_down else []
            projection = nn.Conv2d(inplanes, 4 * planes, 1, 1 if avg_down else stride, bias=False)
            self.downsample = nn.Sequential(*pool, projection, nn.BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the residual block.

        Args:
            x: (batch, inplanes, height, width); height and width are at least 4.

        Returns:
            (batch, 4 * planes, height, width), for stride s the sizes divided by s and rounded up.

        Raises:
            UserError: a height or width below 4.
        """
        plain = self.k1(self.bn1_a(self.conv1_a(x)).relu()).relu()
        calibrated = self.scconv(self.bn1_b(self.conv1_b(x)).relu()).relu()
        if self.pool is not None:
            plain, calibrated = self.pool(plain), self.pool(calibrated)
        out = self.bn3(self.conv3(torch.cat([plain, calibrated], dim=1)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return (out + shortcut).relu()


def _output(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the output at stride 1."""
    channels: int = 4 * arguments["planes"]
    return sizes["batch"] * channels * sizes["height"] * sizes["width"]


def _sizes(*sizes: tuple[int, int, int]) -> tuple[Sizes, ...]:
    """Return sizes from batch, height and width."""
    return tuple({"batch": batch, "height": height, "width": width} for batch, height, width in sizes)


_PAPER = "Improving Convolutional Networks with Self-Calibrated Convolutions, CVPR 2020"
_CODE = "https://github.com/MCG-NKU/SCNet"
_PRECISION = "all of it may run in FP16: a pool averages r x r numbers, and the gate lies between 0 and 1"
_V1D = {"avd": True, "is_first": True, "downsample": True, "avg_down": True}

BLOCKS.add(
    BlockSpec(
        name="self-calibrated",
        title="self-calibrated convolution",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=SCConv,
        original="edgeattn.validation.originals.self_calibrated:SCConv",
        variants=(
            Variant(
                "official",
                {"inplanes": 8, "planes": 8},
                listings={"scconv": {"inplanes": 128, "planes": 128}},
                references={
                    "scconv": {"inplanes": 4, "planes": 4},
                    "scconv_strided": {"inplanes": 4, "planes": 4, "stride": 2, "dilation": 2, "groups": 2},
                },
                published=Published(
                    "SCNet-50, ImageNet 224x224, stage 3",
                    {"inplanes": 128, "planes": 128},
                    {"batch": 1, "height": 14, "width": 14},
                ),
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["planes"] * sizes["height"] * sizes["width"],
        precision=_PRECISION,
        int8="all three convolutions; the gate stays in floating point",
        inputs=(TensorInput("x", ("batch", "inplanes", "height", "width")),),
        sizes=_sizes((2, 10, 15), (1, 7, 4), (3, 16, 12), (1, 114, 5), (1, 4, 4)),
    )
)

BLOCKS.add(
    BlockSpec(
        name="sc-bottleneck",
        title="bottleneck with self-calibrated convolution",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=SCBottleneck,
        original="edgeattn.validation.originals.self_calibrated:SCBottleneck",
        variants=(
            Variant(
                "official",
                {"inplanes": 12, "planes": 8, "stride": 2, "downsample": True},
                references={
                    "scconv_block": {"inplanes": 32, "planes": 8},
                    "scconv_block_strided": {"inplanes": 12, "planes": 8, "stride": 2, "downsample": True},
                },
                published=Published(
                    "SCNet-50, ImageNet 224x224, stage 2",
                    {"inplanes": 512, "planes": 128},
                    {"batch": 1, "height": 28, "width": 28},
                ),
            ),
            Variant(
                "v1d",
                {"inplanes": 12, "planes": 8, "stride": 2, **_V1D},
                references={"scconv_block_v1d": {"inplanes": 12, "planes": 8, "stride": 2, **_V1D}},
            ),
        ),
        largest=_output,
        precision=_PRECISION,
        int8="all convolutions; the gate stays in floating point",
        inputs=(TensorInput("x", ("batch", "inplanes", "height", "width")),),
        sizes=_sizes((2, 9, 14), (1, 7, 5), (3, 12, 8), (1, 4, 4)),
    )
)
