"""Attention to scale: merge the score maps of several image scales with weights per pixel.

Paper: Chen et al., "Attention to Scale: Scale-Aware Semantic Image Segmentation", CVPR 2016 (arXiv 1511.03339).
Code: none published; an independent one for MXNet: https://github.com/BebDong/MXNetSeg, `mxnetseg/models/att2scale.py`.

    u_s    = features of scale s, f_s = its class scores, both resized to the grid of scale 1
    h      = conv2(relu(conv1([u_1, ..., u_S])))                  conv1 3x3, conv2 1x1 with S maps
    output = sum_s softmax_s(h)_s f_s                             the weights are shared by all classes

An export never concatenates the features: conv1 is the sum of one convolution per scale. With two scales the softmax is
a sigmoid of the difference, which conv2 computes directly: output = f_2 + sigmoid(h_1 - h_2) (f_1 - f_2).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


class _Attention(nn.Module):
    """The two convolutions of the attention."""

    def __init__(self, channels: int, hidden: int, maps: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(hidden, maps, kernel_size=1)


class AttentionToScale(nn.Module):
    """Weighted sum of the score maps of all scales, after the paper, as no official code exists.

    State names are our own: `att.conv1` (hidden, scales * channels, 3, 3) and `att.conv2` (scales, hidden, 1, 1), both
    with bias. The paper does not say how maps are resized; its Caffe layer aligns corners, which is the default here.
    The MXNet code predicts a single map for two scales (`sigmoid=True`); where it resizes and merges features instead
    of scores, give features as scores. Its convolutions have batch normalisation, which folds into `att.conv1`.

    The maps of every scale keep the size their network gives them, so that no rounding of sizes is part of the block.

    Args:
        scales: number of scales; the first is the reference grid. The paper uses 2 (1, 0.5) and 3 (1, 0.75, 0.5).
        channels: channels of the features of one scale; 1024 for fc7 of DeepLab-LargeFOV.
        hidden: channels between the convolutions.
        sigmoid: `att.conv2` predicts one map, whose sigmoid is the weight of the first of two scales.
        align_corners: of the resizes.

    Raises:
        ValueError: fewer than two scales, or `sigmoid` with more.
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
        if scales < 2:
            raise ValueError(f"scales has to be at least 2, got {scales}: there is nothing to merge")
        if sigmoid and scales != 2:
            raise ValueError(f"sigmoid weighs two scales, but scales={scales}. Use sigmoid=False.")
        self.scales = scales
        self.channels = channels
        self.single = sigmoid
        self.align_corners = align_corners
        self.att = _Attention(scales * channels, hidden, 1 if sigmoid else scales)
        self.parts: nn.ModuleList | None = None

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Merge.

        Args:
            *maps: first the features of every scale (batch, channels, height_s, width_s), then the scores of every
                scale (batch, classes, height_s, width_s).

        Returns:
            (batch, classes, height, width) on the grid of the first scale.

        Raises:
            UserError: another number of maps than twice the scales.
        """
        if len(maps) != 2 * self.scales:
            raise UserError(
                f"attention to scale with {self.scales} scales takes {2 * self.scales} maps, got {len(maps)}. "
                "Give the features of every scale, then the scores of every scale."
            )
        size = maps[0].shape[2:]
        aligned = [maps[0], *(self._resized(entry, size) for entry in maps[1 : self.scales])]
        scores = [maps[self.scales], *(self._resized(entry, size) for entry in maps[self.scales + 1 :])]
        if self.parts is None:
            hidden = self.att.conv1(torch.cat(aligned, dim=1))
        else:
            hidden = self.parts[0](aligned[0])
            for part, features in zip(list(self.parts)[1:], aligned[1:], strict=True):
                hidden = hidden + part(features)
        logits = self.att.conv2(hidden.relu())
        if self.scales > 2:
            weights = logits.softmax(dim=1)
            merged = weights[:, :1] * scores[0]
            for index in range(1, self.scales):
                merged = merged + weights[:, index : index + 1] * scores[index]
            return merged
        difference = logits if self.single else logits[:, :1] - logits[:, 1:]
        return scores[1] + difference.sigmoid() * (scores[0] - scores[1])

    def _resized(self, entry: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Return a map on the grid of the first scale."""
        return F.interpolate(entry, size=size, mode="bilinear", align_corners=self.align_corners)

    def _split(self) -> nn.ModuleList:
        """Return one convolution per scale, whose sum is the convolution of all features; the first has the bias."""
        parts = nn.ModuleList()
        whole = self.att.conv1
        for scale in range(self.scales):
            part = nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=scale == 0)
            part.in_channels, part.out_channels = self.channels, whole.out_channels
            span = slice(scale * self.channels, (scale + 1) * self.channels)
            part.weight = nn.Parameter(whole.weight.detach()[:, span].clone())
            if scale == 0 and whole.bias is not None:
                part.bias = nn.Parameter(whole.bias.detach().clone())
            parts.append(part)
        return parts

    def prepare_for_export(self) -> AttentionToScale:
        """Return a copy with one convolution per scale, and for two scales one map of differences."""
        folded = copy.deepcopy(self)
        folded.parts = self._split()
        del folded.att.conv1
        if self.scales == 2 and not self.single:
            conv2 = folded.att.conv2
            conv2.out_channels = 1
            weight, bias = conv2.weight.detach(), conv2.bias
            conv2.weight = nn.Parameter(weight[:1] - weight[1:])
            if bias is not None:
                conv2.bias = nn.Parameter(bias.detach()[:1] - bias.detach()[1:])
            folded.single = True
        return folded


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of resized features, hidden features and scores."""
    pixels = sizes["height"] * sizes["width"]
    return sizes["batch"] * pixels * int(max(arguments["channels"], arguments["hidden"], sizes["classes"]))


def _inputs(scales: int) -> tuple[TensorInput, ...]:
    """Return the features and the scores of some scales."""
    suffixes = ["", *(f"_{scale}" for scale in range(2, scales + 1))]
    return tuple(
        TensorInput(f"{name}_{scale}", ("batch", channels, f"height{suffix}", f"width{suffix}"))
        for name, channels in (("features", "channels"), ("scores", "classes"))
        for scale, suffix in enumerate(suffixes, start=1)
    )


def _sizes(*sizes: tuple[int, int, int]) -> tuple[Sizes, ...]:
    """Return sizes of three scales from batch, height and width of the first."""
    return tuple(
        {
            "batch": batch,
            "classes": 5,
            "height": height,
            "width": width,
            "height_2": (height + 1) // 2,
            "width_2": (width + 1) // 2,
            "height_3": (3 * height + 3) // 4,
            "width_3": (3 * width + 3) // 4,
        }
        for batch, height, width in sizes
    )


_SMALL: Arguments = {"channels": 6, "hidden": 8}
_LARGE_FOV = Published(
    "DeepLab-LargeFOV (VGG-16), PASCAL VOC 321x321",
    {"channels": 1024, "hidden": 512},
    {**_sizes((1, 41, 41))[0], "classes": 21},
)

BLOCKS.add(
    BlockSpec(
        name="attention-to-scale",
        title="attention to scale",
        paper="Attention to Scale: Scale-Aware Semantic Image Segmentation, CVPR 2016",
        year=2016,
        code="https://github.com/BebDong/MXNetSeg (independent; the authors' code is not published)",
        build=AttentionToScale,
        original="edgeattn.validation.originals.attention_to_scale:AttentionToScale",
        variants=(
            Variant(
                "official",
                _SMALL,
                published=_LARGE_FOV,
                overflow=Overflow(100.0, _sizes((1, 5, 8))[0], state={r"conv2\.weight": 2e3}),
            ),
            Variant("three-scales", {**_SMALL, "scales": 3}, inputs=_inputs(3)),
            Variant("sigmoid", {**_SMALL, "sigmoid": True, "align_corners": False}),
        ),
        largest=_largest,
        precision=(
            "of three scales and more the softmax stays in FP32; the sigmoid of two scales runs in FP16, where "
            "infinite differences are the weights 0 and 1 and not the NaN of a softmax"
        ),
        int8="the 3x3 convolutions; not conv2, whose few maps decide all weights",
        int8_exclude=("att.conv2",),
        inputs=_inputs(2),
        sizes=_sizes((2, 5, 8), (1, 9, 4), (3, 3, 11), (1, 1, 1)),
    )
)
