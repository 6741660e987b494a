"""Efficient channel attention (ECA): every channel is scaled by a gate that the means of its neighbours decide.

Paper: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020
(arXiv 1910.03151). Code: https://github.com/BangguWu/ECANet, `models/eca_module.py` and `models/eca_ns.py`;
https://github.com/huggingface/pytorch-image-models, `timm/layers/eca.py`.

    z_c = mean_hw x_c    y_c = x_c sigmoid(sum_j w_j z_(c + j - (k - 1) / 2)),   z = 0 outside the channels

timm's `CecaModule` closes the channels to a ring instead: z_c = z_(c + C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Published, TensorInput, Variant
from edgeattn.foundation import UserError


def kernel_size_of(weight: torch.Tensor) -> int:
    """Return the argument `k_size` that a checkpoint's `conv.weight` was trained with.

    The released checkpoints do not follow the paper's formula, so the shape of the weight is the only reliable source.

    Args:
        weight: (1, 1, k), or (channels, 1, k) of a layer with private kernels.

    Raises:
        UserError: another shape, or an even k.
    """
    shape = tuple(weight.shape)
    if len(shape) != 3 or shape[1] != 1 or shape[2] % 2 == 0:
        raise UserError(
            f"the weight of an ECA layer has the shape (1, 1, k) or (channels, 1, k) with an odd k, not {shape}. "
            "Give the tensor that the checkpoint calls conv.weight."
        )
    return shape[2]


class SharedKernel(nn.Conv1d):
    """One kernel for all channels, with the state of `nn.Conv1d`; exported as a convolution along a map's width.

    Args:
        size: size of the kernel.
        circular: whether the first channel follows the last; otherwise, beyond both ends are zeros.
    """

    def __init__(self, size: int, *, circular: bool = False) -> None:
        super().__init__(1, 1, size, bias=False)
        self.circular = circular

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (batch, 1, 1, channels) to the same shape."""
        weight, reach = self.weight[:, :, None], self.weight.shape[2] // 2
        if not self.circular or reach == 0:
            return F.conv2d(input, weight, padding=(0, reach))
        ring = torch.cat([input[..., -reach:], input, input[..., :reach]], dim=3)
        return F.conv2d(ring, weight)


class PrivateKernels(nn.Conv1d):
    """A kernel for every channel, with the state of a grouped `nn.Conv1d`.

    A convolution with the unit vectors stacks the neighbours; two more nodes then do, whatever the size.

    Args:
        channels: number of kernels.
        size: size of each.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, channels, size, bias=False, groups=channels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (batch, 1, 1, channels) to the same shape; beyond both ends are zeros."""
        size = self.weight.shape[2]
        units = torch.eye(size, dtype=input.dtype, device=input.device)[:, None, None]
        neighbours = F.conv2d(input, units, padding=(0, size // 2))
        return (neighbours * self.weight.permute(2, 1, 0)).sum(dim=1, keepdim=True)


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention layer.

    The state is the official one, `conv.weight` alone: (1, 1, k), or (channel, 1, k) with private kernels. timm's
    `EcaModule` has the same. Take k from the checkpoint (`kernel_size_of`): ECANet's ResNet-50 has 3, 5, 5 and 7 in its
    stages, not what the paper's formula gives.

    Args:
        channel: channels of input and output.
        k_size: how many neighbouring channels decide a gate, the channel itself among them.
        private: whether every channel has a kernel of its own (`eca_ns`).
        circular: whether the first channel is a neighbour of the last (timm's `CecaModule`).

    Raises:
        ValueError: fewer than 1 channel, a k_size that is even or below 1, or a ring that its kernel reaches around;
            private kernels on a ring, which no code has.
    """

    def __init__(self, channel: int, k_size: int = 3, *, private: bool = False, circular: bool = False) -> None:
        super().__init__()
        if channel < 1:
            raise ValueError(f"an ECA layer has channel={channel}. Give at least 1.")
        if k_size < 1 or k_size % 2 == 0:
            raise ValueError(
                f"an ECA layer has k_size={k_size}, but its kernel is centred on a channel. Give an odd number; "
                "`kernel_size_of` reads it from a checkpoint's conv.weight."
            )
        if circular and private:
            raise ValueError("an ECA layer has private kernels or a ring of channels, not both. Drop one of the two.")
        if circular and k_size // 2 > channel:
            raise ValueError(f"a ring of channel={channel} is shorter than half of k_size={k_size}. Check both.")
        self.conv = PrivateKernels(channel, k_size) if private else SharedKernel(k_size, circular=circular)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of (batch, channel, height, width)."""
        means = x.mean(dim=(2, 3), keepdim=True).transpose(1, 3)
        return x * self.conv(means).transpose(1, 3).sigmoid()


BLOCKS.add(
    BlockSpec(
        name="efficient-channel-attention",
        title="efficient channel attention layer",
        paper="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, CVPR 2020",
        year=2020,
        code="https://github.com/BangguWu/ECANet, https://github.com/huggingface/pytorch-image-models",
        build=EfficientChannelAttention,
        original="edgeattn.validation.originals.efficient_channel:EfficientChannelAttention",
        variants=(
            Variant(
                "official",
                {"channel": 7, "k_size": 5},
                listings={"eca": {"channel": 512, "k_size": 5}},
                references={"eca": {"channel": 8, "k_size": 5}, "eca_timm": {"channel": 16, "k_size": 3}},
                published=Published(
                    "ECA-ResNet-50, ImageNet 224x224, first stage",
                    {"channel": 256, "k_size": 3},
                    {"batch": 1, "height": 56, "width": 56},
                ),
            ),
            Variant(
                "private",
                {"channel": 7, "k_size": 3, "private": True},
                references={"eca_ns": {"channel": 8, "k_size": 5, "private": True}},
            ),
            Variant(
                "timm-circular",
                {"channel": 7, "k_size": 5, "circular": True},
                references={"eca_circular": {"channel": 8, "k_size": 5, "circular": True}},
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["channel"] * sizes["height"] * sizes["width"],
        precision="the means over all positions are summed in FP32; the kernel, the gate and the product run in FP16",
        int8="nothing: the kernel sees one vector per image, and the block is bound by memory",
        int8_exclude=("conv",),
        inputs=(TensorInput("x", ("batch", "channel", "height", "width")),),
    )
)
