"""Non-local block: every position gathers from all positions, in the four published forms of the pairwise function.

Paper: Wang et al., "Non-local Neural Networks", CVPR 2018 (arXiv 1711.07971).
Code: https://github.com/facebookresearch/video-nonlocal-net, `lib/models/nonlocal_helper.py` (Caffe2). Most PyTorch
checkpoints follow https://github.com/AlexHex7/Non-local_pytorch, `lib/non_local_*.py`.

    z = W(y) + x,   y_i = sum_j p_ij g(x_j)   over all positions i and M (perhaps max-pooled) positions j

    gaussian            p = softmax_j(x_i . x_j)
    embedded_gaussian   p = softmax_j(s theta(x_i) . phi(x_j))
    dot_product         p = theta(x_i) . phi(x_j) / M
    concatenation       p = relu(w . [theta(x_i); phi(x_j)]) / M
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


class DotProduct(nn.Module):
    """g (phi^T theta) / M, associated for the fewest multiplications: the map is one of positions or of channels."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend; shapes as in `PixelAttentionCore`. Keys are divided by M first: the sums are means in FP16.

        With dynamic sizes, the map is the one of channels.
        """
        inner, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        mean_key = (key * (1 / keys)).transpose(1, 2)
        static = isinstance(queries, int) and isinstance(keys, int)
        if static and 2 * queries * keys < inner * (queries + keys):
            return torch.matmul(value, torch.matmul(mean_key, query))
        return torch.matmul(torch.matmul(value, mean_key), query)


class ReluSum(nn.Module):
    """relu(a_i + b_j) / M over values, where a and b are the two halves of the concatenated projection."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend with one query channel a and one key channel b; shapes else as in `PixelAttentionCore`.

        Both are divided by M before the map is made, so that FP16 sums means (relu(a / M) = relu(a) / M).
        """
        mean = 1 / key.shape[2]
        return torch.matmul(value, torch.relu((key * mean).transpose(1, 2) + query * mean))


class HalvingMaxPool(nn.Module):
    """Max-pool by two along height and width, or along the length of a sequence; an odd last position is dropped.

    TensorRT pools maps and volumes only, so a sequence passes as a map of height 1.

    Args:
        frames: whether the frames of a volume are halved too.
    """

    def __init__(self, frames: bool = False) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, [[frames,] height,] width) to the pooled map.

        Raises:
            UserError: an axis of size 1 that would be halved.
        """
        if any(size < 2 for size in x.shape[3 if x.dim() == 5 and not self.frames else 2 :]):
            raise UserError(
                f"sub-sampling halves every size, so each must be at least 2; got {tuple(x.shape)}. Use a larger input."
            )
        if x.dim() == 3:
            return F.max_pool2d(x.unsqueeze(2), (1, 2)).squeeze(2)
        return F.max_pool2d(x, 2) if x.dim() == 4 else F.max_pool3d(x, (2 if self.frames else 1, 2, 2))


MODES: Mapping[str, type[nn.Module]] = {
    "gaussian": PixelAttentionCore,
    "embedded_gaussian": PixelAttentionCore,
    "dot_product": DotProduct,
    "concatenation": ReluSum,
}
"""Pairwise functions, each with the module that gathers by it."""

SCALES: Mapping[str, Callable[[int, int], float]] = {
    "none": lambda channels, inner: 1.0,
    "inner": lambda channels, inner: inner**-0.5,
    "input": lambda channels, inner: channels**-0.5,
    "inverted": lambda channels, inner: inner**0.5,
}
"""Factor s of the embedded Gaussian's energies, from the input's and the inner channels."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class NonLocal(nn.Module):
    """Non-local block for sequences, maps and volumes.

    State names are those of AlexHex7/Non-local_pytorch, d = inter_channels: 1x1 convolutions `theta`, `phi` (d, C; none
    in gaussian mode) and `g` (d, C), which are `phi.0` and `g.0` where a pool follows them; `W` (C, d), or with
    normalisation `W.0` and `W.1`; `concat_project.0.weight` (1, 2d, 1, 1), whatever the dimension.

    Published implementations differ in numerics, and the same state gives other results under the other's arguments:
    - scale: AlexHex7 has "none"; Caffe2, SlowFast and mmcv "inner" (d^-0.5); timm "input" (C^-0.5 although the
      products have d terms); mmdet v1 (in GCNet) "inverted": it divides by d^-0.5, hence multiplies by sqrt(d).
    - pool_before: Caffe2 and SlowFast pool the input of phi and g; AlexHex7 and mmcv pool what phi and g give.

    A Caffe2 model trained with AffineNd has no statistics: give `W.1` the mean 0 and the variance 1 - 1e-5.

    Args:
        in_channels: channels C of input and output.
        inter_channels: inner channels d; max(1, C // 2) when None.
        dimension: 1 for (batch, C, length), 2 for (batch, C, height, width), 3 for frames before height.
        sub_sample: whether phi and g see half the height and width (or length).
        bn_layer: whether batch normalisation follows the output convolution.
        mode: one of `MODES`.
        scale: one of `SCALES`; the other modes have none.
        pool_before: whether the pool comes before phi and g.
        pool_frames: whether sub-sampling halves the frames too, as in SlowFast's ResNet-101 for AVA.
        out_bias: whether the output convolution has a bias; mmcv's has none before a normalisation.

    Raises:
        ValueError: an unknown dimension, mode or scale, fewer than 1 channel, a scale outside the embedded Gaussian, or
            pooled frames without frames or pool.
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        dimension: int = 3,
        sub_sample: bool = True,
        bn_layer: bool = True,
        *,
        mode: str = "embedded_gaussian",
        scale: str = "none",
        pool_before: bool = False,
        pool_frames: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = max(1, in_channels // 2) if inter_channels is None else inter_channels
        if min(in_channels, inner) < 1:
            raise ValueError(
                f"in_channels={in_channels}, inter_channels={inner}: a non-local block needs at least 1 channel"
            )
        if dimension not in (1, 2, 3):
            raise ValueError(f"dimension={dimension!r}: choose 1 (sequence), 2 (map) or 3 (volume)")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
        if scale != "none" and mode != "embedded_gaussian":
            raise ValueError(f"scale={scale!r}: only embedded_gaussian scales its energies; choose 'none' for {mode}")
        if pool_frames and not (sub_sample and dimension == 3):
            raise ValueError(
                "pool_frames=True: only a sub-sampled volume has such frames; set sub_sample and dimension=3"
            )
        self.inner = inner
        self.dimension = dimension
        self.scale = SCALES[scale](in_channels, inner)

        convolution, norm = _CONVOLUTIONS[dimension - 1], _NORMS[dimension - 1]

        def pooled(*layers: nn.Module) -> nn.Module:
            if sub_sample and not pool_before:
                return nn.Sequential(*layers, HalvingMaxPool(pool_frames))
            return layers[0] if layers else nn.Identity()

        embedded = mode != "gaussian"
        self.pool = HalvingMaxPool(pool_frames) if sub_sample and pool_before else nn.Identity()
        self.theta: nn.Module = convolution(in_channels, inner, 1) if embedded else nn.Identity()
        self.phi = pooled(convolution(in_channels, inner, 1)) if embedded else pooled()
        self.g = pooled(convolution(in_channels, inner, 1))
        out = convolution(inner, in_channels, 1, bias=out_bias)
        self.W: nn.Module = nn.Sequential(out, norm(in_channels)) if bn_layer else out
        self.concat_project: nn.Sequential | None = None
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inner, 1, 1, bias=False))
        self.attend = MODES[mode]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gather from all positions and add the input.

        Args:
            x: (batch, C, length), (batch, C, height, width) or (batch, C, frames, height, width).

        Returns:
            The same shape.

        Raises:
            UserError: a size of 1 that sub-sampling would halve.
        """
        source = self.pool(x)
        query, key, value = self.theta(x).flatten(2), self.phi(source).flatten(2), self.g(source).flatten(2)
        if self.concat_project is not None:
            on_query, on_key = self._projection(self.concat_project)
            query, key = torch.matmul(on_query, query), torch.matmul(on_key, key)
        elif self.scale != 1:
            query = query * self.scale
        return self.W(self.attend(query, key, value).unflatten(2, x.shape[2:])) + x

    def prepare_for_export(self) -> NonLocal:
        """Return a copy in which projections carry what is linear around them.

        Theta carries the scale. In concatenation mode theta and phi carry their halves of the projection; a pool stays
        between phi and its half. In dot-product mode theta and g are divided, and W multiplied, by powers of two whose
        product is about d: what is gathered, three features multiplied, would overflow FP16 before the output does.
        All are exact.
        """
        folded = copy.deepcopy(self)
        with torch.no_grad():
            if folded.concat_project is not None:
                on_query, on_key = self._projection(folded.concat_project)
                folded.theta = self._composed(on_query, folded.theta)
                if isinstance(folded.phi, nn.Sequential):
                    folded.phi.append(_convolution(self.dimension, on_key))
                else:
                    folded.phi = self._composed(on_key, folded.phi)
                folded.concat_project = None
            for parameter in folded.theta.parameters():
                parameter.mul_(self.scale)
            folded.scale = 1.0
            if isinstance(folded.attend, DotProduct):
                factor = 2.0 ** round(math.log2(self.inner) / 2)
                for parameter in (*folded.theta.parameters(), *folded.g.parameters()):
                    parameter.div_(factor)
                next(folded.W.parameters()).mul_(factor * factor)
        return folded

    def _projection(self, project: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the halves (1, d) of the projection that meet theta and phi."""
        weight = next(project.parameters()).flatten(1)
        return weight[:, : self.inner], weight[:, self.inner :]

    def _composed(self, matrix: torch.Tensor, convolution: nn.Module) -> nn.Module:
        """Return the 1x1 convolution that equals a convolution with bias and then a matrix (out, in)."""
        weight, bias = convolution.parameters()
        return _convolution(self.dimension, torch.matmul(matrix, weight.flatten(1)), torch.mv(matrix, bias))


def _convolution(dimension: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """Return a 1x1 convolution with weight (out, in) and bias (out,)."""
    convolution = _CONVOLUTIONS[dimension - 1](weight.shape[1], weight.shape[0], 1, bias=bias is not None).to(weight)
    convolution.weight = nn.Parameter(weight.reshape(convolution.weight.shape))
    if bias is not None:
        convolution.bias = nn.Parameter(bias)
    return convolution


_BLOB = r"^(?:nonlocal_conv\d+_\d+_)?"
_CAFFE2 = {
    rf"{_BLOB}(theta|phi|g)_w$": r"\1.weight",
    rf"{_BLOB}(theta|phi|g)_b$": r"\1.bias",
    rf"{_BLOB}out_w$": "W.0.weight",
    rf"{_BLOB}out_b$": "W.0.bias",
    rf"{_BLOB}bn_s$": "W.1.weight",
    rf"{_BLOB}bn_b$": "W.1.bias",
    rf"{_BLOB}bn_rm$": "W.1.running_mean",
    rf"{_BLOB}bn_riv$": "W.1.running_var",  # the name says inverse, the blob holds the variance
}
_SLOWFAST = {
    r"\bconv_(theta|phi|g)\.": r"\1.",
    r"\bconv_out\.": "W.0.",
    r"(^|nonlocal\d+\.)bn\.": r"\1W.1.",
}
_MMCV_INNER = {
    r"\b(theta|phi|g)(\.0)?\.conv\.": r"\1\2.",
    r"\bconcat_project\.conv\.": "concat_project.0.",
}
_MMCV = {**_MMCV_INNER, r"\bconv_out\.conv\.": "W."}
_MMCV_NORM = {**_MMCV_INNER, r"\bconv_out\.conv\.": "W.0.", r"\bconv_out\.bn\.": "W.1."}
_TIMM_NAMES = {r"\bt\.": "theta.", r"\bp\.": "phi.", r"\bz\.": "W.0.", r"\bnorm\.": "W.1."}

_SEQUENCE = (TensorInput("x", ("batch", "in_channels", "length")),)
_MAP = (TensorInput("x", ("batch", "in_channels", "height", "width")),)
_VOLUME = (TensorInput("x", ("batch", "in_channels", "frames", "height", "width")),)

_POOLED_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "height": 5, "width": 7, "frames": 3, "length": 11},
    {"batch": 1, "height": 6, "width": 3, "frames": 2, "length": 6},
    {"batch": 3, "height": 3, "width": 4, "frames": 1, "length": 3},
    {"batch": 1, "height": 2, "width": 2, "frames": 1, "length": 2},
)

_SLOWFAST_BLOCK: Arguments = {"in_channels": 8, "inter_channels": 4, "pool_before": True}
_SLOWFAST_LISTED: Arguments = {"in_channels": 512, "inter_channels": 256, "pool_before": True}
_MAP_BLOCK: Arguments = {"in_channels": 8, "dimension": 2}
_PLAIN: Arguments = {"dimension": 2, "sub_sample": False, "bn_layer": False}
_MMCV_GAUSSIAN: Arguments = {"dimension": 2, "bn_layer": False, "mode": "gaussian"}
_MMSEG: Arguments = {"dimension": 2, "sub_sample": False, "scale": "inner", "out_bias": False}
_TIMM: Arguments = {"dimension": 2, "sub_sample": False, "scale": "input"}

_LARGE_PRODUCTS = {r"^theta\.": 4.0, r"^W\.0\.weight": 1 / 40}
"""Changes of the state that leave the output's size alone while the gathered features overflow FP16."""


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of a feature map and the pairwise map (d x d for the dot product)."""
    axes = (("length",), ("height", "width"), ("frames", "height", "width"))[arguments.get("dimension", 3) - 1]
    queries = math.prod(sizes[axis] for axis in axes)
    keys = queries
    if arguments.get("sub_sample", True):
        keys = math.prod(sizes[axis] // 2 for axis in axes if axis != "frames")
        if "frames" in axes:
            keys *= sizes["frames"] // (2 if arguments.get("pool_frames") else 1)
    channels = arguments["in_channels"]
    inner = arguments.get("inter_channels", max(1, channels // 2))
    pairs = inner * inner if arguments.get("mode") == "dot_product" else queries * keys
    return sizes["batch"] * max(pairs, max(channels, inner) * queries)


BLOCKS.add(
    BlockSpec(
        name="non-local",
        title="non-local block",
        paper="Non-local Neural Networks, CVPR 2018",
        year=2018,
        code="https://github.com/facebookresearch/video-nonlocal-net, https://github.com/AlexHex7/Non-local_pytorch, "
        "https://github.com/facebookresearch/SlowFast, https://github.com/open-mmlab/mmcv, "
        "https://github.com/xvjiarui/GCNet, https://github.com/huggingface/pytorch-image-models",
        build=NonLocal,
        original="edgeattn.validation.originals.non_local:NonLocal",
        variants=(
            Variant(
                "official",
                {**_SLOWFAST_BLOCK, "scale": "inner"},
                key_map=_CAFFE2 | _SLOWFAST,
                listings={"slowfast_nonlocal_softmax": {**_SLOWFAST_LISTED, "scale": "inner"}},
                references={"slowfast_nonlocal_softmax": {**_SLOWFAST_BLOCK, "scale": "inner"}},
                published=Published(
                    "non-local ResNet-50 with 5 blocks, Kinetics, res4",
                    {"in_channels": 1024, "inter_channels": 512, "pool_before": True, "scale": "inner"},
                    {"batch": 1, "frames": 4, "height": 14, "width": 14},
                ),
                inputs=_VOLUME,
                sizes=_POOLED_SIZES,
                overflow=Overflow(150.0, {"batch": 1, "frames": 2, "height": 4, "width": 6}),
            ),
            Variant(
                "slowfast",
                {**_SLOWFAST_BLOCK, "mode": "dot_product", "pool_frames": True},
                key_map=_SLOWFAST,
                listings={"slowfast_nonlocal_dot_product": {**_SLOWFAST_LISTED, "mode": "dot_product"}},
                references={
                    "slowfast_nonlocal_dot_product": {**_SLOWFAST_BLOCK, "mode": "dot_product"},
                    "slowfast_nonlocal_frames": {**_SLOWFAST_BLOCK, "mode": "dot_product", "pool_frames": True},
                },
                published=Published(
                    "SlowFast 32x2 ResNet-101 with non-local blocks, AVA, res4",
                    {
                        **{"in_channels": 1024, "inter_channels": 512, "pool_before": True},
                        **{"mode": "dot_product", "pool_frames": True},
                    },
                    {"batch": 1, "frames": 8, "height": 14, "width": 14},
                ),
                inputs=_VOLUME,
                sizes=({**_POOLED_SIZES[0], "frames": 5}, *({**sizes, "frames": 2} for sizes in _POOLED_SIZES[1:])),
                overflow=Overflow(20.0, {"batch": 1, "frames": 2, "height": 4, "width": 6}, state=_LARGE_PRODUCTS),
            ),
            Variant(
                "embedded",
                _MAP_BLOCK,
                listings={
                    "nonlocal2d_embedded_gaussian": {"in_channels": 512, "dimension": 2},
                    "nonlocal2d_eg_plain": {"in_channels": 512, **_PLAIN},
                    "nonlocal1d_eg": {"in_channels": 512, "dimension": 1},
                    "nonlocal3d_eg": {"in_channels": 1024, "dimension": 3},
                },
                references={
                    "nonlocal2d_embedded_gaussian": _MAP_BLOCK,
                    "nonlocal2d_eg_plain": {"in_channels": 8, **_PLAIN},
                },
                sizes=_POOLED_SIZES,
            ),
            Variant(
                "embedded-sequence",
                {"in_channels": 8, "dimension": 1},
                references={"nonlocal1d_eg": {"in_channels": 8, "dimension": 1}},
                inputs=_SEQUENCE,
                sizes=_POOLED_SIZES,
            ),
            Variant(
                "gaussian",
                {**_MAP_BLOCK, "mode": "gaussian"},
                listings={"nonlocal2d_gaussian": {"in_channels": 512, "dimension": 2, "mode": "gaussian"}},
                references={"nonlocal2d_gaussian": {**_MAP_BLOCK, "mode": "gaussian"}},
                sizes=_POOLED_SIZES,
            ),
            Variant(
                "dot-product",
                {"in_channels": 32, "dimension": 2, "mode": "dot_product"},
                listings={"nonlocal2d_dot_product": {"in_channels": 512, "dimension": 2, "mode": "dot_product"}},
                references={"nonlocal2d_dot_product": {**_MAP_BLOCK, "mode": "dot_product"}},
                sizes=_POOLED_SIZES,
                overflow=Overflow(20.0, {"batch": 1, "height": 4, "width": 6}, state=_LARGE_PRODUCTS),
            ),
            Variant(
                "concatenation",
                {"in_channels": 8, "mode": "concatenation"},
                listings={"nonlocal2d_concatenation": {"in_channels": 512, "dimension": 2, "mode": "concatenation"}},
                references={"nonlocal3d_concatenation": {"in_channels": 8, "mode": "concatenation"}},
                published=Published(
                    "non-local C2D ResNet-50 with 1 block, Kinetics, res4 (table 2a of the paper)",
                    {"in_channels": 1024, "mode": "concatenation"},
                    {"batch": 1, "frames": 4, "height": 14, "width": 14},
                ),
                inputs=_VOLUME,
                sizes=_POOLED_SIZES,
            ),
            Variant(
                "mmcv",
                {"in_channels": 8, **_PLAIN, "scale": "inner"},
                key_map=_MMCV,
                listings={
                    "mmcv_nonlocal2d_embedded_gaussian": {"in_channels": 256, **_PLAIN, "scale": "inner"},
                    "mmcv_nonlocal2d_dot_product": {"in_channels": 256, **_PLAIN, "mode": "dot_product"},
                    "mmcv_nonlocal2d_gaussian": {"in_channels": 256, "inter_channels": 256, **_MMCV_GAUSSIAN},
                },
                references={
                    "mmcv_nonlocal2d_embedded_gaussian": {"in_channels": 8, **_PLAIN, "scale": "inner"},
                    "mmcv_nonlocal2d_dot_product": {"in_channels": 8, **_PLAIN, "mode": "dot_product"},
                    "mmcv_nonlocal2d_gaussian": {"in_channels": 8, "inter_channels": 8, **_MMCV_GAUSSIAN},
                },
            ),
            Variant(
                "mmcv-concatenation",
                {"in_channels": 8, **_PLAIN, "mode": "concatenation"},
                key_map=_MMCV,
                listings={"mmcv_nonlocal2d_concatenation": {"in_channels": 256, **_PLAIN, "mode": "concatenation"}},
                references={"mmcv_nonlocal2d_concatenation": {"in_channels": 8, **_PLAIN, "mode": "concatenation"}},
            ),
            Variant(
                "mmseg",
                {"in_channels": 8, **_MMSEG},
                key_map=_MMCV_NORM,
                references={"mmcv_nonlocal2d_norm": {"in_channels": 8, **_MMSEG}},
                published=Published(
                    "NLNet, ResNet-50-D8, Cityscapes 512x1024",
                    {"in_channels": 512, **_MMSEG},
                    {"batch": 1, "height": 64, "width": 128},
                ),
            ),
            Variant(
                "gcnet",
                {"in_channels": 8, **_PLAIN, "scale": "inverted"},
                key_map=_MMCV,
                listings={"gcnet_nonlocal2d": {"in_channels": 256, **_PLAIN, "scale": "inverted"}},
                references={"nonlocal2d_gcnet": {"in_channels": 8, **_PLAIN, "scale": "inverted"}},
            ),
            Variant(
                "timm",
                {"in_channels": 16, "inter_channels": 8, **_TIMM},
                key_map=_TIMM_NAMES,
                listings={"timm_nonlocal": {"in_channels": 256, "inter_channels": 32, **_TIMM}},
                references={"nonlocal2d_timm": {"in_channels": 16, "inter_channels": 8, **_TIMM}},
            ),
        ),
        largest=_largest,
        precision="energies and softmax stay in FP32 (dot products overflow); sums over values run in FP16, as means "
        "where no softmax bounds them",
        int8="the projections and the output convolution; the products over positions stay in FP16",
        inputs=_MAP,
    )
)
