"""BAM, the bottleneck attention module: one gate from a channel's logit times a position's.

Paper: Park et al., "BAM: Bottleneck Attention Module", BMVC 2018 (arXiv 1807.06514).
Code: https://github.com/Jongchan/attention-module, `MODELS/bam.py`; https://github.com/implus/PytorchInsight,
`classification/models/imagenet/resnet_bam.py`.

    c = W2 relu(BN(W1 pool(x)))    q = conv1x1(relu(BN(conv3x3(relu(BN(conv3x3(relu(BN(conv1x1(x)))))))))
    y = x (1 + sigmoid(c q))

The paper adds the two logits; the code, and with it every released weight, multiplies them. The paper also normalises
c; the code does not.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.squeeze_excitation import ChannelLinear, reduced_channels
from edgeattn.foundation import UserError

_REASON = "the square pool of the published code depends on whether the map is wider than high"


def square_pool(x: torch.Tensor) -> torch.Tensor:
    """Average over a square as wide as the map is high, at the left, as the published code does.

    Args:
        x: (batch, channels, height, width) with height <= width < 2 height.

    Returns:
        (batch, channels, 1, 1); for square maps the mean over all positions.

    Raises:
        UserError: another shape, on which the published code stops too, or a dynamic one.
    """
    height, width = x.shape[2:]
    require_static("BAM with square_pool", "height", height, _REASON)
    require_static("BAM with square_pool", "width", width, _REASON)
    if not height <= width < 2 * height:
        raise UserError(
            f"BAM with square_pool needs height <= width < 2 * height, got {height} x {width}: the published code "
            "pools with a square window as wide as the map is high. Use square_pool=False for the mean over all "
            "positions, which is the same on square maps."
        )
    return x[..., :height].mean(dim=(2, 3), keepdim=True)


class ChannelGate(nn.Module):
    """Logit of every channel. State names are the official ones: `gate_c.gate_c_fc_0`, `_bn_1`, `_fc_final`.

    Args:
        channels: channels of the input.
        hidden: hidden channels.
        square_pool: see `BAM`.
    """

    def __init__(self, channels: int, hidden: int, square_pool: bool) -> None:
        super().__init__()
        self.square_pool = square_pool
        self.gate_c = nn.Sequential(
            OrderedDict[str, nn.Module](
                gate_c_fc_0=ChannelLinear(channels, hidden),
                gate_c_bn_1=nn.BatchNorm2d(hidden),  # the official one is for vectors, with the same state
                gate_c_relu_1=nn.ReLU(),
                gate_c_fc_final=ChannelLinear(hidden, channels),
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, channels, 1, 1)."""
        return self.gate_c(square_pool(x) if self.square_pool else x.mean(dim=(2, 3), keepdim=True))


class SpatialGate(nn.Module):
    """Logit of every position.

    State names are the official ones: `gate_s.gate_s_conv_reduce0`, `_bn_reduce0`, `_conv_di_0`, `_bn_di_0`,
    `_conv_di_1`, `_bn_di_1`, `_conv_final`; the two 3x3 convolutions have dilation 4.

    Args:
        channels: channels of the input.
        hidden: hidden channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        layers = OrderedDict[str, nn.Module](
            gate_s_conv_reduce0=nn.Conv2d(channels, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for index in range(2):
            layers[f"gate_s_conv_di_{index}"] = nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)
            layers[f"gate_s_bn_di_{index}"] = nn.BatchNorm2d(hidden)
            layers[f"gate_s_relu_di_{index}"] = nn.ReLU()
        layers["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.gate_s = nn.Sequential(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, 1, height, width)."""
        return self.gate_s(x)


class BAM(nn.Module):
    """Bottleneck attention module.

    State names are the official ones below `channel_att` and `spatial_att`; PytorchInsight has the same.

    Args:
        gate_channel: channels of input and output.
        reduction_ratio: channels per hidden channel of both gates, 16 in the published code.
        square_pool: take the channels' means over the leftmost square of a map that is wider than high, as the
            published code does by accident; such a map keeps its size in an export. Otherwise over all positions. On
            square maps, where all released weights were trained, both are the same.

    Raises:
        ValueError: no hidden channel is left.
    """

    def __init__(self, gate_channel: int, reduction_ratio: int = 16, *, square_pool: bool = True) -> None:
        super().__init__()
        hidden = reduced_channels("BAM", gate_channel, reduction_ratio)
        self.channel_att = ChannelGate(gate_channel, hidden, square_pool)
        self.spatial_att = SpatialGate(gate_channel, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale (batch, gate_channel, height, width) by gates between 1 and 2.

        Raises:
            UserError: with `square_pool`, a map that is higher than wide or at least twice as wide as high.
        """
        return x * (1 + (self.channel_att(x) * self.spatial_att(x)).sigmoid())


_SQUARE_SIZES: tuple[Sizes, ...] = tuple({"batch": batch, "height": 5, "width": 7} for batch in (2, 1, 3))

BLOCKS.add(
    BlockSpec(
        name="bam",
        title="bottleneck attention module",
        paper="BAM: Bottleneck Attention Module, BMVC 2018",
        year=2018,
        code="https://github.com/Jongchan/attention-module, https://github.com/implus/PytorchInsight",
        build=BAM,
        original="edgeattn.validation.originals.bam:BAM",
        variants=(
            Variant(
                "official",
                {"gate_channel": 8, "reduction_ratio": 2},
                listings={"bam": {"gate_channel": 256}, "bam_rect": {"gate_channel": 256}},
                references={"bam": {"gate_channel": 32}, "bam_insight": {"gate_channel": 32}},
                published=Published(
                    "BAM-ResNet-50, ImageNet 224x224, behind the first stage",
                    {"gate_channel": 256},
                    {"batch": 1, "height": 56, "width": 56},
                ),
                sizes=_SQUARE_SIZES,
                fixed={"height": _REASON, "width": _REASON},
            ),
            Variant("global-pool", {"gate_channel": 8, "reduction_ratio": 2, "square_pool": False}),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["gate_channel"] * sizes["height"] * sizes["width"],
        precision="the means over positions are summed in FP32; layers, convolutions, gates and products run in FP16",
        int8="the convolutions of the spatial gate but the last, which makes the logits; the layers of the channel "
        "gate, which see one vector per image, stay in floating point",
        int8_exclude=("channel_att", "spatial_att.gate_s.gate_s_conv_final"),
        inputs=(TensorInput("x", ("batch", "gate_channel", "height", "width")),),
    )
)
