"""COSNet, original: a siamese DeepLabv3 whose two frames attend to each other.

Paper: Lu et al., "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
CVPR 2019.
Behaviour: carrierlxk/COSNet, `deeplab/siamese_model_conf.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.validation.originals.co_attention import affinity_matrix, attend, gated

EXPANSION = 4


class Bottleneck(nn.Module):
    """Residual unit of 1x1, 3x3 and 1x1 convolutions, with the stride on the first 1x1.

    Args:
        inputs: input channels.
        planes: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the first convolution and of the projected shortcut.
        dilation: dilation of the 3x3 convolution.
        project: whether the shortcut is a 1x1 convolution.
    """

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if project
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unit's output (B, 4 * planes, H / stride, W / stride) for x (B, inputs, H, W)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: image pooling, a 1x1 and three dilated 3x3 branches, merged by a 3x3.

    Args:
        inputs: input channels.
        depth: channels of each branch.
        outputs: channels of the result.
        dilations: of the three 3x3 branches.
    """

    def __init__(self, inputs: int, depth: int, outputs: int, dilations: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, depth, 1)
        self.bn_x = nn.BatchNorm2d(depth)
        self.conv2d_0 = nn.Conv2d(inputs, depth, 1)
        self.bn_0 = nn.BatchNorm2d(depth)
        self.conv2d_1 = nn.Conv2d(inputs, depth, 3, padding=dilations[0], dilation=dilations[0])
        self.bn_1 = nn.BatchNorm2d(depth)
        self.conv2d_2 = nn.Conv2d(inputs, depth, 3, padding=dilations[1], dilation=dilations[1])
        self.bn_2 = nn.BatchNorm2d(depth)
        self.conv2d_3 = nn.Conv2d(inputs, depth, 3, padding=dilations[2], dilation=dilations[2])
        self.bn_3 = nn.BatchNorm2d(depth)
        self.bottleneck = nn.Conv2d(5 * depth, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (B, outputs, H, W) for x (B, inputs, H, W)."""
        pooled = torch.relu(self.bn_x(self.conv(x.mean(dim=(2, 3), keepdim=True))))
        branches = [
            pooled.expand(-1, -1, x.shape[2], x.shape[3]),
            torch.relu(self.bn_0(self.conv2d_0(x))),
            torch.relu(self.bn_1(self.conv2d_1(x))),
            torch.relu(self.bn_2(self.conv2d_2(x))),
            torch.relu(self.bn_3(self.conv2d_3(x))),
        ]
        features: torch.Tensor = self.prelu(self.bn(self.bottleneck(torch.cat(branches, dim=1))))
        return features


class Encoder(nn.Module):
    """DeepLabv3 at output stride 8, with a saliency classifier of its own.

    Args:
        blocks: residual units of the four stages.
        base_width: channels of the stem and planes of the first stage.
        aspp_depth: channels of each ASPP branch.
        channels: channels of the features.
        dilations: of the three dilated ASPP branches.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        base_width: int,
        aspp_depth: int,
        channels: int,
        dilations: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        planes = [base_width, 2 * base_width, 4 * base_width, 8 * base_width]
        features = [plane * EXPANSION for plane in planes]
        self.layer1 = _stage(base_width, planes[0], blocks[0], stride=1, dilation=1)
        self.layer2 = _stage(features[0], planes[1], blocks[1], stride=2, dilation=1)
        self.layer3 = _stage(features[1], planes[2], blocks[2], stride=1, dilation=2)
        self.layer4 = _stage(features[2], planes[3], blocks[3], stride=1, dilation=4)
        self.layer5 = ASPP(features[3], aspp_depth, channels, dilations)
        self.main_classifier = nn.Conv2d(channels, 1, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (B, channels, h, w) and saliency (B, 1, H, W) of images (B, 3, H, W)."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(image))))
        features = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return features, _probability(self.main_classifier(features), image)


class COSNet(nn.Module):
    """The pairwise network with vanilla gated co-attention, in evaluation mode from construction on.

    Args:
        blocks: residual units of the four stages; (3, 4, 23, 3) is ResNet-101.
        base_width: channels of the stem and planes of the first stage; each further stage doubles them.
        aspp_depth: channels of each ASPP branch.
        channels: channels of the features that attend.
        dilations: of the three dilated ASPP branches.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int] = (3, 4, 23, 3),
        base_width: int = 64,
        aspp_depth: int = 512,
        channels: int = 256,
        dilations: tuple[int, int, int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        self.encoder = Encoder(blocks, base_width, aspp_depth, channels, dilations)
        self.linear_e = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Conv2d(channels, 1, 1, bias=False)
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.main_classifier1 = nn.Conv2d(channels, 1, 1)
        self.main_classifier2 = nn.Conv2d(channels, 1, 1)
        self.eval()

    def forward(self, target: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Segment what two frames have in common.

        Args:
            target: preprocessed frames (B, 3, H, W).
            reference: other frames of the same videos (B, 3, H, W).

        Returns:
            Object probability of the target and of the reference, and the encoder's own saliency of the reference,
            each (B, 1, H, W).
        """
        exemplar, _ = self.encoder(target)
        query, saliency = self.encoder(reference)
        e, q = exemplar.flatten(2), query.flatten(2)
        affinity = affinity_matrix(self.linear_e.weight.T, e, q)
        exemplar_att = gated(attend(affinity, q).reshape(exemplar.shape), self.gate)
        query_att = gated(attend(affinity.transpose(1, 2), e).reshape(query.shape), self.gate)
        a = torch.relu(self.bn1(self.conv1(torch.cat([exemplar_att, exemplar], dim=1))))
        b = torch.relu(self.bn2(self.conv2(torch.cat([query_att, query], dim=1))))
        return (
            _probability(self.main_classifier1(a), target),
            _probability(self.main_classifier2(b), target),
            saliency,
        )


def _stage(inputs: int, planes: int, units: int, stride: int, dilation: int) -> nn.Sequential:
    """Return a stage of residual units; the first one changes stride and channels, all share the dilation."""
    outputs = planes * EXPANSION
    first = Bottleneck(inputs, planes, stride, dilation, project=True)
    rest = [Bottleneck(outputs, planes, 1, dilation, project=False) for _ in range(units - 1)]
    return nn.Sequential(first, *rest)


def _probability(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Enlarge logits (B, 1, h, w) to the image's height and width, then apply the sigmoid, in this order."""
    return torch.sigmoid(F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False))
