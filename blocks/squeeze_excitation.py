"""Squeeze-and-excitation: every channel is scaled by a gate that all channels' means decide.

Paper: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018 (arXiv 1709.01507).
Code: https://github.com/hujie-frank/SENet, `models/*.prototxt` (Caffe). PyTorch checkpoints follow
https://github.com/moskomule/senet.pytorch, `senet/se_module.py`; https://github.com/implus/PytorchInsight,
`classification/models/imagenet/resnet_se.py`; https://github.com/huggingface/pytorch-image-models,
`timm/layers/squeeze_excite.py` and `timm/models/senet.py`.

    z_c = mean_hw x_c    y_c = x_c sigmoid(W2 relu(W1 z + b1) + b2)_c
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Published, TensorInput, Variant


class ChannelLinear(nn.Linear):
    """A linear layer over the channels of a map: the state of `nn.Linear`, exported as the 1x1 convolution it is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_features, height, width) to (batch, out_features, height, width)."""
        return F.conv2d(input, self.weight[:, :, None, None], self.bias)

    def prepare_for_export(self) -> nn.Conv2d:
        """Return the 1x1 convolution."""
        convolution = nn.Conv2d(self.in_features, self.out_features, 1, bias=self.bias is not None).to(self.weight)
        with torch.no_grad():
            convolution.weight.copy_(self.weight[:, :, None, None])
            if convolution.bias is not None:
                convolution.bias.copy_(self.bias)
        return convolution


def channel_layer(inputs: int, outputs: int, *, bias: bool, convolution: bool) -> nn.Module:
    """Return a layer over the channels of a map whose weight is (outputs, inputs), as a convolution with (1, 1) behind.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        bias: whether the layer has a bias.
        convolution: whether the state is that of a 1x1 convolution.
    """
    return nn.Conv2d(inputs, outputs, 1, bias=bias) if convolution else ChannelLinear(inputs, outputs, bias=bias)


def reduced_channels(block: str, channels: int, reduction: int) -> int:
    """Return channels // reduction.

    Args:
        block: what the block is called, for the message.
        channels: channels of the block.
        reduction: how many of them one hidden channel stands for.

    Raises:
        ValueError: the reduction is below 1 or leaves no channel.
    """
    if not 1 <= reduction <= channels:
        raise ValueError(
            f"{block} with {channels} channels has reduction={reduction}, which leaves no hidden channel. "
            f"Give 1 to {channels}; the published networks have 16."
        )
    return channels // reduction


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation layer.

    State names are those of moskomule/senet.pytorch: `fc.0` (hidden, channel) and `fc.2` (channel, hidden), without
    biases. PytorchInsight has the same names with biases. timm, Cadene and whatever was converted from Caffe hold two
    1x1 convolutions with biases, `fc1` and `fc2`.

    Args:
        channel: channels of input and output.
        reduction: channels per hidden channel.
        hidden: hidden channels, channel // reduction when None. timm's `SEModule` rounds to a multiple of 8, at least
            8, so that 64 channels have 8 and not 4; its `senet` does not.
        bias: whether both layers have biases.
        convolutions: whether the state holds 1x1 convolutions and not linear layers.

    Raises:
        ValueError: no hidden channel is left.
    """

    def __init__(
        self,
        channel: int,
        reduction: int = 16,
        *,
        hidden: int | None = None,
        bias: bool = False,
        convolutions: bool = False,
    ) -> None:
        super().__init__()
        if hidden is None:
            hidden = reduced_channels("a squeeze-and-excitation layer", channel, reduction)
        if hidden < 1:
            raise ValueError(f"a squeeze-and-excitation layer has hidden={hidden}. Give at least 1 channel.")
        self.fc = nn.Sequential(
            channel_layer(channel, hidden, bias=bias, convolution=convolutions),
            nn.ReLU(),
            channel_layer(hidden, channel, bias=bias, convolution=convolutions),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of (batch, channel, height, width)."""
        return x * self.fc(x.mean(dim=(2, 3), keepdim=True))


_CONVOLUTIONS = {"bias": True, "convolutions": True}

BLOCKS.add(
    BlockSpec(
        name="squeeze-excitation",
        title="squeeze-and-excitation layer",
        paper="Squeeze-and-Excitation Networks, CVPR 2018",
        year=2018,
        code="https://github.com/hujie-frank/SENet, https://github.com/moskomule/senet.pytorch, "
        "https://github.com/implus/PytorchInsight, https://github.com/huggingface/pytorch-image-models",
        build=SqueezeExcitation,
        original="edgeattn.validation.originals.squeeze_excitation:SqueezeExcitation",
        variants=(
            Variant(
                "official",
                {"channel": 8, "reduction": 4},
                listings={"se_layer": {"channel": 512}},
                references={"se_layer": {"channel": 32}},
                published=Published(
                    "SE-ResNet-50, ImageNet 224x224, first stage",
                    {"channel": 256},
                    {"batch": 1, "height": 56, "width": 56},
                ),
            ),
            Variant(
                "insight",
                {"channel": 8, "reduction": 4, "bias": True},
                references={"se_layer_bias": {"channel": 32, "bias": True}},
            ),
            Variant(
                "timm",
                {"channel": 8, "hidden": 3, **_CONVOLUTIONS},
                key_map={r"\b(se_module\.)?fc1\.": "fc.0.", r"\b(se_module\.)?fc2\.": "fc.2."},
                listings={"timm_se": {"channel": 512, **_CONVOLUTIONS}},
                references={
                    "timm_se": {"channel": 32, "hidden": 8, **_CONVOLUTIONS},
                    "timm_se_legacy": {"channel": 32, **_CONVOLUTIONS},
                },
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["channel"] * sizes["height"] * sizes["width"],
        precision="the means over all positions are summed in FP32; layers, gate and the product run in FP16",
        int8="nothing: the layers see one vector per image, and the block is bound by memory",
        int8_exclude=("fc",),
        inputs=(TensorInput("x", ("batch", "channel", "height", "width")),),
    )
)
