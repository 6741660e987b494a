"""ResNeSt's split attention: the splits of one grouped convolution, weighed per channel by what all of them see.

Paper: Zhang et al., "ResNeSt: Split-Attention Networks", CVPRW 2022 (arXiv 2004.08955).
Code: https://github.com/zhanghang1989/ResNeSt, `resnest/torch/models/splat.py` and `resnet.py`;
https://github.com/huggingface/pytorch-image-models, `timm/layers/split_attn.py`.

    u = relu(bn0(conv(x))) = [u_1 .. u_R],  z = fc2(relu(bn1(fc1(mean over positions of sum_r u_r))))
    y = sum_r softmax_r(z)_r u_r,  with one split y = sigmoid(z) u
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgeattn.blocks.selective_kernel import difference, pooled, select
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


class SplitAttention(nn.Module):
    """Split attention (SplAtConv2d).

    State names and shapes are the official ones, which timm shares: `conv` (R * channels), `bn0`, `fc1`, `bn1`, `fc2`;
    `fc1` and `fc2` have biases and, like `conv`, the groups of the cardinality. The splits follow each other in the
    output of `conv`, whereas `fc2` gives the R logits of the first cardinal group, then those of the second.

    The hidden layer has max(in_channels * R / reduction_factor, 32) channels. timm rounds that to a multiple of 8,
    which changes nothing in the published networks; elsewhere give `inter_channels`.

    Args:
        in_channels: channels of the input.
        channels: channels of each split and of the output.
        kernel_size: size of the convolution.
        stride: stride of the convolution.
        padding: zero padding of the convolution; what keeps the size of the map when None.
        dilation: dilation of the convolution.
        groups: cardinality.
        bias: whether the convolution has a bias.
        radix: number R of splits.
        reduction_factor: see above.
        inter_channels: channels of the hidden layer, where they differ from the formula above.

    Raises:
        ValueError: fewer than one split, or channels that the groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        radix: int = 2,
        reduction_factor: int = 4,
        inter_channels: int | None = None,
    ) -> None:
        super().__init__()
        if radix < 1:
            raise ValueError(f"radix={radix}: give at least 1; radix 0 in ResNeSt's code is a plain convolution")
        hidden = inter_channels or max(in_channels * radix // reduction_factor, 32)
        if in_channels % (groups * radix) or channels % groups or hidden % groups:
            raise ValueError(
                f"in_channels={in_channels}, channels={channels}, {hidden} hidden channels: groups={groups} has to "
                f"divide them, and in_channels also by radix={radix}"
            )
        self.radix = radix
        self.channels = channels
        self.cardinality = groups
        if padding is None:
            padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            in_channels, channels * radix, kernel_size, stride, padding, dilation, groups=groups * radix, bias=bias
        )
        self.bn0 = nn.BatchNorm2d(channels * radix)
        self.fc1 = nn.Conv2d(channels, hidden, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, channels * radix, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve and weigh the splits.

        Args:
            x: (batch, in_channels, height, width).

        Returns:
            (batch, channels, height, width), for stride s the sizes divided by s and rounded up.
        """
        u = self.bn0(self.conv(x)).relu()
        c = self.channels
        splits = [u[:, r * c : (r + 1) * c] for r in range(self.radix)] if self.radix > 1 else [u]
        logits = self.fc2(self.bn1(self.fc1(pooled(splits))).relu())
        if self.radix == 1:
            return u * logits.sigmoid()
        if self.cardinality > 1:
            by_group = logits.view(-1, self.cardinality, self.radix, c // self.cardinality)
            logits = by_group.transpose(1, 2).reshape(-1, c * self.radix, 1, 1)
        return select(splits, logits)

    def prepare_for_export(self) -> SplitAttention:
        """Return a copy whose last layer gives the logits in the order of the splits.

        For two splits it gives their difference, whose order is that of the channels for any cardinality. For more
        splits and a cardinality above 1, it is the equivalent dense layer with its rows in the other order.
        """
        folded = copy.deepcopy(self)
        folded.cardinality = 1
        if self.radix == 2:
            folded.fc2 = difference(self.fc2, 2)
        elif self.cardinality > 1 and self.radix > 2:
            folded.fc2 = _dense(self.fc2, self.radix)
        return folded


def _dense(layer: nn.Conv2d, radix: int) -> nn.Conv2d:
    """Return the ungrouped form of a grouped 1x1 convolution whose groups hold `radix` splits; splits come first."""
    weight, groups = layer.weight.detach().flatten(1), layer.groups
    assert layer.bias is not None
    blocks = torch.block_diag(*weight.chunk(groups))
    dense = nn.Conv2d(layer.in_channels, layer.out_channels, 1).to(weight)
    with torch.no_grad():
        for target, value in ((dense.weight, blocks), (dense.bias, layer.bias)):
            assert target is not None
            by_split = value.unflatten(0, (groups, radix, -1)).transpose(0, 1)
            target.copy_(by_split.reshape(target.shape))
    return dense


class ResNeStBottleneck(nn.Module):
    """Residual bottleneck of ResNeSt around split attention.

    State names and shapes are the official ones: `conv1`, `bn1`, `conv2` (split attention), `conv3`, `bn3`; perhaps
    `downsample.1` and `downsample.2` behind an average pool. The width of the bottleneck is
    int(planes * bottleneck_width / 64) * cardinality.

    Args:
        inplanes: channels of the input.
        planes: the output has four times as many channels.
        stride: stride of the block.
        radix: number of splits.
        cardinality: groups of the split attention.
        bottleneck_width: see above.
        avd: an average pool (3x3, zeros counted) takes the stride, where there is a stride or `is_first`.
        avd_first: the pool stands before the split attention instead of after it.
        dilation: dilation of the split attention.
        is_first: first block of a stage; the released networks set it from the second stage on.
        downsample: whether the shortcut is pooled (partial windows at the border) and projected.

    Raises:
        ValueError: a shortcut of another shape than the output, or what `SplitAttention` refuses.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        radix: int = 2,
        cardinality: int = 1,
        bottleneck_width: int = 64,
        avd: bool = True,
        avd_first: bool = False,
        dilation: int = 1,
        is_first: bool = False,
        downsample: bool = False,
    ) -> None:
        super().__init__()
        if not downsample and (stride != 1 or inplanes != 4 * planes):
            raise ValueError(
                f"inplanes={inplanes}, stride={stride}: the shortcut needs downsample=True unless the stride is 1 and "
                f"inplanes is 4 * planes = {4 * planes}"
            )
        width = int(planes * bottleneck_width / 64) * cardinality
        pooling = avd and (stride > 1 or is_first)
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool_before = nn.AvgPool2d(3, stride, padding=1) if pooling and avd_first else None
        self.conv2 = SplitAttention(
            width, width, stride=1 if pooling else stride, dilation=dilation, groups=cardinality, radix=radix
        )
        self.pool_after = nn.AvgPool2d(3, stride, padding=1) if pooling and not avd_first else None
        self.conv3 = nn.Conv2d(width, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample: nn.Sequential | None = None
        if downsample:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            projection = nn.Conv2d(inplanes, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(pool, projection, nn.BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the residual block.

        Args:
            x: (batch, inplanes, height, width).

        Returns:
            (batch, 4 * planes, height, width), for stride s the sizes divided by s and rounded up.
        """
        hidden = self.bn1(self.conv1(x)).relu()
        if self.pool_before is not None:
            hidden = self.pool_before(hidden)
        hidden = self.conv2(hidden)
        if self.pool_after is not None:
            hidden = self.pool_after(hidden)
        shortcut = x if self.downsample is None else self.downsample(x)
        return (self.bn3(self.conv3(hidden)) + shortcut).relu()


def _splits(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of all splits at stride 1."""
    channels: int = arguments["channels"] * arguments.get("radix", 2)
    return sizes["batch"] * channels * sizes["height"] * sizes["width"]


def _block(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of all splits and the output at stride 1."""
    width = arguments["planes"] * arguments.get("bottleneck_width", 64) // 64 * arguments.get("cardinality", 1)
    channels: int = max(width * arguments.get("radix", 2), 4 * arguments["planes"])
    return sizes["batch"] * channels * sizes["height"] * sizes["width"]


_PAPER = "ResNeSt: Split-Attention Networks, CVPRW 2022 (arXiv 2020)"
_CODE = "https://github.com/zhanghang1989/ResNeSt, https://github.com/huggingface/pytorch-image-models"
_PRECISION = (
    "the means over all positions with their sum, which may exceed FP16 where no split does, and the softmax stay in "
    "FP32; sigmoid and weighted sum, which is a mean of the splits, run in FP16"
)
_INT8 = "the convolution in front of the splits; the layers of the pooled vector cost nothing and stay floating point"
_RECORDED = {"in_channels": 8, "channels": 8}
_RECORDED_BLOCK = {"inplanes": 12, "planes": 4}

BLOCKS.add(
    BlockSpec(
        name="split-attention",
        title="split attention",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=SplitAttention,
        original="edgeattn.validation.originals.split_attention:SplitAttention",
        variants=(
            Variant(
                "official",
                {"in_channels": 8, "channels": 12, "groups": 2, "stride": 2},
                listings={
                    "resnest_splat": {"in_channels": 128, "channels": 128},
                    "timm_splat": {"in_channels": 128, "channels": 128},
                },
                references={
                    "resnest_splat": _RECORDED,
                    "resnest_splat_k2": {**_RECORDED, "groups": 2, "dilation": 2, "bias": True},
                    "timm_splat": {**_RECORDED, "groups": 2},
                },
                published=Published(
                    "ResNeSt-50, ImageNet 224x224, stage 2",
                    {"in_channels": 128, "channels": 128},
                    {"batch": 1, "height": 28, "width": 28},
                ),
            ),
            Variant(
                "radix-1",
                {"in_channels": 8, "channels": 8, "groups": 2, "radix": 1},
                listings={"resnest_splat_r1": {"in_channels": 128, "channels": 128, "radix": 1}},
                references={"resnest_splat_r1": {**_RECORDED, "groups": 2, "radix": 1}},
            ),
            Variant(
                "radix-4",
                {"in_channels": 8, "channels": 12, "groups": 2, "radix": 4},
                references={
                    "resnest_splat_r4": {**_RECORDED, "groups": 2, "radix": 4},
                    "timm_splat_r4": {**_RECORDED, "radix": 4},
                },
                overflow=Overflow(
                    120.0, {"batch": 1, "height": 5, "width": 7}, state={r"bn0\.weight": 200.0, "fc1": 1e-3}
                ),
            ),
        ),
        largest=_splits,
        precision=_PRECISION,
        int8=_INT8,
        int8_exclude=("fc1", "fc2"),
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="resnest-bottleneck",
        title="ResNeSt bottleneck with average down-sampling",
        paper=_PAPER,
        year=2020,
        code=_CODE,
        build=ResNeStBottleneck,
        original="edgeattn.validation.originals.split_attention:ResNeStBottleneck",
        variants=(
            Variant(
                "official",
                {"inplanes": 12, "planes": 4, "stride": 2, "is_first": True, "downsample": True},
                references={
                    "resnest_block": {**_RECORDED_BLOCK, "stride": 2, "is_first": True, "downsample": True},
                    "resnest_block_first": {**_RECORDED_BLOCK, "is_first": True, "downsample": True},
                    "resnest_block_plain": {"inplanes": 16, "planes": 4, "dilation": 2},
                },
                published=Published(
                    "ResNeSt-50, ImageNet 224x224, stage 3",
                    {"inplanes": 512, "planes": 256, "stride": 2, "is_first": True, "downsample": True},
                    {"batch": 1, "height": 28, "width": 28},
                ),
            ),
            Variant(
                "fast",
                {"inplanes": 12, "planes": 4, "stride": 2, "avd_first": True, "downsample": True, "cardinality": 2},
                references={
                    "resnest_block_fast": {
                        **_RECORDED_BLOCK,
                        **{"stride": 2, "avd_first": True, "downsample": True, "cardinality": 2},
                        "bottleneck_width": 40,
                    }
                },
            ),
        ),
        largest=_block,
        precision=_PRECISION,
        int8="all convolutions over the map; those of the pooled vector cost nothing and stay in floating point",
        int8_exclude=("conv2.fc1", "conv2.fc2"),
        inputs=(TensorInput("x", ("batch", "inplanes", "height", "width")),),
    )
)
