"""Selective kernels: branches of different receptive fields, weighed per channel by what all of them see.

Paper: Li et al., "Selective Kernel Networks", CVPR 2019 (arXiv 1903.06586).
Code: https://github.com/implus/SKNet, `models/sknet50.prototxt` (Caffe); https://github.com/implus/PytorchInsight,
`classification/models/imagenet/resnet_sk.py`; https://github.com/pppLang/SKNet, `sknet.py`;
https://github.com/huggingface/pytorch-image-models, `timm/layers/selective_kernel.py`.

    f_i = relu(bn_i(conv_i(x))),  z = logits(mean over positions of sum_i f_i),  y = sum_i softmax_i(z)_i f_i

The sum of the branches is never made: its mean is the sum of their means. A softmax over two branches is the sigmoid of
the difference of their logits, y = f_1 + sigmoid(z_0 - z_1) (f_0 - f_1), so that half of the last layer goes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.taps import weighted_sum


def pooled(branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over positions of the sum of branches, (batch, channels, 1, 1)."""
    total = branches[0].mean(dim=(2, 3), keepdim=True)
    for branch in branches[1:]:
        total = total + branch.mean(dim=(2, 3), keepdim=True)
    return total


def select(branches: Sequence[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Weigh branches by a softmax across them.

    Args:
        branches: tensors (batch, channels, height, width).
        logits: (batch, branches * channels, 1, 1), one branch after the other; for two branches also
            (batch, channels, 1, 1), the first branch's logits minus the second's.

    Returns:
        (batch, channels, height, width).
    """
    channels = branches[0].shape[1]
    if len(branches) == 2 and logits.shape[1] == channels:
        first, second = branches
        return second + logits.sigmoid() * (first - second)
    weights = logits.view(-1, len(branches), channels, 1).softmax(dim=1).view(-1, len(branches) * channels, 1, 1)
    return weighted_sum([weights[:, i * channels : (i + 1) * channels] for i in range(len(branches))], branches)


def difference(layer: nn.Conv2d, branches: int) -> nn.Conv2d:
    """Return the 1x1 convolution that gives the difference of two branches' logits.

    Args:
        layer: gives the logits of `branches` branches; in each of its groups one branch after the other.
        branches: with another number than 2 there is no such convolution, and the layer itself is returned.
    """
    if branches != 2:
        return layer
    halved = nn.Conv2d(
        layer.in_channels, layer.out_channels // 2, 1, groups=layer.groups, bias=layer.bias is not None
    ).to(layer.weight)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            first, second = value.unflatten(0, (layer.groups, 2, -1)).unbind(dim=1)
            halved.get_parameter(name).copy_((first - second).flatten(0, 1))
    return halved


def divisible(value: float, divisor: int) -> int:
    """Return timm's multiple of `divisor` near a width: at least the divisor, and no more than a tenth below."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _branch(in_channels: int, out_channels: int, kernel: int, stride: int, dilation: int, groups: int) -> nn.Module:
    """Return a convolution without bias, `conv`, with batch normalisation `bn` and ReLU."""
    padding = (stride - 1 + dilation * (kernel - 1)) // 2
    branch = nn.Sequential()
    branch.add_module(
        "conv", nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups=groups, bias=False)
    )
    branch.add_module("bn", nn.BatchNorm2d(out_channels))
    branch.add_module("act", nn.ReLU())
    return branch


class SelectiveKernel(nn.Module):
    """Selective kernel of the Caffe models and of timm: dilated 3x3 branches, a bottleneck of 1x1 convolutions.

    State names and shapes are timm's: `paths.i.conv`, `paths.i.bn`, `attn.fc_reduce`, `attn.bn`, `attn.fc_select`; no
    convolution has a bias. The official weights are Caffe's: both branches see all of the input
    (`split_input=False`), with `groups=32` and a bottleneck of max(C / 16, 32) channels (`rd_divisor=32`). Written to
    tensors named layer (of `convS_B/`) plus torch parameter, they load by the official variant's key map.

    Args:
        in_channels: channels of the input.
        out_channels: channels of each branch and of the output; as many as the input has when None.
        kernel_sizes: the odd kernel size of each branch.
        stride: stride of the branches.
        dilation: dilation of the branches.
        groups: groups of each branch; no more than `out_channels` are used.
        rd_ratio: channels of the bottleneck relative to `out_channels`.
        rd_channels: channels of the bottleneck; by ratio and divisor when None.
        rd_divisor: the bottleneck has a multiple of this.
        keep_3x3: a larger kernel is a 3x3 kernel with more dilation.
        split_input: each branch sees its share of the input's channels.

    Raises:
        ValueError: an even or small kernel, or channels that the branches or groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_sizes: Sequence[int] = (3, 5),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        groups = min(out_channels, groups)
        if not kernel_sizes or any(size < 3 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={tuple(kernel_sizes)}: give odd sizes of at least 3, such as (3, 5)")
        shares = len(kernel_sizes) if split_input else 1
        if in_channels % (shares * groups) or out_channels % groups:
            raise ValueError(
                f"in_channels={in_channels}, out_channels={out_channels}: give multiples of the {shares} shares of the "
                f"input times groups={groups}"
            )
        self.share = in_channels // shares if split_input else 0
        self.paths = nn.ModuleList(
            _branch(in_channels // shares, out_channels, 3, stride, dilation * (size - 1) // 2, groups)
            if keep_3x3
            else _branch(in_channels // shares, out_channels, size, stride, dilation, groups)
            for size in kernel_sizes
        )
        hidden = rd_channels or divisible(out_channels * rd_ratio, rd_divisor)
        self.attn = nn.Sequential()
        self.attn.add_module("fc_reduce", nn.Conv2d(out_channels, hidden, 1, bias=False))
        self.attn.add_module("bn", nn.BatchNorm2d(hidden))
        self.attn.add_module("act", nn.ReLU())
        self.attn.add_module("fc_select", nn.Conv2d(hidden, out_channels * len(kernel_sizes), 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the branches and select among them.

        Args:
            x: (batch, in_channels, height, width).

        Returns:
            (batch, out_channels, height, width), for stride s the sizes divided by s and rounded up.
        """
        if self.share:
            branches = [path(x[:, i * self.share : (i + 1) * self.share]) for i, path in enumerate(self.paths)]
        else:
            branches = [path(x) for path in self.paths]
        return select(branches, self.attn(pooled(branches)))

    def prepare_for_export(self) -> SelectiveKernel:
        """Return a copy whose last layer gives the difference of the logits, where there are two branches."""
        folded = copy.deepcopy(self)
        folded.attn.fc_select = difference(self.attn.get_submodule("fc_select"), len(self.paths))  # type: ignore[arg-type]
        return folded


class SKConv(nn.Module):
    """Selective kernel of pppLang/SKNet: larger kernels instead of dilation, two linear layers with nothing between.

    State names and shapes are those of the class of the same name: `convs.i.0` (with bias), `convs.i.1` batch
    normalisation, `fc` (d, features) and `fcs.i` (features, d), linear layers with bias. Kernel i has size 3 + 2 i.

    Args:
        features: channels of input and output.
        branches: number of branches, M in the published code.
        groups: groups of each convolution, G.
        reduction: d = max(features / reduction, minimum), r.
        stride: stride of the branches.
        minimum: the least d, L.

    Raises:
        ValueError: fewer than one branch, or features that the groups do not divide.
    """

    def __init__(
        self,
        features: int,
        branches: int = 2,
        groups: int = 8,
        reduction: float = 2,
        stride: int = 1,
        minimum: int = 32,
    ) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"branches={branches}: give at least 1")
        if features % groups:
            raise ValueError(f"features={features}: give a multiple of groups={groups}")
        hidden = max(int(features / reduction), minimum)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, features, 3 + 2 * i, stride, 1 + i, groups=groups),
                nn.BatchNorm2d(features),
                nn.ReLU(),
            )
            for i in range(branches)
        )
        self.fc: nn.Module = nn.Linear(features, hidden)
        self.fcs = nn.ModuleList(nn.Linear(hidden, features) for _ in range(branches))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the branches and select among them.

        Args:
            x: (batch, features, height, width).

        Returns:
            (batch, features, height, width), for stride s the sizes divided by s and rounded up.
        """
        branches = [conv(x) for conv in self.convs]
        hidden = self.fc(pooled(branches).flatten(1))
        logits = [fc(hidden) for fc in self.fcs]
        joined = torch.cat(logits, dim=1) if len(logits) > 1 else logits[0]
        return select(branches, joined[:, :, None, None])

    def prepare_for_export(self) -> SKConv:
        """Return a copy with one linear layer that gives all logits, for two branches their difference.

        `fc` goes into it unless that takes more weights.
        """
        folded = copy.deepcopy(self)
        fc, layers = self.fc, list(self.fcs)
        assert isinstance(fc, nn.Linear)
        with torch.no_grad():
            weight, bias = (torch.cat([layer.get_parameter(name) for layer in layers]) for name in ("weight", "bias"))
            if len(layers) == 2:
                weight, bias = (first - second for first, second in (weight.chunk(2), bias.chunk(2)))
            rows, hidden, features = weight.shape[0], fc.out_features, fc.in_features
            if rows * features <= hidden * (rows + features):
                weight, bias = torch.matmul(weight, fc.weight), torch.mv(weight, fc.bias) + bias
                folded.fc = nn.Identity()
            layer = nn.Linear(weight.shape[1], rows).to(weight)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        folded.fcs = nn.ModuleList([layer])
        return folded


class SKBottleneck(nn.Module):
    """Residual bottleneck of PytorchInsight's SK-ResNets: a dense and a grouped 3x3 branch, neither dilated.

    State names and shapes are the official ones: `conv1`, `bn1`; the branches `conv2`, `bn2` and `conv2g`, `bn2g`;
    `conv_fc1` (planes // 16), `bn_fc1`, `conv_fc2` (2 * planes); `conv3`, `bn3`; perhaps `downsample.0`, `.1`. No
    convolution has a bias. The bottleneck of the selection has no minimum width.

    Args:
        inplanes: channels of the input.
        planes: channels of the branches; the output has four times as many.
        stride: stride of the branches and of the shortcut.
        downsample: whether the shortcut is a 1x1 convolution with batch normalisation.
        groups: groups of the second branch.

    Raises:
        ValueError: planes that the groups do not divide or below 16, or a shortcut of another shape than the output.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: bool = False, groups: int = 32) -> None:
        super().__init__()
        if planes % groups or planes < 16:
            raise ValueError(f"planes={planes}: give a multiple of groups={groups} of at least 16")
        if not downsample and (stride != 1 or inplanes != 4 * planes):
            raise ValueError(
                f"inplanes={inplanes}, stride={stride}: the shortcut needs downsample=True unless the stride is 1 and "
                f"inplanes is 4 * planes = {4 * planes}"
            )
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2g = nn.Conv2d(planes, planes, 3, stride, 1, groups=groups, bias=False)
        self.bn2g = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.conv_fc1 = nn.Conv2d(planes, planes // 16, 1, bias=False)
        self.bn_fc1 = nn.BatchNorm2d(planes // 16)
        self.conv_fc2 = nn.Conv2d(planes // 16, 2 * planes, 1, bias=False)
        self.downsample: nn.Sequential | None = None
        if downsample:
            convolution = nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the residual block.

        Args:
            x: (batch, inplanes, height, width).

        Returns:
            (batch, 4 * planes, height, width), for stride s the sizes divided by s and rounded up.
        """
        hidden = self.bn1(self.conv1(x)).relu()
        branches = [self.bn2(self.conv2(hidden)).relu(), self.bn2g(self.conv2g(hidden)).relu()]
        logits = self.conv_fc2(self.bn_fc1(self.conv_fc1(pooled(branches))).relu())
        out = self.bn3(self.conv3(select(branches, logits)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return (out + shortcut).relu()

    def prepare_for_export(self) -> SKBottleneck:
        """Return a copy whose last layer gives the difference of the logits."""
        folded = copy.deepcopy(self)
        folded.conv_fc2 = difference(self.conv_fc2, 2)
        return folded


def _branches(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of one branch at stride 1."""
    channels: int = arguments.get("features") or arguments.get("out_channels") or arguments["in_channels"]
    return sizes["batch"] * channels * sizes["height"] * sizes["width"]


_LAYER = r"^(?:conv\d_\d+/)?"
_CAFFE = {
    rf"{_LAYER}3x3g32\.": "paths.0.conv.",
    rf"{_LAYER}3x3g32/bn\.": "paths.0.bn.",
    rf"{_LAYER}3x3g32d2\.": "paths.1.conv.",
    rf"{_LAYER}3x3g32d2/bn\.": "paths.1.bn.",
    rf"{_LAYER}B_fc1\.": "attn.fc_reduce.",
    rf"{_LAYER}B_fc1/bn\.": "attn.bn.",
    rf"{_LAYER}B_fc2\.": "attn.fc_select.",
}
_OFFICIAL = {"split_input": False, "rd_divisor": 32}
_PAPER = "Selective Kernel Networks, CVPR 2019"
_PRECISION = (
    "the means over all positions with their sum, which may exceed FP16 where no branch does, and the softmax stay in "
    "FP32; sigmoid and weighted sum, which is a mean of the branches, run in FP16"
)
_INT8 = "the convolutions of the branches; the layers of the pooled vector cost nothing and stay in floating point"

BLOCKS.add(
    BlockSpec(
        name="selective-kernel",
        title="selective kernel of dilated branches",
        paper=_PAPER,
        year=2019,
        code="https://github.com/implus/SKNet, https://github.com/huggingface/pytorch-image-models",
        build=SelectiveKernel,
        original="edgeattn.validation.originals.selective_kernel:SelectiveKernel",
        variants=(
            Variant(
                "official",
                {"in_channels": 16, "groups": 4, **_OFFICIAL},
                key_map=_CAFFE,
                references={"timm_sk_full": {"in_channels": 8, "groups": 4, **_OFFICIAL}},
                published=Published(
                    "SKNet-50, ImageNet 224x224, stage 3",
                    {"in_channels": 256, "groups": 32, **_OFFICIAL},
                    {"batch": 1, "height": 28, "width": 28},
                ),
                overflow=Overflow(
                    80.0,
                    {"batch": 1, "height": 12, "width": 16},
                    state={r"paths\.\d\.bn\.weight": 200.0, "fc_reduce": 1e-3},
                ),
            ),
            Variant(
                "timm",
                {"in_channels": 8, "out_channels": 12, "stride": 2},
                listings={"timm_sk": {"in_channels": 128}},
                references={
                    "timm_sk": {"in_channels": 8},
                    "timm_sk_strided": {"in_channels": 8, "out_channels": 12, "stride": 2},
                    "timm_sk_three": {"in_channels": 6, "kernel_sizes": (3, 5, 7), "keep_3x3": False},
                },
                published=Published(
                    "SK-ResNet-50, ImageNet 224x224, stage 2",
                    {"in_channels": 128},
                    {"batch": 1, "height": 28, "width": 28},
                ),
            ),
        ),
        largest=_branches,
        precision=_PRECISION,
        int8=_INT8,
        int8_exclude=("attn",),
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="sk-conv",
        title="selective kernel of growing kernels",
        paper=_PAPER,
        year=2019,
        code="https://github.com/pppLang/SKNet",
        build=SKConv,
        original="edgeattn.validation.originals.selective_kernel:SKConv",
        variants=(
            Variant(
                "ppp",
                {"features": 8, "groups": 4},
                listings={"skconv": {"features": 256}},
                references={"skconv": {"features": 8, "groups": 4, "minimum": 6}},
                published=Published(
                    "SKNet, CIFAR-10, stage 1", {"features": 256}, {"batch": 1, "height": 32, "width": 32}
                ),
            ),
            Variant(
                "three",
                {"features": 8, "groups": 2, "branches": 3, "stride": 2},
                references={"skconv_three": {"features": 8, "groups": 2, "branches": 3, "stride": 2, "minimum": 4}},
                overflow=Overflow(
                    185.0,
                    {"batch": 1, "height": 10, "width": 14},
                    state={r"convs\.\d\.1\.weight": 200.0, r"fc\.weight": 1e-3},
                ),
            ),
        ),
        largest=_branches,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("x", ("batch", "features", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="sk-bottleneck",
        title="selective kernel bottleneck of a dense and a grouped branch",
        paper=_PAPER,
        year=2019,
        code="https://github.com/implus/PytorchInsight",
        build=SKBottleneck,
        original="edgeattn.validation.originals.selective_kernel:SKBottleneck",
        variants=(
            Variant(
                "insight",
                {"inplanes": 12, "planes": 16, "stride": 2, "downsample": True, "groups": 4},
                listings={"sk_bottleneck": {"inplanes": 512, "planes": 128}},
                references={"sk_bottleneck": {"inplanes": 128, "planes": 32}},
                published=Published(
                    "SK-ResNet-50, ImageNet 224x224, stage 2",
                    {"inplanes": 512, "planes": 128},
                    {"batch": 1, "height": 28, "width": 28},
                ),
            ),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"] * max(arguments["inplanes"], 4 * arguments["planes"]) * sizes["height"] * sizes["width"]
        ),
        precision=_PRECISION,
        int8=_INT8,
        int8_exclude=("conv_fc1", "conv_fc2"),
        inputs=(TensorInput("x", ("batch", "inplanes", "height", "width")),),
    )
)
