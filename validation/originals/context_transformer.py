"""Context-Transformer, original.

Paper: Yang et al., "Context-Transformer: Tackling Object Confusion for Few-Shot Detection", AAAI 2020, section 3.
Behaviour: Ze-Yang/Context-Transformer, `models/RFB_Net_vgg.py`, what follows the confidence convolutions in phase 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ContextTransformer(nn.Module):
    """Affinity discovery and context aggregation between prior boxes, then a classifier on the unit sphere.

    Args:
        num_classes: source classes.
        num_targets: target classes.
        kernels: pooling window of each map, equal to its stride.
        incremental: keep the source classes.
    """

    def __init__(
        self,
        num_classes: int = 60,
        num_targets: int = 20,
        kernels: Sequence[int] = (3, 2, 2, 2, 1, 1),
        *,
        incremental: bool = False,
    ) -> None:
        super().__init__()
        self.dimension = num_classes
        self.pools = [nn.MaxPool2d(size, stride=size, ceil_mode=True) for size in kernels]
        self.incremental = incremental
        if incremental:
            self.fc_base = nn.Linear(num_classes, num_classes)
        self.theta = nn.Linear(num_classes, num_classes)
        self.phi = nn.Linear(num_classes, num_classes)
        self.g = nn.Linear(num_classes, num_classes)
        self.Wz = nn.Parameter(torch.zeros(num_classes))
        self.OBJ_Target = nn.Linear(num_classes, num_targets, bias=False)
        self.scale = nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Map confidence maps (B, boxes * F, H, W) to probabilities (B, all boxes, classes)."""
        boxes = self.boxes(maps)
        surroundings = self.boxes([pool(scores) for pool, scores in zip(self.pools, maps, strict=True)])
        asked = boxes + self.theta(boxes)
        offered = surroundings + self.phi(surroundings)
        carried = surroundings + self.g(surroundings)
        affinity = torch.softmax(torch.matmul(asked, offered.permute(0, 2, 1)), dim=-1)
        aware = boxes + torch.matmul(affinity, carried) * self.Wz
        length = aware.norm(p=2, dim=-1, keepdim=True)
        logits = self.OBJ_Target(aware / length) * self.scale
        if self.incremental:
            logits = torch.cat((boxes + self.fc_base(boxes), logits), dim=-1)
        return torch.softmax(logits, dim=-1)

    def boxes(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the feature of every box (B, all boxes, F): channels move last, then each map becomes one row."""
        rows = []
        for scores in maps:
            channels_last = scores.permute(0, 2, 3, 1).contiguous()
            rows.append(channels_last.view(channels_last.size(0), -1))
        joined = torch.cat(rows, dim=1)
        return joined.view(joined.size(0), -1, self.dimension)
