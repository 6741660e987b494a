"""PSANet's point-wise spatial attention: collect, distribute, or both.

Paper: Zhao et al., "PSANet: Point-wise Spatial Attention Network for Scene Parsing", ECCV 2018.
Code: https://github.com/hszhao/semseg, `model/psanet.py` and `lib/psa` (the mask operation, C++ and CUDA);
https://github.com/open-mmlab/mmsegmentation, `psa_head.py`.

    r = reduce(x) on every second pixel,  m = attention(r),  z_t = sum_s r_s softmax_s(Y[s, t]) / norm
    collect Y[s, t] = m_t[s - t],  distribute Y[s, t] = m_s[t - s],  output = cat[x, resize(proj(z))]

m holds, per pixel, one logit for each offset of a mask centred on the pixel (over-complete), or one for each pixel of
the map (compact). One GatherElements spreads over-complete logits to a matrix of other pixels by predicting pixels; the
two directions differ in the axis of its softmax, so it is never transposed. Compact logits are a product of the weights
of the last convolution with the features before it: pixel attention with constant keys (collect) or constant queries
(distribute).

With aligned corners, a map of size (H - 1) / s + 1 samples the larger one exactly at every s-th pixel. The reduction
therefore runs on these pixels alone instead of on all of them with a resize behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

COLLECT, DISTRIBUTE, BOTH = 0, 1, 2
"""Values of `psa_type`: a pixel weights its senders, a pixel weights its receivers, or both side by side."""

_COMPACT = "a compact mask has one weight per pixel of the map"
_PARITY = "whether the size is a multiple of shrink_factor decides how the map is resized"


def _projection(in_channels: int, out_channels: int, padding: int = 0) -> list[nn.Module]:
    """Return a 1x1 convolution with batch normalisation and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, padding=padding, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


class PointwiseSpatialAttention(nn.Module):
    """Every pixel gathers from, or hands out to, all others with weights that one pixel predicts.

    State names and shapes are the official ones (`reduce`, `attention`, `proj`; with both directions `reduce_p` and
    `attention_p` for distribute). The softmax is over the senders in either direction. Offsets outside the mask have
    the logit 0 and so still take part in the softmax.

    mmsegmentation's head has three peculiarities. Its projection is padded (`proj_padding=1`), so that a ring of
    relu(bn(0)) surrounds the map before it is resized. Its corners are aligned only if neither size is a multiple of
    `shrink_factor` (`align_corners=None`). And a compact mask is transposed for collect instead of distribute where the
    block has one direction: its compact collect is `psa_type=1` here, its compact distribute `psa_type=0`.

    Args:
        in_channels: number of channels of the input; the output has twice as many.
        mid_channels: number of channels of the attended features.
        psa_type: 0 collect, 1 distribute, 2 both.
        compact: the mask is the map, instead of centred on each pixel.
        shrink_factor: the attention works on every n-th pixel of both axes.
        mask_h: height of the mask; odd unless compact. 2h - 1 covers a shrunk map of height h.
        mask_w: width of the mask; odd unless compact.
        normalization_factor: what the sums are divided by; None is mask_h * mask_w.
        psa_softmax: whether the weights are a softmax over the senders, or the logits themselves.
        proj_padding: zero padding of the projection.
        align_corners: of both resizes. True as in the official code, whose sizes have to be a multiple of
            `shrink_factor` plus 1; None to let the size decide, as mmsegmentation does; False for never.

    Raises:
        ValueError: an unknown direction, a size below 1, or an even mask size in the over-complete form.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        mid_channels: int = 512,
        psa_type: int = BOTH,
        compact: bool = False,
        shrink_factor: int = 2,
        mask_h: int = 59,
        mask_w: int = 59,
        normalization_factor: float | None = 1.0,
        psa_softmax: bool = True,
        proj_padding: int = 0,
        align_corners: bool | None = True,
    ) -> None:
        super().__init__()
        if psa_type not in (COLLECT, DISTRIBUTE, BOTH):
            raise ValueError(f"psa_type is 0 (collect), 1 (distribute) or 2 (both), not {psa_type}")
        for name, value in (("shrink_factor", shrink_factor), ("mask_h", mask_h), ("mask_w", mask_w)):
            if value < 1:
                raise ValueError(f"{name} has to be at least 1, got {value}")
        if not compact and mask_h % 2 * mask_w % 2 == 0:
            raise ValueError(
                f"an over-complete mask is centred on its pixel, but mask_h={mask_h} and mask_w={mask_w} are not both "
                "odd. Use 2h - 1 for a shrunk map of height h."
            )
        self.directions = (COLLECT, DISTRIBUTE) if psa_type == BOTH else (psa_type,)
        self.compact = compact
        self.shrink_factor = shrink_factor
        self.mask_h = mask_h
        self.mask_w = mask_w
        self.scale = 1.0 / (mask_h * mask_w if normalization_factor is None else normalization_factor)
        self.psa_softmax = psa_softmax
        self.resize_output = shrink_factor != 1 or proj_padding != 0
        self.align_corners = align_corners
        for suffix in ("", "_p")[: len(self.directions)]:
            logits = nn.Conv2d(mid_channels, mask_h * mask_w, kernel_size=1, bias=False)
            self.add_module(f"reduce{suffix}", nn.Sequential(*_projection(in_channels, mid_channels)))
            self.add_module(f"attention{suffix}", nn.Sequential(*_projection(mid_channels, mid_channels), logits))
        self.proj = nn.Sequential(*_projection(mid_channels * len(self.directions), in_channels, proj_padding))
        self.core = PixelAttentionCore() if compact and psa_softmax else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Append what attention adds to the features.

        Args:
            x: (batch, in_channels, height, width). With `align_corners=True`, height - 1 and width - 1 have to be
                multiples of `shrink_factor`; in a model with dynamic axes this is not checked.

        Returns:
            (batch, 2 * in_channels, height, width).

        Raises:
            UserError: a size that the definition does not allow, or dynamic axes where a size is fixed.
        """
        height, width = x.shape[2:]
        aligned, size = self._shrunk(height, width)
        sampled = aligned and (self.align_corners or self._divides(height - 1, width - 1))
        step = self.shrink_factor if sampled else 1
        small = x if step == 1 else x[:, :, ::step, ::step]
        attended = []
        for direction, suffix in zip(self.directions, ("", "_p"), strict=False):
            features = self.get_submodule(f"reduce{suffix}")(small)
            if self.shrink_factor != 1 and not sampled:
                features = F.interpolate(features, size=size, mode="bilinear", align_corners=aligned)
            attended.append(self._attend(features, self.get_submodule(f"attention{suffix}"), direction))
        update = self.proj(torch.cat(attended, dim=1) if len(attended) > 1 else attended[0])
        if self.resize_output:
            update = F.interpolate(update, size=(height, width), mode="bilinear", align_corners=aligned)
        return torch.cat([x, update], dim=1)

    def _divides(self, *sizes: int) -> bool:
        """Say whether all sizes are multiples of the shrink factor."""
        return all(size % self.shrink_factor == 0 for size in sizes)

    def _shrunk(self, height: int, width: int) -> tuple[bool, tuple[int, int]]:
        """Return whether corners are aligned, and the size on which the attention works; check the sizes."""
        factor, aligned = self.shrink_factor, self.align_corners
        if aligned is None:
            self._require_static(height, width, _PARITY)
            aligned = height % factor != 0 and width % factor != 0
        elif aligned and _known(height, width) and not self._divides(height - 1, width - 1):
            raise UserError(
                f"point-wise spatial attention shrinks by {factor}: height - 1 and width - 1 have to be multiples of "
                f"{factor}, but the map is {height}x{width}. At an output stride of 8, give images of {8 * factor} n "
                "+ 1 pixels per side."
            )
        extra = 1 if aligned else 0
        size = ((height - extra) // factor + extra, (width - extra) // factor + extra)
        if self.compact:
            self._require_static(height, width, _COMPACT)
            if size != (self.mask_h, self.mask_w):
                raise UserError(
                    f"compact point-wise spatial attention has a mask of {self.mask_h}x{self.mask_w}, but the shrunk "
                    f"map is {size[0]}x{size[1]}: {_COMPACT}. Give the size of image it was trained with."
                )
        return aligned, size

    @staticmethod
    def _require_static(height: int, width: int, reason: str) -> None:
        """Refuse dynamic axes."""
        for axis, size in (("height", height), ("width", width)):
            require_static("this point-wise spatial attention", axis, size, reason)

    def _attend(self, features: torch.Tensor, attention: nn.Module, direction: int) -> torch.Tensor:
        """Return z for the features r of one direction, both (batch, mid_channels, h, w)."""
        hidden_layers, logits_layer = list(attention.children())[:-1], list(attention.children())[-1]
        assert isinstance(logits_layer, nn.Conv2d)
        hidden = features
        for layer in hidden_layers:
            hidden = layer(hidden)
        value = features.flatten(2)
        if self.scale != 1.0:
            value = value * self.scale  # before the sum, so that large sums of small shares stay in range
        if self.compact:
            constant = logits_layer.weight.flatten(1).transpose(0, 1).expand(value.shape[0], -1, -1)
            pair = (hidden.flatten(2), constant)
            query, key = pair if direction == COLLECT else reversed(pair)
            if self.core is None:
                return torch.matmul(torch.matmul(value, key.transpose(1, 2)), query).view(features.shape)
            attended: torch.Tensor = self.core(query, key, value)
            return attended.view(features.shape)
        weights = self._spread(logits_layer(hidden))
        senders = 1 if direction == COLLECT else 2
        if self.psa_softmax:
            weights = weights.softmax(dim=senders)
        return torch.matmul(value, weights if senders == 1 else weights.transpose(1, 2)).view(features.shape)

    def _spread(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what every pixel predicts for every other, 0 where its mask does not reach.

        Args:
            logits: (batch, mask_h * mask_w, h, w).

        Returns:
            (batch, h * w others, h * w predicting pixels): entry (other, pixel) is the pixel's logit of other - pixel.
        """
        height, width = logits.shape[2:]
        rows = torch.arange(height, device=logits.device)
        columns = torch.arange(width, device=logits.device)
        place = (rows[:, None] * self.mask_w + columns).flatten()
        index = place[:, None] + (self.mask_h // 2 * self.mask_w + self.mask_w // 2 - place)
        if _known(height, width) and height <= self.mask_h // 2 + 1 and width <= self.mask_w // 2 + 1:
            return _taken(logits, index)
        near_rows = (rows[:, None] - rows).abs() <= self.mask_h // 2
        near_columns = (columns[:, None] - columns).abs() <= self.mask_w // 2
        near = (near_rows[:, None, :, None] & near_columns[:, None, :]).reshape(index.shape)
        return torch.where(near, _taken(logits, torch.where(near, index, 0)), 0.0)


def _known(height: int, width: int) -> bool:
    """Say whether sizes are plain integers rather than symbols of an export with dynamic axes."""
    return isinstance(height, int) and isinstance(width, int)


def _taken(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the logits (batch, others, pixels) that a matrix of mask entries (others, pixels) chooses."""
    return logits.flatten(2).gather(1, index.expand(logits.shape[0], -1, -1))


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the mask logits and the attention."""
    factor: int = arguments.get("shrink_factor", 2)
    pixels = ((sizes["height"] - 1) // factor + 1) * ((sizes["width"] - 1) // factor + 1)
    mask: int = arguments["mask_h"] * arguments["mask_w"]
    return sizes["batch"] * pixels * max(mask, pixels)


def _sizes(*sizes: tuple[int, int, int]) -> tuple[Sizes, ...]:
    """Return sizes from batch, height and width."""
    return tuple({"batch": batch, "height": height, "width": width} for batch, height, width in sizes)


_SMALL = {"in_channels": 16, "mid_channels": 8}
_RECORDED = {"in_channels": 6, "mid_channels": 4}
_MMSEG = {"proj_padding": 1, "align_corners": None}
_ODD = _sizes((2, 5, 7), (1, 9, 3), (3, 3, 11), (3, 1, 5), (1, 1, 1))
_FIXED = {"height": _COMPACT, "width": _COMPACT}
_KEYS = {
    r"^(decode_head\.)?(reduce|reduce_p|proj)\.conv\.": r"\2.0.",
    r"^(decode_head\.)?(reduce|reduce_p|proj)\.bn\.": r"\2.1.",
    r"^(decode_head\.)?(attention|attention_p)\.0\.conv\.": r"\2.0.",
    r"^(decode_head\.)?(attention|attention_p)\.0\.bn\.": r"\2.1.",
    r"^(decode_head\.)?(attention|attention_p)\.1\.": r"\2.3.",
    r"^.*(backbone|auxiliary_head|bottleneck|conv_seg)\..*$": "",
}

BLOCKS.add(
    BlockSpec(
        name="psa",
        title="point-wise spatial attention",
        paper="PSANet: Point-wise Spatial Attention Network for Scene Parsing, ECCV 2018",
        year=2018,
        code="https://github.com/hszhao/semseg, https://github.com/open-mmlab/mmsegmentation",
        build=PointwiseSpatialAttention,
        original="edgeattn.validation.originals.psa:PointwiseSpatialAttention",
        variants=(
            Variant(
                "official",
                {**_SMALL, "mask_h": 9, "mask_w": 11},
                listings={"psanet_bi": {}},
                references={"psanet_bi": {**_RECORDED, "mask_h": 5, "mask_w": 7}},
                published=Published(
                    "PSANet-50 and -101, ADE20K and PASCAL VOC 465x465",
                    {"in_channels": 2048, "mask_h": 59, "mask_w": 59},
                    {"batch": 1, "height": 59, "width": 59},
                ),
                sizes=_ODD,
            ),
            Variant(
                "collect",
                {**_SMALL, "psa_type": COLLECT, "mask_h": 3, "mask_w": 5},
                listings={"psanet_collect": {"psa_type": COLLECT}},
                references={"psanet_collect": {**_RECORDED, "psa_type": COLLECT, "mask_h": 3, "mask_w": 9}},
                sizes=_ODD,
            ),
            Variant(
                "distribute-sums",
                {
                    **_SMALL,
                    "psa_type": DISTRIBUTE,
                    "mask_h": 9,
                    "mask_w": 13,
                    "shrink_factor": 1,
                    "normalization_factor": None,
                    "psa_softmax": False,
                },
                listings={"psanet_distribute": {"psa_type": DISTRIBUTE}},
                references={
                    "psanet_distribute": {
                        **_RECORDED,
                        "psa_type": DISTRIBUTE,
                        "mask_h": 9,
                        "mask_w": 3,
                        "normalization_factor": None,
                    },
                    "psanet_sums": {
                        **_RECORDED,
                        "psa_type": DISTRIBUTE,
                        "mask_h": 5,
                        "mask_w": 3,
                        "shrink_factor": 1,
                        "normalization_factor": None,
                        "psa_softmax": False,
                    },
                },
                overflow=Overflow(200.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "compact",
                {**_SMALL, "compact": True, "mask_h": 3, "mask_w": 4},
                listings={"psanet_bi_compact": {"compact": True, "mask_h": 30, "mask_w": 30}},
                references={"psanet_bi_compact": {**_RECORDED, "compact": True, "mask_h": 3, "mask_w": 4}},
                sizes=_sizes((2, 5, 7), (1, 5, 7), (3, 5, 7)),
                fixed=_FIXED,
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}, state={r"attention(_p)?\.3": 10000.0}),
            ),
            Variant(
                "compact-sums",
                {**_SMALL, "compact": True, "mask_h": 3, "mask_w": 4, "psa_softmax": False},
                references={
                    "psanet_compact_sums": {
                        **_RECORDED,
                        "compact": True,
                        "mask_h": 3,
                        "mask_w": 4,
                        "normalization_factor": 2.0,
                        "psa_softmax": False,
                    }
                },
                sizes=_sizes((2, 5, 7), (1, 5, 7), (3, 5, 7)),
                fixed=_FIXED,
            ),
            Variant(
                "mmseg",
                {**_SMALL, **_MMSEG, "mask_h": 7, "mask_w": 3},
                key_map=_KEYS,
                references={
                    "psanet_mmseg": {**_RECORDED, **_MMSEG, "mask_h": 7, "mask_w": 3},
                    "psanet_mmseg_compact_collect": {
                        **_RECORDED,
                        **_MMSEG,
                        "psa_type": DISTRIBUTE,
                        "compact": True,
                        "mask_h": 3,
                        "mask_w": 4,
                    },
                },
                sizes=_sizes((2, 6, 7), (1, 6, 7), (3, 6, 7)),
                fixed={"height": _PARITY, "width": _PARITY},
            ),
        ),
        largest=_largest,
        precision=(
            "the softmax stays in FP32, in the compact form with the energies; over-complete logits are the result of "
            "a convolution and run in FP16; the factor 1/norm precedes the sums over senders, so that FP16 holds them"
        ),
        int8="the convolutions except those of the mask logits; the attention products stay in FP16",
        int8_exclude=("attention.3", "attention_p.3"),
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)
