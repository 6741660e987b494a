"""CAN: few-shot classification by cross attention between class prototypes and queries, on a ResNet-12.

Paper: Hou et al., "Cross Attention Network for Few-shot Classification", NeurIPS 2019 (arXiv 1910.07677).
Code: https://github.com/blue-blue272/fewshot-CAN, `torchFewShot/models/net.py`, `resnet12.py`.

A deployed classifier sees its support images once and queries for ever, so that it is two graphs: `embed` turns images
into features, and `compare` scores query features against those of the support set. `forward` is one episode in one
graph: a single support image for each class, and one query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgeattn.blocks.cross_attention import CAM


class BasicBlock(nn.Module):
    """Three 3x3 convolutions with a residual, the second one strided.

    Args:
        in_channels: input channels.
        channels: output channels.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, channels, height / 2, width / 2)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet12(nn.Module):
    """Four residual blocks: `conv1`, `bn1`, `layer1..4`.

    Args:
        base_width: channels of the stem and of the first block; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, base_width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        widths = [base_width * 2**stage for stage in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(before, width))
            for before, width in zip([base_width, *widths], widths, strict=False)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, height, width) to features (batch, 8 * base_width, height / 16, width / 16)."""
        x = torch.relu(self.bn1(self.conv1(image)))
        features: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class CAN(nn.Module):
    """CAN in the official layout: `base`, `cam`, and `clasifier` (so spelt), which only training uses.

    The meta learner has a weight for each position of the features, which fixes the size of the images: 84x84 gives the
    published 6x6.

    Args:
        num_classes: classes of the training set.
        base_width: channels of the stem.
        map_size: height and width of the features.
        reduction: positions per hidden channel of the meta learner.
        scale_cls: factor of the cosines.
    """

    def __init__(
        self,
        num_classes: int = 64,
        base_width: int = 64,
        map_size: tuple[int, int] = (6, 6),
        reduction: int = 6,
        scale_cls: float = 7.0,
    ) -> None:
        super().__init__()
        self.base = ResNet12(base_width)
        self.cam = CAM(*map_size, reduction, scale_cls)
        self.clasifier = nn.Conv2d(8 * base_width, num_classes, 1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, height, width), support or query, to features (batch, channels, *map_size)."""
        features: torch.Tensor = self.base(images)
        return features

    def compare(
        self, support_features: torch.Tensor, membership: torch.Tensor, query_features: torch.Tensor
    ) -> torch.Tensor:
        """Score queries against the classes of a support set.

        Args:
            support_features: (episodes, supports, channels, height, width), what `embed` gives for the support images.
            membership: (episodes, supports, classes), 1 where a support image is of a class, otherwise 0; every class
                has a support image.
            query_features: (episodes, queries, channels, height, width).

        Returns:
            Scores (episodes, queries, classes), `scale_cls` times a cosine.
        """
        # The mean over a class, with the division on the small side.
        weights = (membership / membership.sum(dim=1, keepdim=True)).transpose(1, 2)
        prototypes = torch.matmul(weights, support_features.flatten(2))
        prototypes = prototypes.reshape(*weights.shape[:2], *support_features.shape[2:])
        return self.cam.scores(prototypes, query_features)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """Classify one query in each of a batch of episodes with one support image per class.

        Args:
            images: the support image of every class, then the query, each (episodes, 3, height, width).

        Returns:
            Scores (episodes, classes).
        """
        # One pass over all images; the same as one for each, since evaluation treats samples alone.
        features = self.embed(torch.cat(images))
        features = features.reshape(len(images), -1, *features.shape[1:]).transpose(0, 1)
        prototypes, queries = features[:, :-1], features[:, -1:]
        return self.cam.scores(prototypes, queries).squeeze(1)


def episode_membership(labels: Sequence[int], classes: int) -> torch.Tensor:
    """Return the membership (1, supports, classes) of an episode from the class of every support image."""
    return nn.functional.one_hot(torch.as_tensor(labels), classes).float()[None]
