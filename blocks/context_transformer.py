"""Context-Transformer: every prior box of a few-shot detector asks the pooled score maps for context.

Paper: Yang et al., "Context-Transformer: Tackling Object Confusion for Few-Shot Detection", AAAI 2020 (arXiv
2003.07304).
Code: https://github.com/Ze-Yang/Context-Transformer, `models/RFB_Net_vgg.py`, method "ours", phase 2.

A box's feature is the vector of its F source-class scores, so P (n, F) is all score maps laid out box by box, and C
(m, F) is the same after a max-pool of every map. With residual projections h(x) = x + W_h x + b_h,

    z_i = p_i + w_z * sum_j a_ij g(c_j)        a_i = softmax_j(theta(p_i) . phi(c_j)), unscaled
    scores_i = softmax(s O z_i / |z_i|)                                                 transfer
    scores_i = softmax([p_i + W_b p_i + b_b ; s O z_i / |z_i|])                         incremental

The energies are P (I + W_theta)^T (I + W_phi) C^T plus what is the same for every j, so the two projections are one
matrix at export, and the pooled scores are the keys as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

CHUNK = 1024
"""Boxes that attend at a time: 12 calls at 300 pixels, whose pairwise maps of 8 MB replace one of 86 MB."""


class ResidualLinear(nn.Linear):
    """A linear layer with bias whose input is added to its output.

    Args:
        features: size of the last axis.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, features)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (..., features) to the same shape."""
        return rows + super().forward(rows)

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return matrix and bias of the layer, the residual included."""
        return self.weight + torch.eye(self.in_features).to(self.weight), self.bias


class ContextTransformer(nn.Module):
    """The transfer or incremental head of a detector, behind its confidence convolutions.

    State names are those of the official RFBNet: `theta`, `phi` and `g` (F, F) with bias, `Wz` (F,), `OBJ_Target`
    (T, F) without bias, `scale` (1,), and `fc_base` (F, F) with bias in the incremental setting. The layers before the
    block and the heads for boxes and objectness beside it (`base`, `Norm`, `extras`, `conf`, `loc`, `obj`) are no part
    of it. Training normalises the rows of `OBJ_Target` after each step; they are taken as they are stored.

    The norm has no epsilon: where z is exactly zero (score maps and biases of zeros), the scores are NaN, as in the
    official code. That code has pools for the six maps of a 300-pixel network only and fails at 512 pixels.

    Args:
        num_classes: source classes F; every box has F channels of its map, box after box.
        num_targets: target classes T.
        kernels: size and stride of the max-pool of each map; borders count as partial windows.
        incremental: whether scores of the source classes precede those of the target classes.
        chunk: boxes that attend at a time where sizes are static, which bounds the pairwise map without a plugin to
            chunk * m; None for all at once, which suits the plugin, because it never stores that map. All boxes attend
            at once where sizes are dynamic.

    Raises:
        ValueError: no class, no map, or a kernel or chunk below 1.
    """

    def __init__(
        self,
        num_classes: int = 60,
        num_targets: int = 20,
        kernels: Sequence[int] = (3, 2, 2, 2, 1, 1),
        *,
        incremental: bool = False,
        chunk: int | None = CHUNK,
    ) -> None:
        super().__init__()
        if min(num_classes, num_targets) < 1:
            raise ValueError(
                f"num_classes={num_classes}, num_targets={num_targets}: give at least 1 of each; 60 and 20 (transfer) "
                "and 15 and 5 (incremental) are published"
            )
        if not kernels or min(kernels) < 1:
            raise ValueError(f"kernels={tuple(kernels)}: give one pool size per map, at least 1 (which pools nothing)")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}: let at least 1 box attend at a time, or None for all")
        self.num_classes = num_classes
        self.kernels = tuple(kernels)
        self.chunk = chunk
        self.theta: nn.Module = ResidualLinear(num_classes)
        self.phi: nn.Module = ResidualLinear(num_classes)
        self.g: nn.Module = ResidualLinear(num_classes)
        self.Wz: nn.Parameter | None = nn.Parameter(torch.zeros(num_classes))
        self.OBJ_Target = nn.Linear(num_classes, num_targets, bias=False)
        self.scale: nn.Parameter | None = nn.Parameter(torch.full((1,), 5.0), requires_grad=False)
        self.fc_base: nn.Module | None = ResidualLinear(num_classes) if incremental else None
        self.attend = PixelAttentionCore()

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        """Classify every prior box.

        Args:
            maps: per scale, the confidence map (batch, boxes * F, height, width); the number of boxes at a position may
                differ between maps.

        Returns:
            Class probabilities (batch, n, T), or (batch, n, F + T) in the incremental setting; boxes map after map,
            row by row, all boxes of a position together.

        Raises:
            UserError: a number of maps other than that of the kernels, or channels that are no multiple of F.
        """
        if len(maps) != len(self.kernels):
            raise UserError(
                f"{len(maps)} maps came for {len(self.kernels)} pool sizes {self.kernels}. Give one per map as kernels."
            )
        for index, scores in enumerate(maps):
            if scores.shape[1] % self.num_classes:
                raise UserError(
                    f"map {index} has {scores.shape[1]} channels, no multiple of the {self.num_classes} source "
                    "classes. Give the confidence maps before any reordering, or set num_classes."
                )
        pooled = [
            scores if kernel == 1 else F.max_pool2d(scores, kernel, kernel, ceil_mode=True)
            for scores, kernel in zip(maps, self.kernels, strict=True)
        ]
        rows, context = self._rows(maps), self._rows(pooled)
        gathered = self._gather(self.theta(rows), self.phi(context), self.g(context))
        novel = rows + (gathered if self.Wz is None else gathered * self.Wz)
        logits = self.OBJ_Target(novel / novel.norm(dim=2, keepdim=True))
        if self.scale is not None:
            logits = logits * self.scale
        if self.fc_base is not None:
            logits = torch.cat([self.fc_base(rows), logits], dim=2)
        return logits.softmax(dim=2)

    def prepare_for_export(self) -> ContextTransformer:
        """Return a copy with one matrix for the energies, the residuals and Wz inside the projections, and the scale in
        OBJ_Target; the bias of phi is gone, because it adds the same to all energies of a box.
        """
        folded = copy.deepcopy(self)
        if not isinstance(self.phi, ResidualLinear) or self.Wz is None or self.scale is None:
            return folded
        assert isinstance(self.theta, ResidualLinear)
        assert isinstance(self.g, ResidualLinear)
        with torch.no_grad():
            on_key, _ = self.phi.affine()
            weight, bias = self.theta.affine()
            folded.theta = _linear(on_key.t() @ weight, on_key.t() @ bias)
            folded.phi = nn.Identity()
            weight, bias = self.g.affine()
            folded.g = _linear(self.Wz[:, None] * weight, self.Wz * bias)
            folded.Wz = None
            folded.OBJ_Target.weight.mul_(self.scale)
            folded.scale = None
            if isinstance(self.fc_base, ResidualLinear):
                folded.fc_base = _linear(*self.fc_base.affine())
        return folded

    def _gather(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend with rows (batch, n, F) to rows (batch, m, F); return (batch, n, F)."""
        boxes = query.shape[1]
        parts = [query]
        if self.chunk is not None and isinstance(boxes, int) and boxes > self.chunk:
            parts = [query[:, start : start + self.chunk] for start in range(0, boxes, self.chunk)]
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        gathered = [self.attend(part.transpose(1, 2), key, value).transpose(1, 2) for part in parts]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)

    def _rows(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Lay maps (batch, boxes * F, height, width) out as one matrix (batch, all boxes, F)."""
        batch = maps[0].shape[0]
        return torch.cat([scores.permute(0, 2, 3, 1).reshape(batch, -1, self.num_classes) for scores in maps], dim=1)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return a linear layer with a weight (out, in) and bias (out,) of its own."""
    linear = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


_BOXES = (6, 6, 6, 6, 4, 4)
"""Boxes at every position of RFBNet's six maps."""


def _inputs(num_classes: int) -> tuple[TensorInput, ...]:
    return tuple(
        TensorInput(f"conf_{index}", ("batch", boxes * num_classes, f"height_{index}", f"width_{index}"))
        for index, boxes in enumerate(_BOXES)
    )


def _sizes(batch: int, *grids: tuple[int, int]) -> Sizes:
    """Return the sizes of a batch and of the six maps."""
    sizes = {"batch": batch}
    for index, (height, width) in enumerate(grids):
        sizes |= {f"height_{index}": height, f"width_{index}": width}
    return sizes


_300 = _sizes(1, *((size, size) for size in (38, 19, 10, 5, 3, 1)))


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of a chunk's energies (chunk, m) and the queries (n, F)."""
    queries = keys = 0
    for index, (boxes, kernel) in enumerate(zip(_BOXES, (3, 2, 2, 2, 1, 1), strict=True)):
        height, width = sizes[f"height_{index}"], sizes[f"width_{index}"]
        queries += boxes * height * width
        keys += boxes * -(-height // kernel) * -(-width // kernel)
    return sizes["batch"] * max(min(queries, CHUNK) * keys, queries * arguments["num_classes"])


_TRANSFER: Arguments = {"num_classes": 60, "num_targets": 20}
_INCREMENTAL: Arguments = {"num_classes": 15, "num_targets": 5, "incremental": True}
_WHOLE_NETWORK = {r"^(?:base|Norm|extras|conf|loc|obj)\..*$": ""}
_TINY = _sizes(1, (3, 2), (2, 3), (2, 2), (2, 2), (2, 1), (1, 2))

BLOCKS.add(
    BlockSpec(
        name="context-transformer",
        title="Context-Transformer",
        paper="Context-Transformer: Tackling Object Confusion for Few-Shot Detection, AAAI 2020",
        year=2020,
        code="https://github.com/Ze-Yang/Context-Transformer",
        build=ContextTransformer,
        original="edgeattn.validation.originals.context_transformer:ContextTransformer",
        variants=(
            Variant(
                "official",
                _TRANSFER,
                key_map=_WHOLE_NETWORK,
                listings={"context_transformer": _TRANSFER},
                references={"context_transformer": _TRANSFER},
                published=Published("RFBNet300-VGG16, transfer from COCO to 20 classes of VOC", _TRANSFER, _300),
                overflow=Overflow(400.0, _TINY),
            ),
            Variant(
                "incremental",
                _INCREMENTAL,
                key_map=_WHOLE_NETWORK,
                references={"context_transformer_incremental": _INCREMENTAL},
                published=Published("RFBNet300-VGG16, VOC, 5 classes added to 15", _INCREMENTAL, _300),
                inputs=_inputs(15),
                overflow=Overflow(400.0, _TINY),
            ),
        ),
        largest=_largest,
        precision=(
            "energies (unscaled products of F scores, beyond 65504 from scores of about 40 on), the softmax over the "
            "context, the L2 norm (a sum of F squares), the division by it and the classifiers up to their softmax "
            "stay in FP32; the projections and what is gathered, which is an average, run in FP16"
        ),
        int8="the linear layers; the attention products stay in FP16; the convolutions before the block are quantised",
        inputs=_inputs(60),
        sizes=(
            _sizes(2, (4, 5), (3, 4), (2, 3), (3, 2), (2, 2), (3, 2)),
            _sizes(1, (7, 3), (5, 2), (3, 1), (1, 4), (2, 1), (1, 1)),
            _sizes(3, (2, 6), (1, 3), (4, 3), (2, 1), (1, 3), (1, 2)),
            _sizes(1, (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)),
        ),
    )
)
