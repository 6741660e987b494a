"""COSNet: a siamese DeepLab whose frames meet in co-attention.

Paper: Lu et al., "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
CVPR 2019. Code: https://github.com/carrierlxk/COSNet, `deeplab/siamese_model_conf.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks import CoAttentionBase
from edgeattn.models.resnet import EXPANSION, make_stages


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with COSNet's names.

    Args:
        in_channels: input channels.
        depth: channels of each of the five branches.
        channels: output channels.
        dilations: of the three 3x3 branches.
    """

    def __init__(self, in_channels: int, depth: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, depth, 1)
        self.bn_x = nn.BatchNorm2d(depth)
        self.conv2d_0 = nn.Conv2d(in_channels, depth, 1)
        self.bn_0 = nn.BatchNorm2d(depth)
        for index, dilation in enumerate(dilations, start=1):
            self.add_module(f"conv2d_{index}", nn.Conv2d(in_channels, depth, 3, padding=dilation, dilation=dilation))
            self.add_module(f"bn_{index}", nn.BatchNorm2d(depth))
        self.relu = nn.ReLU()
        self.bottleneck = nn.Conv2d(depth * (2 + len(dilations)), channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.branches = 1 + len(dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height, width)."""
        # The published code resizes the pooled 1x1 map to the full size; expanding it is the same.
        pooled = self.relu(self.bn_x(self.conv(x.mean(dim=(2, 3), keepdim=True)))).expand(-1, -1, *x.shape[2:])
        branches = [
            self.relu(self.get_submodule(f"bn_{index}")(self.get_submodule(f"conv2d_{index}")(x)))
            for index in range(self.branches)
        ]
        out: torch.Tensor = self.prelu(self.bn(self.bottleneck(torch.cat([pooled, *branches], dim=1))))
        return out


class Encoder(nn.Module):
    """DeepLab encoder with COSNet's names: `conv1`, `bn1`, `layer1..5`, `main_classifier`.

    Args:
        blocks: bottlenecks per stage.
        base_width: channels of the stem and inner channels of the first stage.
        aspp_depth: channels of each ASPP branch.
        channels: feature channels.
        dilations: of the ASPP branches.
    """

    def __init__(
        self, blocks: Sequence[int], base_width: int, aspp_depth: int, channels: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            base_width, base_width, blocks, nn.BatchNorm2d, stride_on_first=True
        )
        self.layer5 = ASPP(base_width * 8 * EXPANSION, aspp_depth, channels, dilations)
        self.main_classifier = nn.Conv2d(channels, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, height, width) to features (batch, channels, height / 8, width / 8)."""
        x: torch.Tensor = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = layer(x)
        return x


class COSNet(CoAttentionBase):
    """COSNet in the official layout: `encoder`, `linear_e`, `gate`, `conv1/2`, `bn1/2`, `main_classifier1/2`.

    The co-attention parameters sit at the top level of the official state_dict, so the network is the block with an
    encoder and two classifiers around it.

    Args:
        blocks: bottlenecks per stage; (3, 4, 23, 3) is ResNet-101.
        base_width: channels of the stem and inner channels of the first stage.
        aspp_depth: channels of each ASPP branch.
        channels: feature channels.
        dilations: of the ASPP branches.
        affinity: form of the co-attention, see `edgeattn.blocks.CoAttention`.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 23, 3),
        base_width: int = 64,
        aspp_depth: int = 512,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
        affinity: str = "vanilla",
    ) -> None:
        super().__init__(channels, affinity, gate=True)
        self.encoder = Encoder(blocks, base_width, aspp_depth, channels, dilations)
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.main_classifier1 = nn.Conv2d(channels, 1, 1)
        self.main_classifier2 = nn.Conv2d(channels, 1, 1)

    def forward(self, target: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segment the object that two frames share.

        Args:
            target: first frame (batch, 3, height, width), preprocessed.
            reference: second frame, same shape.

        Returns:
            Probability of the object in the target, and in the reference (batch, 1, height, width); and the encoder's
            own saliency of the reference, which only training uses.
        """
        size = target.shape[2:]
        # One pass of the shared encoder over both frames; the same as two, since evaluation treats samples alone.
        features = self.encoder(torch.cat([target, reference]))
        batch = target.shape[0]
        exemplar, query = features[:batch], features[batch:]
        attended_target, attended_reference = self.attend(exemplar, query)
        hidden_target = self.relu(self.bn1(self.conv1(torch.cat([attended_target, exemplar], dim=1))))
        hidden_reference = self.relu(self.bn2(self.conv2(torch.cat([attended_reference, query], dim=1))))
        return (
            _probability(self.main_classifier1(hidden_target), size),
            _probability(self.main_classifier2(hidden_reference), size),
            _probability(self.encoder.main_classifier(query), size),
        )

    def forward_group(self, target: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Segment a target frame with N references at once.

        Args:
            target: (batch, 3, height, width), preprocessed.
            references: (batch, N, 3, height, width).

        Returns:
            Probability of the object in the target (batch, 1, height, width).
        """
        return self.segment_features(self.encode(target), self._encode_each(references), target.shape[2:])

    def forward_mean(self, target: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Segment a target frame with each of N references, and average the probabilities, as the paper's tests do.

        Args:
            target: (batch, 3, height, width), preprocessed.
            references: (batch, N, 3, height, width).

        Returns:
            Probability of the object in the target (batch, 1, height, width).
        """
        return self.average_features(self.encode(target), self._encode_each(references), target.shape[2:])

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Return what the heads need of frames (batch, 3, height, width): features (batch, channels, h, w)."""
        features: torch.Tensor = self.encoder(frames)
        return features

    def segment_features(
        self, exemplar: torch.Tensor, references: torch.Tensor, size: torch.Size | tuple[int, int]
    ) -> torch.Tensor:
        """Compute `forward_group` from features.

        Args:
            exemplar: features of the targets (batch, channels, h, w).
            references: features of N references for each target (batch, N, channels, h, w).
            size: (height, width) of the frames; features of several sizes of frames have the same.

        Returns:
            Probability of the object in the targets (batch, 1, height, width).
        """
        attended = self.attend_group(exemplar, references)
        hidden = self.relu(self.bn1(self.conv1(torch.cat([attended, exemplar], dim=1))))
        return _probability(self.main_classifier1(hidden), size)

    def average_features(
        self, exemplar: torch.Tensor, references: torch.Tensor, size: torch.Size | tuple[int, int]
    ) -> torch.Tensor:
        """Compute `forward_mean` from features; arguments and result as in `segment_features`."""
        repeated = exemplar[:, None].expand(-1, references.shape[1], -1, -1, -1)
        single = self.segment_features(repeated.flatten(0, 1), references.flatten(0, 1)[:, None], size)
        return single.reshape(*references.shape[:2], *single.shape[1:]).mean(dim=1)

    def _encode_each(self, references: torch.Tensor) -> torch.Tensor:
        """Return the features of references (batch, N, 3, height, width), (batch, N, channels, h, w)."""
        features = self.encode(references.flatten(0, 1))
        return features.reshape(*references.shape[:2], *features.shape[1:])


def _probability(logits: torch.Tensor, size: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Resize logits to the input size, then squash them."""
    return torch.sigmoid(F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False))
