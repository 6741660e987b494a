"""Long-term feature bank operators: non-local, average, maximum.

Paper: Wu et al., "Long-Term Feature Banks for Detailed Video Understanding", CVPR 2019 (arXiv 1812.05038).
Code: https://github.com/facebookresearch/video-long-term-feature-banks, `lib/models/lfb_helper.py` (Caffe2), and
https://github.com/open-mmlab/mmaction2, `mmaction/models/roi_heads/shared_heads/fbo_head.py`.

With s a short-term feature, L_m the slots of its bank, B_m = W_bank L_m + b_bank and a = W_short s + b_short, each
layer computes (with layer normalisation before the activation)

    a <- a + W_out relu(LN(sum_m p_m (W_g B_m + b_g))) + b_out
    p = softmax_m((W_theta a + b_theta)^T (W_phi B_m + b_phi) / sqrt(latent_channels))

and the operator returns [s, a]. Each short-term feature asks once, so it is cheaper to move its one query than all its
slots: with q = W_bank^T W_phi^T (W_theta a + b_theta) / sqrt(latent_channels),

    p = softmax_m(q^T L_m)                      (what b_bank and b_phi add is the same for every slot)
    sum_m p_m B_m = W_bank sum_m p_m L_m + b_bank                             (the p_m add up to 1)

and likewise with B_m in place of L_m. This is exact; no slot is ever projected, and one encoded bank serves as keys and
values of all layers. Slots without a feature are zero vectors; they stay in the softmax, as they do in training.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


class PointwiseProjection(nn.Module):
    """A 1x1x1 convolution, named `conv` as inside a ConvModule of mmcv, applied to rows.

    Args:
        in_channels: channels of a row.
        out_channels: channels of a projected row.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv: nn.Conv3d | nn.Linear = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map (..., in_channels) to (..., out_channels)."""
        return _project(self.conv, rows)

    def prepare_for_export(self) -> PointwiseProjection:
        """Return a copy with the convolution as a matrix."""
        folded = copy.deepcopy(self)
        folded.conv = _as_linear(folded.conv)
        return folded


class FeatureBankLayer(nn.Module):
    """One non-local layer between short-term features and their bank, without the residual.

    State names are mmaction2's: `st_feat_conv.conv` (theta), `lt_feat_conv.conv` (phi), `global_conv.conv` (g) and
    `out_conv.conv`, 1x1x1 convolutions with bias; `ln` (channels, 1, 1, 1), absent with `affine=False`.

    Args:
        st_feat_channels: channels of a short-term feature.
        lt_feat_channels: channels of a slot.
        latent_channels: channels of query, key and value.
        pre_activate: normalise and activate before the output projection; otherwise normalise after it.
        affine: whether the layer normalisation has parameters: yes in mmaction2, not in the official Caffe2 code.
    """

    def __init__(
        self,
        st_feat_channels: int,
        lt_feat_channels: int,
        latent_channels: int,
        pre_activate: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.pre_activate = pre_activate
        self.scale = latent_channels**-0.5
        self.st_feat_conv = PointwiseProjection(st_feat_channels, latent_channels)
        self.lt_feat_conv = PointwiseProjection(lt_feat_channels, latent_channels)
        self.global_conv = PointwiseProjection(lt_feat_channels, latent_channels)
        self.out_conv = PointwiseProjection(latent_channels, st_feat_channels)
        normalised = latent_channels if pre_activate else st_feat_channels
        self.ln = nn.LayerNorm((normalised, 1, 1, 1), elementwise_affine=affine)
        self.folded_query: nn.Linear | None = None

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Look a bank up.

        Args:
            short_term: (rois, st_feat_channels).
            bank: (banks, slots, lt_feat_channels), see `FeatureBankNonLocal.forward`.

        Returns:
            What the short-term features gain, (rois, st_feat_channels).
        """
        return self.update(_look_up(self.query(short_term), bank))

    def query(self, short_term: torch.Tensor) -> torch.Tensor:
        """Return what to compare with the slots as they are, (rois, lt_feat_channels), scale included."""
        if self.folded_query is not None:
            return self.folded_query(short_term)
        return _project_back(self.lt_feat_conv.conv, self.st_feat_conv(short_term) * self.scale)

    def update(self, context: torch.Tensor) -> torch.Tensor:
        """Return the gain (rois, st_feat_channels) from averaged slots (rois, lt_feat_channels)."""
        value = self.global_conv(context)
        if self.pre_activate:
            return self.out_conv(torch.relu(self._normalise(value)))
        return self._normalise(self.out_conv(value))

    def prepare_for_export(self) -> FeatureBankLayer:
        """Return a copy with theta, phi and the scale in one projection."""
        folded = copy.deepcopy(self)
        theta, phi = _as_linear(self.st_feat_conv.conv), _as_linear(self.lt_feat_conv.conv)
        with torch.no_grad():
            back = phi.weight.t() * self.scale
            theta.weight, theta.bias = nn.Parameter(back @ theta.weight), nn.Parameter(back @ theta.bias)
        folded.folded_query = theta
        return folded

    def _normalise(self, rows: torch.Tensor) -> torch.Tensor:
        weight, bias = (None, None) if self.ln.weight is None else (self.ln.weight.flatten(), self.ln.bias.flatten())
        return F.layer_norm(rows, (rows.shape[1],), weight, bias, self.ln.eps)


class FeatureBankNonLocal(nn.Module):
    """The non-local feature bank operator (FBO-NL).

    State names are mmaction2's: `st_feat_conv`, `lt_feat_conv`, `non_local_layer_1` and so on, see `FeatureBankLayer`.

    `forward` looks the raw bank up. Where a bank is kept while many short-term features pass, `encode_bank` runs once
    per bank and `attend` per feature: two graphs that together compute the same.

    Args:
        st_feat_channels: channels of a short-term feature.
        lt_feat_channels: channels of a slot.
        latent_channels: channels inside the layers.
        num_non_local_layers: number of layers, at least 1.
        pre_activate: as in `FeatureBankLayer`; without it, every layer ends with ReLU behind the residual.
        affine: as in `FeatureBankLayer`.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self,
        st_feat_channels: int,
        lt_feat_channels: int,
        latent_channels: int,
        num_non_local_layers: int = 2,
        pre_activate: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if num_non_local_layers < 1:
            raise ValueError(f"num_non_local_layers is {num_non_local_layers}. Give at least 1; 2 and 3 are published.")
        self.pre_activate = pre_activate
        self.st_feat_conv: nn.Conv3d | nn.Linear = nn.Conv3d(st_feat_channels, latent_channels, kernel_size=1)
        self.lt_feat_conv: nn.Conv3d | nn.Linear = nn.Conv3d(lt_feat_channels, latent_channels, kernel_size=1)
        self.layer_names = [f"non_local_layer_{index + 1}" for index in range(num_non_local_layers)]
        for name in self.layer_names:
            layer = FeatureBankLayer(latent_channels, latent_channels, latent_channels, pre_activate, affine)
            self.add_module(name, layer)

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Put what the bank holds beside every short-term feature.

        Args:
            short_term: (rois, st_feat_channels), one pooled feature per region of interest or clip.
            bank: (rois, slots, lt_feat_channels), or (1, slots, lt_feat_channels) where all regions share one bank;
                zero vectors where a slot has no feature.

        Returns:
            (rois, st_feat_channels + latent_channels): the short-term features, then the latent ones.
        """
        return self._run(short_term, bank, encoded=False)

    def encode_bank(self, bank: torch.Tensor) -> torch.Tensor:
        """Project a bank (banks, slots, lt_feat_channels) to (banks, slots, latent_channels) for `attend`."""
        return _project(self.lt_feat_conv, bank)

    def attend(self, short_term: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """Compute `forward` from what `encode_bank` returned."""
        return self._run(short_term, encoded, encoded=True)

    def prepare_for_export(self) -> FeatureBankNonLocal:
        """Return a copy with the outer convolutions as matrices."""
        folded = copy.deepcopy(self)
        folded.st_feat_conv, folded.lt_feat_conv = _as_linear(self.st_feat_conv), _as_linear(self.lt_feat_conv)
        return folded

    def _run(self, short_term: torch.Tensor, memory: torch.Tensor, *, encoded: bool) -> torch.Tensor:
        latent = _project(self.st_feat_conv, short_term)
        for name in self.layer_names:
            layer: FeatureBankLayer = getattr(self, name)
            query = layer.query(latent)
            if encoded:
                context = _look_up(query, memory)
            else:
                found = _look_up(_project_back(self.lt_feat_conv, query), memory)
                context = _project(self.lt_feat_conv, found)
            latent = latent + layer.update(context)
            if not self.pre_activate:
                latent = torch.relu(latent)
        return torch.cat([short_term, latent], dim=1)


class FeatureBankPool(nn.Module):
    """The pooling feature bank operators (FBO-Avg, FBO-Max); no parameters.

    Args:
        pool: "avg" or "max", over all slots, the empty ones included.

    Raises:
        ValueError: another `pool`.
    """

    def __init__(self, pool: str = "avg") -> None:
        super().__init__()
        if pool not in ("avg", "max"):
            raise ValueError(f'pool is {pool!r}. Give "avg" or "max", or use FeatureBankNonLocal.')
        self.pool = pool

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Put the pooled bank beside every short-term feature.

        Args:
            short_term: (rois, channels).
            bank: (rois, slots, bank_channels).

        Returns:
            (rois, channels + bank_channels).
        """
        pooled = bank.mean(dim=1) if self.pool == "avg" else bank.amax(dim=1)
        return torch.cat([short_term, pooled], dim=1)


def _as_linear(conv: nn.Conv3d | nn.Linear) -> nn.Linear:
    """Return a 1x1x1 convolution as a matrix with parameters of its own."""
    assert conv.bias is not None
    weight = conv.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(conv.bias.detach().clone())
    return linear


def _project(conv: nn.Conv3d | nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Apply a 1x1x1 convolution to rows (..., in_channels)."""
    return F.linear(rows, conv.weight.flatten(1), conv.bias)


def _project_back(conv: nn.Conv3d | nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Apply the transposed matrix of a 1x1x1 convolution to rows (..., out_channels), without bias."""
    return torch.matmul(rows, conv.weight.flatten(1))


def _look_up(query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return softmax(memory query)^T memory.

    Args:
        query: (rois, channels); the first rois / banks of them ask the first bank, and so on.
        memory: (banks, slots, channels).

    Returns:
        (rois, channels).
    """
    rows = query.reshape(memory.shape[0], -1, query.shape[1])
    weights = torch.matmul(rows, memory.transpose(1, 2)).softmax(dim=2)
    return torch.matmul(weights, memory).reshape(query.shape)


_PAPER = "Long-Term Feature Banks for Detailed Video Understanding, CVPR 2019"
_CODE = "https://github.com/facebookresearch/video-long-term-feature-banks, https://github.com/open-mmlab/mmaction2"
_PRECISION = "energies, softmax and layer normalisation stay in FP32 (sums over channels); all else runs in FP16"
_INT8 = "the projections; the attention products stay in FP16"
_SIZES: tuple[Sizes, ...] = (
    {"rois": 2, "slots": 7},
    {"rois": 1, "slots": 6},
    {"rois": 3, "slots": 11},
    {"rois": 5, "slots": 1},
)
_SMALL = {"st_feat_channels": 12, "lt_feat_channels": 10, "latent_channels": 8}
_FULL = {"st_feat_channels": 2048, "lt_feat_channels": 2048, "latent_channels": 512}
_SHORT = TensorInput("short_term", ("rois", "st_feat_channels"))
_BANK = TensorInput("bank", ("rois", "slots", "lt_feat_channels"))

_CAFFE2_LAYERS = {"theta": "st_feat_conv", "phi": "lt_feat_conv", "g": "global_conv", "out": "out_conv"}
_CAFFE2 = {
    **{rf"^.*_fbonl_reduc_{short}$": f"st_feat_conv.{name}" for short, name in (("w", "weight"), ("b", "bias"))},
    **{rf"^lfb_1x1_{short}$": f"lt_feat_conv.{name}" for short, name in (("w", "weight"), ("b", "bias"))},
    **{
        rf"^lfb_nl{index}_{blob}_{short}$": f"non_local_layer_{index + 1}.{projection}.conv.{name}"
        for index in range(3)
        for blob, projection in _CAFFE2_LAYERS.items()
        for short, name in (("w", "weight"), ("b", "bias"))
    },
}


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the attention and a projected query: the bank itself is never projected."""
    return sizes["rois"] * max(sizes["slots"], *(arguments[name] for name in _SMALL))


BLOCKS.add(
    BlockSpec(
        name="feature-bank",
        title="feature bank operator, non-local",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=FeatureBankNonLocal,
        original="edgeattn.validation.originals.feature_bank:FeatureBankNonLocal",
        variants=(
            Variant(
                "official",
                {**_SMALL, "affine": False},
                key_map=_CAFFE2,
                published=Published(
                    "I3D-NL, AVA: window of 60 s, 5 regions, each with 300 slots",
                    {**_FULL, "affine": False},
                    {"rois": 5, "slots": 300},
                ),
                overflow=Overflow(600.0, {"rois": 3, "slots": 7}),
            ),
            Variant("charades", {**_SMALL, "affine": False, "pre_activate": False}, key_map=_CAFFE2),
            Variant(
                "mmaction2",
                _SMALL,
                key_map={r"^roi_head\.shared_head\.fbo\.": ""},
                references={
                    "mmaction2_fbo_nonlocal": {**_SMALL, "num_non_local_layers": 3},
                    "mmaction2_fbo_nonlocal_post": {**_SMALL, "pre_activate": False},
                },
            ),
            Variant(
                "shared-bank",
                {**_SMALL, "affine": False},
                key_map=_CAFFE2,
                inputs=(_SHORT, TensorInput("bank", (1, "slots", "lt_feat_channels"))),
            ),
            Variant(
                "bank-encoder", {**_SMALL, "affine": False}, key_map=_CAFFE2, inputs=(_BANK,), method="encode_bank"
            ),
            Variant(
                "encoded-bank",
                {**_SMALL, "affine": False},
                key_map=_CAFFE2,
                inputs=(_SHORT, TensorInput("encoded", ("rois", "slots", "latent_channels"))),
                method="attend",
            ),
        ),
        largest=_largest,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(_SHORT, _BANK),
        sizes=_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="feature-bank-layer",
        title="non-local layer of the feature bank operator",
        paper=_PAPER,
        year=2019,
        code="https://github.com/open-mmlab/mmaction2",
        build=FeatureBankLayer,
        original="edgeattn.validation.originals.feature_bank:FeatureBankLayer",
        variants=(
            Variant(
                "official",
                _SMALL,
                listings={
                    "mmaction2_fbo_nl": {
                        "st_feat_channels": 512,
                        "lt_feat_channels": 512,
                        "latent_channels": 512,
                    }
                },
                references={"mmaction2_fbo_layer": _SMALL},
                overflow=Overflow(600.0, {"rois": 3, "slots": 7}),
            ),
        ),
        largest=_largest,
        precision=_PRECISION,
        int8=_INT8,
        inputs=(_SHORT, _BANK),
        sizes=_SIZES,
    )
)

BLOCKS.add(
    BlockSpec(
        name="feature-bank-pool",
        title="feature bank operator, average and maximum",
        paper=_PAPER,
        year=2019,
        code=_CODE,
        build=FeatureBankPool,
        original="edgeattn.validation.originals.feature_bank:FeatureBankPool",
        variants=tuple(
            Variant(
                pool,
                {"pool": pool},
                references={f"mmaction2_fbo_{pool}": {"pool": pool}},
                published=Published(
                    "I3D-NL, AVA: window of 60 s, 5 regions, each with 300 slots",
                    {"pool": pool},
                    {"rois": 5, "slots": 300, "channels": 2048, "bank_channels": 2048},
                ),
            )
            for pool in ("avg", "max")
        ),
        largest=lambda arguments, sizes: sizes["rois"] * sizes["bank_channels"],
        precision="the average stays in FP32 (it sums over the slots); the maximum needs no digits of its own",
        int8="the linear layers; the attention products stay in FP16",
        inputs=(
            TensorInput("short_term", ("rois", "channels")),
            TensorInput("bank", ("rois", "slots", "bank_channels")),
        ),
        sizes=tuple({**sizes, "channels": 6, "bank_channels": 4 + index} for index, sizes in enumerate(_SIZES)),
    )
)
