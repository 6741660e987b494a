"""COSNet co-attention: vanilla, symmetric and channel-wise, with or without the self-gate, pairwise and group.

Paper: Lu et al., "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
CVPR 2019 (arXiv 2001.06810). Code: https://github.com/carrierlxk/COSNet, `deeplab/siamese_model_conf.py`, which has
the gated vanilla form only; symmetric and channel-wise follow the paper (equations 5 and 6).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from edgeattn.blocks.core import AttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


def _gate(attended: torch.Tensor, gate: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Multiply flat features (batch, channels, positions) by sigmoid(weight . features + bias) per position."""
    if gate is None:
        return attended
    weight, bias = gate
    return attended * torch.sigmoid(torch.matmul(weight, attended) + bias)


class CoAttentionCore(AttentionCore):
    """Both directions of co-attention from one affinity."""

    op_type: ClassVar[str] = "CoAttention"

    def forward(
        self,
        query_a: torch.Tensor,
        key_b: torch.Tensor,
        value_a: torch.Tensor,
        value_b: torch.Tensor,
        gate_weight: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from a to b and from b to a.

        Args:
            query_a: (batch, head_channels, height_a, width_a).
            key_b: (batch, head_channels, height_b, width_b).
            value_a: (batch, channels, height_a, width_a).
            value_b: (batch, channels, height_b, width_b).
            gate_weight: (1, channels), or None for no gate.
            gate_bias: (1,), given together with `gate_weight`.

        Returns:
            What b holds for every position of a, shaped as `value_a`; what a holds for b, shaped as `value_b`.
        """
        gate = None if gate_weight is None or gate_bias is None else (gate_weight, gate_bias)
        affinity = torch.matmul(query_a.flatten(2).transpose(1, 2), key_b.flatten(2))
        from_b = torch.matmul(value_b.flatten(2), affinity.softmax(dim=2).transpose(1, 2))
        from_a = torch.matmul(value_a.flatten(2), affinity.softmax(dim=1))
        return _gate(from_b, gate).reshape(value_a.shape), _gate(from_a, gate).reshape(value_b.shape)


class CoAttentionOneWayCore(AttentionCore):
    """One direction, all that inference on the first frame needs; b may hold several references side by side."""

    op_type: ClassVar[str] = "CoAttentionOneWay"

    def forward(
        self,
        query_a: torch.Tensor,
        key_b: torch.Tensor,
        value_b: torch.Tensor,
        gate_weight: torch.Tensor | None = None,
        gate_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from a to b.

        Args:
            query_a: (batch, head_channels, height_a, width_a).
            key_b: (batch, head_channels, height_b, width_b).
            value_b: (batch, channels, height_b, width_b).
            gate_weight: (1, channels), or None for no gate.
            gate_bias: (1,), given together with `gate_weight`.

        Returns:
            (batch, channels, height_a, width_a).
        """
        gate = None if gate_weight is None or gate_bias is None else (gate_weight, gate_bias)
        affinity = torch.matmul(query_a.flatten(2).transpose(1, 2), key_b.flatten(2))
        from_b = torch.matmul(value_b.flatten(2), affinity.softmax(dim=2).transpose(1, 2))
        shape = (value_b.shape[0], value_b.shape[1], query_a.shape[2], query_a.shape[3])
        return _gate(from_b, gate).reshape(shape)


AFFINITIES = ("vanilla", "symmetric", "channelwise")
"""Forms of the affinity matrix: E^T W^T Q, (P E)^T diag(D) (P Q), E^T diag(D) Q."""


class CoAttentionBase(nn.Module):
    """Parameters and mathematics of co-attention, for the block and for networks whose state_dict has them at the top.

    E are a target frame's features (exemplar), Q reference features (query frame).

    Parameters follow the official code where it exists: `linear_e.weight` (C, C) for vanilla and `gate.weight`
    (1, C, 1, 1), shared by both frames and without bias. Symmetric has `P` (C, C), orthogonal by training, and `D`
    (C,); channel-wise has `D` (C,).

    Args:
        channels: feature channels C.
        affinity: one of `AFFINITIES`.
        gate: whether the attended features are weighted by their own sigmoid gate.

    Raises:
        ValueError: an unknown affinity.
    """

    def __init__(self, channels: int, affinity: str = "vanilla", gate: bool = True) -> None:
        super().__init__()
        if affinity not in AFFINITIES:
            raise ValueError(f"co-attention knows the affinities {', '.join(AFFINITIES)}, not {affinity!r}")
        self.channels = channels
        self.affinity = affinity
        if affinity == "vanilla":
            self.linear_e = nn.Linear(channels, channels, bias=False)
        if affinity == "symmetric":
            self.P = nn.Parameter(torch.eye(channels))
        if affinity in ("symmetric", "channelwise"):
            self.D = nn.Parameter(torch.ones(channels))
        self.gate = nn.Conv2d(channels, 1, kernel_size=1, bias=False) if gate else None
        self.gate_bias: torch.Tensor
        self.register_buffer("gate_bias", torch.zeros(1), persistent=False)  # the published gate has none
        self.core = CoAttentionCore()
        self.one_way_core = CoAttentionOneWayCore()

    def attend(self, exemplar: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend in both directions.

        Args:
            exemplar: target features (batch, channels, height, width).
            query: reference features (batch, channels, height, width); the size may differ from the target's.

        Returns:
            Attended features for the target (from the reference) and for the reference (from the target).
        """
        return self.core(self.project_target(exemplar), self.project_reference(query), exemplar, query, *self._gate())

    def attend_group(self, exemplar: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Attend from a target to N references at once, one softmax over all their positions, as the paper defines it.

        The public script `siamese_model_conf_try_single.py` applies a softmax over the target's positions before this
        one, by overwriting the affinity; no released checkpoint is known to use it, and it is not reproduced here.

        Args:
            exemplar: target features (batch, channels, height, width).
            references: reference features (batch, N, channels, height, width).

        Returns:
            Attended features for the target (batch, channels, height, width).
        """
        side_by_side = references.transpose(1, 2).flatten(2, 3)
        return self.one_way_core(
            self.project_target(exemplar), self.project_reference(side_by_side), side_by_side, *self._gate()
        )

    def project_target(self, exemplar: torch.Tensor) -> torch.Tensor:
        """Return the target side of the affinity, (batch, channels, height, width)."""
        if self.affinity == "vanilla":
            return nn.functional.conv2d(exemplar, self.linear_e.weight[:, :, None, None])
        if self.affinity == "channelwise":
            return exemplar * self.D[:, None, None]
        return nn.functional.conv2d(exemplar, (self.D[:, None] * self.P)[:, :, None, None])

    def project_reference(self, query: torch.Tensor) -> torch.Tensor:
        """Return the reference side of the affinity, (batch, channels, height, width)."""
        if self.affinity == "symmetric":
            return nn.functional.conv2d(query, self.P[:, :, None, None])
        return query

    def _gate(self) -> tuple[torch.Tensor, ...]:
        """Return the core's gate inputs: nothing, or weight (1, channels) and bias (1,)."""
        if self.gate is None:
            return ()
        return self.gate.weight.flatten(1), self.gate_bias


class CoAttention(CoAttentionBase):
    """Co-attention as a block of its own; arguments and state names as in `CoAttentionBase`."""

    def forward(self, exemplar: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend in both directions, see `attend`."""
        return self.attend(exemplar, query)

    def forward_group(self, exemplar: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Attend from a target to N references at once, see `attend_group`."""
        return self.attend_group(exemplar, references)


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the affinity (here: with up to three references) and a feature map."""
    positions = sizes["height"] * sizes["width"]
    return 3 * sizes["batch"] * positions * max(positions, arguments["channels"])


_PAIR = (
    TensorInput("exemplar", ("batch", "channels", "height", "width")),
    TensorInput("query", ("batch", "channels", "height", "width")),
)
_GROUP = (_PAIR[0], TensorInput("references", ("batch", 3, "channels", "height", "width")))


def _variant(affinity: str, gate: bool, group: bool) -> Variant:
    """Return the variant of an affinity, with or without gate, for a pair or a group of frames."""
    released = affinity == "vanilla" and gate and not group
    arguments = {"affinity": affinity, "gate": gate}
    return Variant(
        f"{affinity}{'-gated' if gate else ''}{'-group' if group else ''}",
        {"channels": 12, **arguments},
        published=Published(
            "COSNet, DeepLabv3-ResNet-101, DAVIS-16 473x473",
            {"channels": 256, **arguments},
            {"batch": 1, "height": 60, "width": 60},
        )
        if released
        else None,
        inputs=_GROUP if group else _PAIR,
        method="forward_group" if group else "forward",
        overflow=Overflow(120.0, {"batch": 1, "height": 5, "width": 7}) if released else None,
    )


BLOCKS.add(
    BlockSpec(
        name="co-attention",
        title="co-attention",
        paper="See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks, "
        "CVPR 2019",
        year=2019,
        code="https://github.com/carrierlxk/COSNet",
        build=CoAttention,
        original="edgeattn.validation.originals.co_attention:CoAttention",
        variants=tuple(
            _variant(affinity, gate, group)
            for affinity in AFFINITIES
            for gate in (True, False)
            for group in (False, True)
        ),
        largest=_largest,
        precision="the affinity and its softmaxes stay in FP32 (dot products overflow); sums over values run in FP16",
        int8="the projection of the target; the attention products stay in FP16",
    )
)
