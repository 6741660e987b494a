"""CAN, original.

Paper: Hou et al., "Cross Attention Network for Few-shot Classification", NeurIPS 2019.
Behaviour: blue-blue272/fewshot-CAN, `torchFewShot/models/net.py`, `resnet12.py`, in evaluation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.validation.originals.cross_attention import CAM


class BasicBlock(nn.Module):
    """Residual unit that halves the map.

    Args:
        inplanes: channels of the input.
        planes: channels of the result.
    """

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inplanes, H, W) to (B, planes, ceil(H / 2), ceil(W / 2))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + self.downsample(x)
        return F.relu(out)


class ResNet12(nn.Module):
    """Feature extractor.

    Args:
        base_width: channels of the stem.
    """

    def __init__(self, base_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1 = nn.Sequential(BasicBlock(base_width, base_width))
        self.layer2 = nn.Sequential(BasicBlock(base_width, 2 * base_width))
        self.layer3 = nn.Sequential(BasicBlock(2 * base_width, 4 * base_width))
        self.layer4 = nn.Sequential(BasicBlock(4 * base_width, 8 * base_width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to features."""
        x = F.relu(self.bn1(self.conv1(x)))
        features: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class CAN(nn.Module):
    """The whole network.

    Args:
        num_classes: training classes.
        base_width: channels of the stem.
        map_size: height and width of the features.
        reduction: of the meta learner.
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
        self.scale_cls = scale_cls
        self.base = ResNet12(base_width)
        self.cam = CAM(map_size[0], map_size[1], reduction)
        self.clasifier = nn.Conv2d(8 * base_width, num_classes, 1)

    def episode(self, xtrain: torch.Tensor, xtest: torch.Tensor, ytrain: torch.Tensor) -> torch.Tensor:
        """Return scores (B, n2, K) of support images (B, n1, 3, H, W), queries (B, n2, ...) and labels (B, n1, K)."""
        batch, supports, queries = xtrain.shape[0], xtrain.shape[1], xtest.shape[1]
        f = self.base(torch.cat([xtrain.flatten(0, 1), xtest.flatten(0, 1)], dim=0))
        ytrain = ytrain.transpose(1, 2)
        ftrain = torch.bmm(ytrain, f[: batch * supports].reshape(batch, supports, -1))
        ftrain = ftrain / ytrain.sum(dim=2, keepdim=True)
        ftrain = ftrain.reshape(batch, -1, *f.shape[1:])
        ftest = f[batch * supports :].reshape(batch, queries, *f.shape[1:])
        ftrain, ftest = self.cam(ftrain, ftest)
        ftrain = F.normalize(ftrain.mean(4).mean(4), p=2, dim=3, eps=1e-12)
        ftest = F.normalize(ftest.mean(4).mean(4), p=2, dim=3, eps=1e-12)
        return self.scale_cls * torch.sum(ftest * ftrain, dim=-1)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """Return scores (B, K) of the last image from the others, one for each of the K classes."""
        classes = len(images) - 1
        labels = torch.eye(classes, dtype=images[0].dtype).repeat(len(images[0]), 1, 1)
        scores = self.episode(torch.stack(images[:-1], dim=1), images[-1].unsqueeze(1), labels)
        return scores[:, 0]
