"""Attention to scale, original.

Paper: Chen et al., "Attention to Scale: Scale-Aware Semantic Image Segmentation", CVPR 2016, section 3.
Behaviour: the paper; for the single map, BebDong/MXNetSeg, `mxnetseg/models/att2scale.py`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class AttentionToScale(nn.Module):
    """Merge of score maps.

    Args:
        scales: S.
        channels: channels of features.
        hidden: channels of the hidden map.
        sigmoid: one map for two scales.
        align_corners: of the bilinear resizes.
    """

    def __init__(
        self,
        scales: int = 2,
        channels: int = 1024,
        hidden: int = 512,
        sigmoid: bool = False,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.scales, self.sigmoid, self.align_corners = scales, sigmoid, align_corners
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = nn.Conv2d(scales * channels, hidden, 3, padding=1)
        layers["relu"] = nn.ReLU()
        layers["conv2"] = nn.Conv2d(hidden, 1 if sigmoid else scales, 1)
        self.att = nn.Sequential(layers)

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Return (B, classes, H, W) from S feature maps and S score maps."""
        height, width = maps[0].shape[2:]
        resized = [
            F.interpolate(entry, size=(height, width), mode="bilinear", align_corners=self.align_corners)
            for entry in maps
        ]
        features, scores = resized[: self.scales], torch.stack(resized[self.scales :], dim=1)
        logits = self.att(torch.cat(features, dim=1))
        if self.sigmoid:
            first = torch.sigmoid(logits)
            return first * scores[:, 0] + (1 - first) * scores[:, 1]
        return (F.softmax(logits, dim=1).unsqueeze(2) * scores).sum(dim=1)
