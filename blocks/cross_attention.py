"""Cross attention module (CAM) of few-shot classification: where class prototypes and queries correspond.

Paper: Hou et al., "Cross Attention Network for Few-shot Classification", NeurIPS 2019 (arXiv 1910.07677).
Code: https://github.com/blue-blue272/fewshot-CAN, `torchFewShot/models/cam.py`; scores: `net.py`.

    R[u, v] = cosine of prototype position u and query position v       N = height * width positions each
    w       = conv2(relu(bn(conv1(mean_u R[u, :]))))                    convolutions over positions as channels
    a[u]    = softmax_u(mean_v(R[u, v] w[v]) / 0.025) + 1               for prototypes; swapped roles for queries

R is never formed: both means are products with an average or a weighted sum of normalised features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant
from edgeattn.foundation import UserError

TEMPERATURE = 0.025
"""Temperature of the softmax over positions."""

_REASON = "the meta learner has one weight per position"


class _PositionConv(nn.Module):
    """1x1 convolution `conv` and batch normalisation `bn` whose channels are the last axis: one tiny product.

    Args:
        in_channels: input channels.
        out_channels: output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, m, n, in_channels) to (batch, m, n, out_channels)."""
        convolved = F.linear(x, self.conv.weight.flatten(1), self.conv.bias)
        return self.bn(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class CAM(nn.Module):
    """Cross attention between every class prototype and every query.

    State names are the official ones: `conv1.conv`, `conv1.bn`, `conv2`, the meta learner over positions, which both
    directions share.

    Args:
        height: height of the feature maps; 6 in the published networks.
        width: width of the feature maps; 6 in the published networks.
        reduction: positions per hidden channel of the meta learner; 6 in the published networks.
        scale_cls: factor of the cosines in `scores`; 7 in the published networks.

    Raises:
        ValueError: the meta learner would have no hidden channel.
    """

    def __init__(self, height: int = 6, width: int = 6, reduction: int = 6, scale_cls: float = 7.0) -> None:
        super().__init__()
        positions = height * width
        if not 1 <= reduction <= positions:
            raise ValueError(
                f"CAM needs a reduction from 1 to height * width = {positions}, got {reduction}; published is 6"
            )
        hidden = positions // reduction
        self.height = height
        self.width = width
        self.scale_cls = scale_cls
        self.conv1 = _PositionConv(positions, hidden)
        self.conv2 = nn.Conv2d(hidden, positions, kernel_size=1)

    def forward(self, prototypes: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight the positions of both by their attention, for all pairs.

        Args:
            prototypes: (batch, classes, channels, height, width).
            queries: (batch, queries, channels, height, width).

        Returns:
            Weighted prototypes and weighted queries, each (batch, queries, classes, channels, height, width).

        Raises:
            UserError: the maps have another size than the module, or a dynamic one.
        """
        size = (self.height, self.width)
        weights_p, weights_q = self._attention(prototypes, queries)
        weights_p = weights_p.transpose(1, 2).unsqueeze(3).unflatten(4, size)
        weights_q = weights_q.unsqueeze(3).unflatten(4, size)
        return prototypes.unsqueeze(1) * weights_p, queries.unsqueeze(2) * weights_q

    def scores(self, prototypes: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return `scale_cls` times the cosine of the averaged weighted maps: what the networks classify by.

        The weighted maps themselves are never formed.

        Args:
            prototypes: (batch, classes, channels, height, width).
            queries: (batch, queries, channels, height, width).

        Returns:
            (batch, queries, classes).

        Raises:
            UserError: the maps have another size than the module, or a dynamic one.
        """
        weights_p, weights_q = (
            weights / (self.height * self.width) for weights in self._attention(prototypes, queries)
        )
        mean_p = torch.matmul(weights_p, prototypes.flatten(3).transpose(2, 3)).transpose(1, 2)
        mean_q = torch.matmul(weights_q, queries.flatten(3).transpose(2, 3))
        cosine = (F.normalize(mean_p, dim=3) * F.normalize(mean_q, dim=3)).sum(dim=3)
        return self.scale_cls * cosine

    def _attention(self, prototypes: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (batch, classes, queries, positions) and (batch, queries, classes, positions)."""
        for features in (prototypes, queries):
            for axis, actual, wanted in (
                ("height", features.shape[3], self.height),
                ("width", features.shape[4], self.width),
            ):
                require_static("CAM", axis, actual, _REASON)
                if actual != wanted:
                    raise UserError(
                        f"the {axis} of CAM's features must be {wanted}, got {actual}: {_REASON}. "
                        "Resize the images, or train a module of that size."
                    )
        flat_p = F.normalize(prototypes.flatten(3), dim=2)
        flat_q = F.normalize(queries.flatten(3), dim=2)
        return self._weights(flat_p, flat_q), self._weights(flat_q, flat_p)

    def _weights(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return the weight of every position of `own` with respect to every map of `other`.

        Args:
            own: normalised features (batch, n, channels, positions).
            other: normalised features (batch, m, channels, positions).

        Returns:
            (batch, n, m, positions), between 1 and 2.
        """
        guide = torch.matmul(own.mean(dim=3).unsqueeze(1), other)  # (batch, m, n, positions of other)
        importance = F.linear(torch.relu(self.conv1(guide)), self.conv2.weight.flatten(1), self.conv2.bias)
        summary = torch.matmul(importance, other.transpose(2, 3)).transpose(1, 2)  # (batch, n, m, channels)
        energy = torch.matmul(summary, own) / (other.shape[3] * TEMPERATURE)
        return energy.softmax(dim=3) + 1


_SIZES = (
    {"batch": 2, "classes": 3, "queries": 4, "channels": 8, "height": 6, "width": 6},
    {"batch": 1, "classes": 5, "queries": 2, "channels": 5, "height": 6, "width": 6},
    {"batch": 3, "classes": 1, "queries": 1, "channels": 1, "height": 6, "width": 6},
)
_FIXED = {"height": _REASON, "width": _REASON}
_PUBLISHED = Published(
    "CAN, ResNet-12, miniImageNet 5-way, 75 queries",
    {},
    {"batch": 1, "classes": 5, "queries": 75, "channels": 512, "height": 6, "width": 6},
)

BLOCKS.add(
    BlockSpec(
        name="cross-attention",
        title="cross attention module (CAM) of few-shot classification",
        paper="Cross Attention Network for Few-shot Classification, NeurIPS 2019",
        year=2019,
        code="https://github.com/blue-blue272/fewshot-CAN",
        build=CAM,
        original="edgeattn.validation.originals.cross_attention:CAM",
        variants=(
            Variant(
                "official",
                {},
                listings={"can_cam": {}},
                references={"can_cam": {}},
                published=_PUBLISHED,
                fixed=_FIXED,
                overflow=Overflow(6000.0, _SIZES[0] | {"batch": 1, "channels": 256}, state={r"conv2": 10.0}),
            ),
            Variant("scores", {}, references={"can_scores": {}}, published=_PUBLISHED, fixed=_FIXED, method="scores"),
        ),
        largest=lambda _, sizes: (
            sizes["batch"]
            * max(sizes["queries"], sizes["classes"])
            * sizes["channels"]
            * max(sizes["classes"], sizes["queries"], sizes["height"] * sizes["width"])
        ),
        precision=(
            "norms, means over positions, energies and softmax stay in FP32 (norms overflow, and a position without "
            "features needs the epsilon that FP16 lacks)"
        ),
        int8="none: the meta learner is tiny, and the softmax with temperature 0.025 magnifies its errors",
        inputs=(
            TensorInput("prototypes", ("batch", "classes", "channels", "height", "width")),
            TensorInput("queries", ("batch", "queries", "channels", "height", "width")),
        ),
        sizes=_SIZES,
    )
)
