"""Dual attention of DANet: position attention (PAM), channel attention (CAM) and the head that joins them.

Paper: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019 (arXiv 1809.02983).
Code: https://github.com/junfu1115/DANet, `encoding/nn/da_att.py` and `encoding/models/sseg/danet.py`.

With X (C, N) the features at N positions:

    PAM   Y = gamma * V softmax(Q^T K)^T + X     N x N weights, softmax over the keys, energies not scaled
    CAM   Y = gamma * softmax(-X X^T) X + X      C x C weights: a channel attends to those that are least like it
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgeattn.blocks.folding import fold_gamma
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


class PAM(nn.Module):
    """Position attention: every position gathers from all positions, `gamma * attended + x`.

    State names and shapes are the official ones: `query_conv`, `key_conv` (in_dim // 8), `value_conv`, `gamma` (1,).

    Args:
        in_dim: number of input and output channels, at least 8.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        if in_dim < 8:
            raise ValueError(
                f"in_dim={in_dim} is too small: queries have in_dim // 8 channels. Give 8 channels or more."
            )
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(1))
        self.core = PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_dim, height, width) to the same shape, for any height and width."""
        value = self.value_conv(x)
        if self.gamma is not None:
            value = self.gamma * value
        attended = self.core(self.query_conv(x).flatten(2), self.key_conv(x).flatten(2), value.flatten(2))
        return attended.unflatten(2, x.shape[2:]) + x

    def prepare_for_export(self) -> PAM:
        """Return a copy whose value projection carries gamma (exact: attention is linear in the values)."""
        folded = copy.deepcopy(self)
        fold_gamma(folded.gamma, folded.value_conv)
        folded.gamma = None
        return folded


class CAM(nn.Module):
    """Channel attention: every channel gathers from the channels whose energy with it is lowest.

    The only state is `gamma` (1,). The official code writes the weights as softmax(rowmax(E) - E), which is
    softmax(-E): adding a number to a row changes nothing, and a softmax subtracts the row's maximum by itself.
    It is also more exact: rowmax(E) is a channel's own energy, and the difference to it rounds the others to its last
    digit. In FP32, for 512 channels of 96x96, the official form is 1.2e-5 from FP64 and this one 1.4e-6.

    Args:
        in_dim: number of channels; kept from the official constructor, there are no projections.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_dim, height, width) to the same shape, for any height and width."""
        flat = x.flatten(2)
        energy = torch.matmul(flat, flat.transpose(1, 2))
        attention = self.gamma * (-energy).softmax(dim=2)  # (C, C) is smaller than what it multiplies
        return torch.matmul(attention, flat).unflatten(2, x.shape[2:]) + x


class DANetHead(nn.Module):
    """DANet's head: each attention between two 3x3 convolutions, the two results added and classified.

    State names are the official ones: `conv5a`, `sa` (PAM), `conv51` and `conv5c`, `sc` (CAM), `conv52` for the two
    branches, `conv8` for the logits of their sum, `conv6` and `conv7` for each branch's own.

    Args:
        in_channels: channels of the backbone's last stage; the attention works on a quarter of them.
        out_channels: number of classes.

    Raises:
        ValueError: fewer than 32 channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if in_channels < 32:
            raise ValueError(
                f"in_channels={in_channels} is too small: queries have in_channels // 32 channels. Give 32 or more."
            )
        inner = in_channels // 4
        self.conv5a = _conv_norm_relu(in_channels, inner)
        self.conv5c = _conv_norm_relu(in_channels, inner)
        self.sa = PAM(inner)
        self.sc = CAM(inner)
        self.conv51 = _conv_norm_relu(inner, inner)
        self.conv52 = _conv_norm_relu(inner, inner)
        self.conv6 = _classifier(inner, out_channels)
        self.conv7 = _classifier(inner, out_channels)
        self.conv8 = _classifier(inner, out_channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Classify with the auxiliary outputs that training supervises.

        Args:
            x: (batch, in_channels, height, width).

        Returns:
            Logits of the sum, of position attention, of channel attention, each (batch, out_channels, height, width).
        """
        position, channel = self._branches(x)
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)

    def forward_main(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first output alone, which is what inference uses; shapes as in `forward`."""
        position, channel = self._branches(x)
        return self.conv8(position + channel)

    def _branches(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features after position and after channel attention."""
        return self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3x3 convolution without bias, batch normalisation and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(inputs: int, classes: int) -> nn.Sequential:
    """Return dropout and a 1x1 convolution."""
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(inputs, classes, kernel_size=1))


_DANET = "Dual Attention Network for Scene Segmentation, CVPR 2019"
_CODE = "https://github.com/junfu1115/DANet, https://github.com/open-mmlab/mmsegmentation"
_NETWORK = "DANet, ResNet-101, Cityscapes 768x768"
_SIZES = {"batch": 1, "height": 96, "width": 96}
_PIXELS = "the energies between positions and their softmax stay in FP32 (dot products overflow)"
_CHANNELS = "the energies between channels, sums over all positions that overflow, and their softmax stay in FP32"
_MMSEG_PAM = {r"gamma\.scale$": "gamma", r"(query|key|value)_project\.": r"\1_conv."}
_MMSEG_HEAD = {
    r"^(?:decode_head\.)?pam_in_conv\.conv\.": "conv5a.0.",
    r"^(?:decode_head\.)?pam_in_conv\.bn\.": "conv5a.1.",
    r"^(?:decode_head\.)?cam_in_conv\.conv\.": "conv5c.0.",
    r"^(?:decode_head\.)?cam_in_conv\.bn\.": "conv5c.1.",
    r"^(?:decode_head\.)?pam_out_conv\.conv\.": "conv51.0.",
    r"^(?:decode_head\.)?pam_out_conv\.bn\.": "conv51.1.",
    r"^(?:decode_head\.)?cam_out_conv\.conv\.": "conv52.0.",
    r"^(?:decode_head\.)?cam_out_conv\.bn\.": "conv52.1.",
    r"^(?:decode_head\.)?pam_conv_seg\.": "conv6.1.",
    r"^(?:decode_head\.)?cam_conv_seg\.": "conv7.1.",
    r"^(?:decode_head\.)?conv_seg\.": "conv8.1.",
    r"^(?:decode_head\.)?pam\.gamma\.scale$": "sa.gamma",
    r"^(?:decode_head\.)?cam\.gamma\.scale$": "sc.gamma",
    r"^(?:decode_head\.)?pam\.(query|key|value)_project\.": r"sa.\1_conv.",
}


def _largest_of_positions(channels: int, sizes: Sizes) -> int:
    """Return the elements of the larger of the weights (batch, N, N) and a feature map."""
    positions = sizes["height"] * sizes["width"]
    return sizes["batch"] * positions * max(positions, channels)


def _largest_of_channels(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the weights (batch, C, C) and a feature map."""
    channels = int(arguments["in_dim"])
    return sizes["batch"] * channels * max(channels, sizes["height"] * sizes["width"])


BLOCKS.add(
    BlockSpec(
        name="danet-pam",
        title="position attention module",
        paper=_DANET,
        year=2019,
        code=_CODE,
        build=PAM,
        original="edgeattn.validation.originals.dual_attention:PAM",
        variants=(
            Variant(
                "official",
                {"in_dim": 16},
                listings={"danet_pam": {"in_dim": 512}},
                references={"danet_pam": {"in_dim": 16}},
                published=Published(_NETWORK, {"in_dim": 512}, _SIZES),
                overflow=Overflow(200.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant("mmseg", {"in_dim": 16}, key_map=_MMSEG_PAM, references={"danet_pam_mmseg": {"in_dim": 16}}),
        ),
        largest=lambda arguments, sizes: _largest_of_positions(arguments["in_dim"], sizes),
        precision=f"{_PIXELS}; the sum over values runs in FP16",
        int8="the three projections; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_dim", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="danet-cam",
        title="channel attention module",
        paper=_DANET,
        year=2019,
        code=_CODE,
        build=CAM,
        original="edgeattn.validation.originals.dual_attention:CAM",
        variants=(
            Variant(
                "official",
                {"in_dim": 6},
                key_map={r"gamma\.scale$": "gamma"},
                listings={"danet_cam": {"in_dim": 512}},
                references={"danet_cam": {"in_dim": 6}, "danet_cam_mmseg": {"in_dim": 6}},
                published=Published(_NETWORK, {"in_dim": 512}, _SIZES),
                overflow=Overflow(60.0, {"batch": 1, "height": 5, "width": 7}),
            ),
        ),
        largest=_largest_of_channels,
        precision=f"{_CHANNELS}; the sum over values runs in FP16",
        int8="nothing: there is no convolution",
        inputs=(TensorInput("x", ("batch", "in_dim", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="danet-head",
        title="dual attention head",
        paper=_DANET,
        year=2019,
        code=_CODE,
        build=DANetHead,
        original="edgeattn.validation.originals.dual_attention:DANetHead",
        variants=(
            Variant(
                "official",
                {"in_channels": 32, "out_channels": 3},
                listings={"danet_head": {"in_channels": 2048, "out_channels": 19}},
                references={"danet_head": {"in_channels": 32, "out_channels": 3}},
            ),
            Variant(
                "inference",
                {"in_channels": 32, "out_channels": 3},
                published=Published(_NETWORK, {"in_channels": 2048, "out_channels": 19}, _SIZES),
                method="forward_main",
                overflow=Overflow(200.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "mmseg",
                {"in_channels": 32, "out_channels": 3},
                key_map=_MMSEG_HEAD,
                references={"danet_head_mmseg": {"in_channels": 32, "out_channels": 3}},
            ),
        ),
        largest=lambda arguments, sizes: _largest_of_positions(arguments["in_channels"], sizes),
        precision=f"{_PIXELS}; {_CHANNELS}",
        int8="all convolutions; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)
