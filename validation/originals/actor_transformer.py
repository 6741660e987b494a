"""Actor-Transformer, original.

Paper: Gavrilyuk et al., "Actor-Transformers for Group Activity Recognition", CVPR 2020, section 3.
Behaviour: JacobYuan7/DIN-Group-Activity-Recognition-Benchmark, `infer_module/AT_infer_module.py`, and class
AT_volleyball of `infer_model.py` behind the embedding of the features; box centres in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class SelfAttention(nn.Module):
    """Attention between actors, then a feed-forward network, each with a residual and a normalisation.

    Args:
        in_dim: size of a feature.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.Q_W, self.K_W, self.V_W = (nn.Linear(in_dim, in_dim, bias=False) for _ in range(3))
        self.layernorm1, self.layernorm2 = nn.LayerNorm([in_dim]), nn.LayerNorm([in_dim])
        self.FFN_linear1, self.FFN_linear2 = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, in_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (scenes, N, D) to the same shape."""
        products = torch.bmm(self.Q_W(x), self.K_W(x).permute(0, 2, 1))
        weights = nn.functional.softmax(products / math.sqrt(self.in_dim), dim=2)
        y = self.layernorm1(torch.bmm(weights, self.V_W(x)) + x)
        hidden = nn.functional.relu(self.FFN_linear1(y))
        z: torch.Tensor = self.layernorm2(self.FFN_linear2(hidden) + y)
        return z


class ActorTransformer(nn.Module):
    """Position encoding, encoder and classifiers.

    Args:
        in_dim: size of a feature.
        num_activities: classes of the scene, or None.
        num_actions: classes of an actor, or None.
        temporal_pooled_first: mean over the frames before the encoder.
    """

    periods: torch.Tensor

    def __init__(
        self,
        in_dim: int,
        num_activities: int | None = None,
        num_actions: int | None = None,
        temporal_pooled_first: bool = False,
    ) -> None:
        super().__init__()
        self.temporal_pooled_first = temporal_pooled_first
        self.AT = SelfAttention(in_dim)
        if num_activities is not None:
            self.fc_activities = nn.Linear(in_dim, num_activities)
        if num_actions is not None:
            self.fc_actions = nn.Linear(in_dim, num_actions)
        half = in_dim // 2
        exponents = [2 * (channel // 2) / half for channel in range(half)]
        self.register_buffer("periods", torch.tensor([10000.0]) ** torch.tensor(exponents), persistent=False)

    def forward(self, features: torch.Tensor, centres: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map features (B, T, N, D) and centres (B, T, N, 2) to what the classifiers say, or to actors."""
        b, t, n, d = features.shape
        flat = features.reshape(b * t * n, d) + self.positions(centres.reshape(b * t * n, 2))
        x = flat.view(b, t, n, d)
        x = torch.mean(x, dim=1) if self.temporal_pooled_first else x.view(b * t, n, d)
        states = self.AT(x)
        results = []
        if hasattr(self, "fc_activities"):
            strongest, _ = torch.max(states, dim=1)
            activities = self.fc_activities(strongest)
            if not self.temporal_pooled_first:
                activities = torch.mean(activities.view(b, t, -1), dim=1)
            results.append(activities)
        if hasattr(self, "fc_actions"):
            actions = self.fc_actions(states)
            if not self.temporal_pooled_first:
                actions = torch.mean(actions.view(b, t, n, -1), dim=1)
            results.append(actions)
        if not results:
            return states if self.temporal_pooled_first else states.view(b, t, n, d)
        return results[0] if len(results) == 1 else tuple(results)

    def positions(self, centres: torch.Tensor) -> torch.Tensor:
        """Return sinusoids (boxes, D) of centres (boxes, 2): x fills the first half of the channels."""
        halves = []
        for axis in (0, 1):
            angle = centres[:, axis, None] / self.periods
            pairs = torch.stack((torch.sin(angle[:, 0::2]), torch.cos(angle[:, 1::2])), dim=2)
            halves.append(pairs.flatten(1))
        return torch.cat(halves, dim=1)
