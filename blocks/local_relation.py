"""Local relation: weights of a window from the similarity of a position to its neighbours and a geometry prior.

Paper: Hu et al., "Local Relation Networks for Image Recognition", ICCV 2019 (arXiv 1904.11491).
Code: https://github.com/microsoft/Swin-Transformer, branch LR-Net, `ops/local_relation` (the CUDA operator only).

    w(p, p + d) = softmax over d of (similarity(query(p), key(p + d)) + prior(d))
    y(p)        = sum over d of w(p, p + d) value(p + d)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.blocks.taps import tap_softmax, taps, weighted_sum

SIMILARITIES: Mapping[int, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    0: lambda query, key: query * key,
    1: lambda query, key: key,
    2: lambda query, key: -(query - key).abs(),
    3: lambda query, key: -(query - key).abs() / (query.abs() + key.abs() + 1),
    4: lambda query, key: -((query - key) ** 2) / ((query * key).abs() + 1),
    5: lambda query, key: -((query - key) ** 2),
}
"""Similarity of a query and a key number by the operator's `sim_method`; sums run over the channels of a group."""


class LocalRelation(nn.Module):
    """The operator: a softmax over the window in each group of channels, for given query, key, value and prior.

    Positions outside the image take part in the softmax with the logit `no_define_value` plus the prior and have the
    value zero: their weight is lost, not redistributed. Key channels beyond the query's are a saliency of the key; the
    operator adds it once for each channel of a group.

    Args:
        kernel_size: window size; an even window reaches one further to the top left.
        groups: groups of query and of value channels, each contiguous, with weights of their own.
        stride: distance between window centres in the key and value maps.
        dilation: distance between taps.
        scale: factor of the similarity.
        no_define_value: logit of positions outside the image, before the prior is added.
        sim_method: number of the similarity: 0 product, 1 key alone, 2 -|q - k|, 3 -|q - k| / (|q| + |k| + 1),
            4 -(q - k)^2 / (|q k| + 1), 5 -(q - k)^2.

    Raises:
        ValueError: an unknown `sim_method`.
    """

    def __init__(
        self,
        kernel_size: int = 7,
        groups: int = 1,
        stride: int = 1,
        dilation: int = 1,
        scale: float = 1.0,
        no_define_value: float = -100.0,
        sim_method: int = 0,
    ) -> None:
        super().__init__()
        if sim_method not in SIMILARITIES:
            raise ValueError(
                f"local relation knows sim_method {', '.join(map(str, SIMILARITIES))}, got {sim_method}; "
                "see LocalRelation for their formulas"
            )
        self.kernel_size = kernel_size
        self.groups = groups
        self.stride = stride
        self.dilation = dilation
        self.scale = scale
        self.no_define_value = no_define_value
        self.sim_method = sim_method

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pos_weight: torch.Tensor
    ) -> torch.Tensor:
        """Aggregate the values of each window.

        Args:
            query: (batch, query_channels, ceil(height / stride), ceil(width / stride)).
            key: (batch, query_channels + saliency_channels, height, width).
            value: (batch, channels, height, width).
            pos_weight: geometry prior (groups, kernel_size, kernel_size).

        Returns:
            (batch, channels, ceil(height / stride), ceil(width / stride)).
        """
        groups = self.groups
        weights = tap_softmax(self._logits(query, key, pos_weight), dim=2)
        values = [tap.unflatten(1, (groups, -1)) for tap in self._taps(value)]
        return weighted_sum(weights, values).flatten(1, 2)

    def _logits(self, query: torch.Tensor, key: torch.Tensor, pos_weight: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each tap, (batch, groups, 1, height, width)."""
        similarity = SIMILARITIES[self.sim_method]
        channels = query.shape[1]
        grouped = query.unflatten(1, (self.groups, -1))
        keys = self._taps(key[:, :channels])
        single = channels == self.groups
        logits = []
        for tap in keys:
            logit = similarity(grouped, tap.unflatten(1, (self.groups, -1)))
            logits.append(logit if single else logit.sum(dim=2, keepdim=True))
        if self.scale != 1:
            logits = [logit * self.scale for logit in logits]
        if key.shape[1] > channels:
            logits = [logit + tap for logit, tap in zip(logits, self._saliency(key, channels), strict=True)]
        prior = pos_weight.reshape(self.groups, -1, 1, 1)
        inside = _inside(key.shape[2], key.shape[3], self.kernel_size, self.dilation, self.stride, key.device)
        return [
            torch.where(valid, logit, self.no_define_value) + prior[:, tap : tap + 1]
            for tap, (valid, logit) in enumerate(zip(inside, logits, strict=True))
        ]

    def _saliency(self, key: torch.Tensor, channels: int) -> list[torch.Tensor]:
        """Return what the key's further channels add to the logits of each tap, (batch, groups, 1, height, width)."""
        count = key.shape[1] - channels
        index = [channels + group * count // self.groups for group in range(self.groups)]
        saliency = torch.cat([key[:, i : i + 1] for i in index], dim=1) * (channels // self.groups)
        return [tap.unsqueeze(2) for tap in self._taps(saliency)]

    def _taps(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Return the taps of a map that continues with zeros outside the image."""
        before = self.dilation * (self.kernel_size // 2)
        after = self.dilation * (self.kernel_size - 1) - before
        padded = nn.functional.pad(features, (before, after, before, after))
        return taps(padded, self.kernel_size, dilation=self.dilation, stride=self.stride)


def _inside(
    height: int, width: int, kernel: int, dilation: int, stride: int, device: torch.device
) -> list[torch.Tensor]:
    """Return, for each tap, whether it lies inside the image, (output height, output width)."""

    def line(length: int, offset: int) -> torch.Tensor:
        position = torch.arange(0, length, stride, device=device) + dilation * (offset - kernel // 2)
        return (position >= 0) & (position < length)

    rows = [line(height, offset)[:, None] for offset in range(kernel)]
    columns = [line(width, offset) for offset in range(kernel)]
    return [row & column for row in rows for column in columns]


class LocalRelationLayer(nn.Module):
    """The paper's layer: scalar queries and keys per group of channels, values are the input itself.

    The authors released neither a layer nor weights, so the state names are ours: `query_conv`, `key_conv` (channels to
    one number per group), `prior.0` and `prior.2` (a network on the relative position (x, y), each from -1 to 1) and
    `output_conv`. The port gan3sh500/local-relational-nets is not supported: it draws the positions that its geometry
    prior reads at random and does not save them, so its checkpoints do not determine its outputs.

    Args:
        channels: input and output channels.
        kernel_size: window size, odd and at least 3.
        group_channels: channels that share their weights.
        hidden: hidden channels of the geometry prior's network.
        stride: distance between window centres.
        sim_method: number of the similarity, see `LocalRelation`.

    Raises:
        ValueError: an even or too small window, channels that do not divide into groups, or an unknown `sim_method`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        group_channels: int = 8,
        hidden: int = 16,
        stride: int = 1,
        sim_method: int = 0,
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"the local relation layer needs an odd kernel_size of 3 or more, got {kernel_size}")
        if channels % group_channels:
            raise ValueError(
                f"channels ({channels}) is not a multiple of group_channels ({group_channels}); choose a divisor"
            )
        groups = channels // group_channels
        self.query_conv = nn.Conv2d(channels, groups, kernel_size=1, stride=stride)
        self.key_conv = nn.Conv2d(channels, groups, kernel_size=1)
        self.prior: nn.Sequential | None = nn.Sequential(
            nn.Conv2d(2, hidden, kernel_size=1), nn.ReLU(), nn.Conv2d(hidden, groups, kernel_size=1)
        )
        self.output_conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.relation = LocalRelation(kernel_size, groups, stride=stride, sim_method=sim_method)
        line = torch.linspace(-1, 1, kernel_size)
        self.position: torch.Tensor
        grid = torch.stack([line.expand(kernel_size, -1), line[:, None].expand(-1, kernel_size)])
        self.register_buffer("position", grid[None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, channels, ceil(height / stride), ceil(width / stride))."""
        prior = self.position if self.prior is None else self.prior(self.position)[0]
        return self.output_conv(self.relation(self.query_conv(x), self.key_conv(x), x, prior))

    def prepare_for_export(self) -> LocalRelationLayer:
        """Return a copy whose geometry prior is a constant: it does not depend on the input."""
        folded = copy.deepcopy(self)
        if folded.prior is not None:
            with torch.no_grad():
                folded.position = folded.prior(folded.position)[0]
            folded.prior = None
        return folded


def _largest_of_layer(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the logits (batch, groups, window, positions)."""
    groups = arguments["channels"] // arguments["group_channels"]
    window = arguments.get("kernel_size", 7) ** 2
    return int(sizes["batch"] * groups * window * sizes["height"] * sizes["width"])


def _maps(channels: int, key_channels: int, value_channels: int, groups: int, kernel: int) -> tuple[TensorInput, ...]:
    """Return the inputs of the operator for numbers of channels."""
    return (
        TensorInput("query", ("batch", channels, "height", "width")),
        TensorInput("key", ("batch", key_channels, "height", "width")),
        TensorInput("value", ("batch", value_channels, "height", "width")),
        TensorInput("pos_weight", (groups, kernel, kernel)),
    )


_PAPER = "Local Relation Networks for Image Recognition, ICCV 2019"
_CODE = "https://github.com/microsoft/Swin-Transformer (branch LR-Net)"
_PRECISION = "similarities, prior and softmax stay in FP32 (products overflow); the sum over values runs in FP16"

BLOCKS.add(
    BlockSpec(
        name="local-relation",
        title="local relation layer",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=LocalRelationLayer,
        original="edgeattn.validation.originals.local_relation:LocalRelationLayer",
        variants=(
            Variant(
                "product",
                {"channels": 8, "kernel_size": 3, "group_channels": 4, "hidden": 4},
                published=Published(
                    "LR-Net-26, ImageNet 224x224, third stage",
                    {"channels": 256, "kernel_size": 7, "group_channels": 8},
                    {"batch": 1, "height": 28, "width": 28},
                ),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "squared-difference-strided",
                {"channels": 8, "kernel_size": 3, "group_channels": 4, "hidden": 4, "stride": 2, "sim_method": 5},
            ),
        ),
        largest=_largest_of_layer,
        precision=_PRECISION,
        int8="query, key and output projections; the products of the window stay in FP16",
    )
)
BLOCKS.add(
    BlockSpec(
        name="local-relation-operator",
        title="local relation operator",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=LocalRelation,
        original="edgeattn.validation.originals.local_relation:LocalRelation",
        variants=(
            Variant(
                "product-saliency",
                {"kernel_size": 3, "groups": 2, "scale": 0.5},
                inputs=_maps(4, 6, 8, 2, 3),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "absolute-difference-dilated",
                {"kernel_size": 3, "groups": 2, "dilation": 2, "sim_method": 2},
                inputs=_maps(4, 4, 4, 2, 3),
            ),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"] * arguments["groups"] * arguments["kernel_size"] ** 2 * sizes["height"] * sizes["width"]
        ),
        precision=_PRECISION,
        int8="nothing: the operator has no convolution",
    )
)
