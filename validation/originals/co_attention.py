"""Co-attention between two frames, original.

Paper: Lu et al., "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
CVPR 2019 (vanilla, symmetric and channel-wise co-attention, self-gate, several reference frames).
Behaviour of the vanilla form: carrierlxk/COSNet, `deeplab/siamese_model_conf.py`. The symmetric and the channel-wise
form are published as equations only.

With E the exemplar's features (C, positions) and Q the query frame's, the affinity is A = E^T W Q, where W is
    vanilla       any C x C matrix,
    symmetric     P^T diag(D) P with a shared projection P,
    channelwise   diag(D).
"""

from __future__ import annotations

import torch
from torch import nn


class CoAttention(nn.Module):
    """Each frame gathers the other frame's features by affinity; a gate then weighs every position.

    Args:
        channels: feature channels C.
        affinity: "vanilla" (parameter `linear_e.weight` (C, C)), "symmetric" (`P` (C, C) and `D` (C,)) or
            "channelwise" (`D` (C,)).
        gate: whether the attended features are multiplied by sigmoid(gate(attended)) (`gate.weight` (1, C, 1, 1)).

    Raises:
        ValueError: the affinity is none of the three.
    """

    gate: nn.Conv2d | None

    def __init__(self, channels: int, affinity: str = "vanilla", gate: bool = True) -> None:
        super().__init__()
        self.affinity = affinity
        if affinity == "vanilla":
            self.linear_e = nn.Linear(channels, channels, bias=False)
        elif affinity == "symmetric":
            self.P = nn.Parameter(torch.eye(channels))
            self.D = nn.Parameter(torch.ones(channels))
        elif affinity == "channelwise":
            self.D = nn.Parameter(torch.ones(channels))
        else:
            raise ValueError(f"affinity {affinity!r} is not known; choose 'vanilla', 'symmetric' or 'channelwise'")
        self.gate = nn.Conv2d(channels, 1, 1, bias=False) if gate else None

    def forward(self, exemplar: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend in both directions.

        Args:
            exemplar: features of the target frame (B, C, H, W).
            query: features of the reference frame (B, C, H, W).

        Returns:
            The reference frame's features gathered for every exemplar position, and the exemplar's gathered for every
            query position, each (B, C, H, W), after the gate.
        """
        e, q = exemplar.flatten(2), query.flatten(2)
        affinity = affinity_matrix(self.bilinear_form(), e, q)
        exemplar_att = attend(affinity, q).reshape(exemplar.shape)
        query_att = attend(affinity.transpose(1, 2), e).reshape(query.shape)
        return gated(exemplar_att, self.gate), gated(query_att, self.gate)

    def forward_group(self, exemplar: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Attend from one exemplar to N reference frames, with one softmax over all their positions.

        Args:
            exemplar: features of the target frame (B, C, H, W).
            references: features of the reference frames (B, N, C, H, W).

        Returns:
            The gathered features (B, C, H, W), after the gate.
        """
        e = exemplar.flatten(2)
        q = torch.cat([references[:, frame].flatten(2) for frame in range(references.shape[1])], dim=2)
        affinity = affinity_matrix(self.bilinear_form(), e, q)
        return gated(attend(affinity, q).reshape(exemplar.shape), self.gate)

    def bilinear_form(self) -> torch.Tensor:
        """Return the matrix W (C, C) of the affinity E^T W Q.

        A linear layer computes x -> weight x, and the official code applies it to the exemplar: A = (weight E)^T Q.
        """
        if self.affinity == "vanilla":
            return self.linear_e.weight.T
        if self.affinity == "symmetric":
            return self.P.T @ torch.diag(self.D) @ self.P
        return torch.diag(self.D)


def affinity_matrix(form: torch.Tensor, e: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return A_ij = sum over c, d of E_ci W_cd Q_dj.

    Args:
        form: W (C, C).
        e: exemplar features (B, C, M).
        q: query features (B, C, N).

    Returns:
        The affinity (B, M, N).
    """
    return torch.einsum("bci,cd,bdj->bij", e, form, q)


def attend(affinity: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return, for each of the M receiving positions, the softmax-weighted mean of the N giving ones.

    Args:
        affinity: (B, M, N); the softmax runs over the giving positions N.
        values: features of the giving positions (B, C, N).

    Returns:
        Features (B, C, M).
    """
    return torch.einsum("bcj,bij->bci", values, torch.softmax(affinity, dim=2))


def gated(attended: torch.Tensor, gate: nn.Conv2d | None) -> torch.Tensor:
    """Multiply attended features (B, C, H, W) by sigmoid(gate(attended)), or return them where there is no gate."""
    return attended if gate is None else attended * torch.sigmoid(gate(attended))
