"""SAGAN self-attention in the three forms that trained generators come in, with spectral norms frozen at export.

Paper: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019 (arXiv 1805.08318).
Code: https://github.com/brain-research/self-attention-gan, `non_local.py`, and https://github.com/ajbrock/BigGAN-PyTorch,
`layers.py` (pooled); https://github.com/heykeetae/Self-Attention-GAN, `sagan_models.py` (full);
https://github.com/rosinality/sagan-pytorch, `model.py` (over queries). The three do not compute the same:

    pooled:        y = x + gamma * W_o (pool(g) softmax_keys(theta^T pool(phi))^T)
    full:          y = x + gamma * value softmax_keys(query^T key)^T
    over queries:  y = x + gamma * value softmax_queries(query^T key)
    spectral norm: W <- W / |W v| with v = W^T u / |W^T u| and u as stored
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.folding import fold_gamma
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError


def spectral_norm(weight: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Estimate the largest singular value of a weight by one power iteration.

    Args:
        weight: (out, in, ...), read as a matrix (out, everything else).
        left: stored left singular vector (out,); it is not updated.

    Returns:
        The estimate, shape ().
    """
    matrix = weight.flatten(1)
    right = F.normalize(torch.mv(matrix.t(), left), dim=0)
    return torch.linalg.vector_norm(torch.mv(matrix, right))


class SpectralConv2d(nn.Conv2d):
    """1x1 convolution without bias, its weight divided by its spectral norm.

    State beside `weight`, from BigGAN-PyTorch: `u0` (1, out), where the power iteration starts, and `sv0` (1,), the
    singular value of the last training step, which evaluation does not read.

    Args:
        in_channels: input channels.
        out_channels: output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)
        self.u0: torch.Tensor
        self.register_buffer("u0", torch.randn(1, out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""
        return F.conv2d(x, self.weight / spectral_norm(self.weight, self.u0[0]))

    def frozen(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same."""
        plain = nn.Conv2d(self.in_channels, self.out_channels, kernel_size=1, bias=False)
        plain.weight = nn.Parameter((self.weight / spectral_norm(self.weight, self.u0[0])).detach())
        return plain


class PooledSelfAttention(nn.Module):
    """SAGAN self-attention of the paper's own code, BigGAN and mmgeneration: keys and values are 2x2 max-pooled.

    State names are those of BigGAN-PyTorch: `theta`, `phi` (channels // 8), `g` (channels // 2) and `o` with `weight`,
    `u0` and `sv0` each, `gamma` (). An odd last row or column takes no part in the pooled keys. In evaluation every
    spectral norm is one power iteration from the stored `u0`, which stays as it is.

    Args:
        channels: number of input and output channels, at least 8.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_channels("channels", channels)
        self.theta: nn.Conv2d = SpectralConv2d(channels, channels // 8)
        self.phi: nn.Conv2d = SpectralConv2d(channels, channels // 8)
        self.g: nn.Conv2d = SpectralConv2d(channels, channels // 2)
        self.o: nn.Conv2d = SpectralConv2d(channels // 2, channels)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(()))
        self.core = PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to the same shape, for any height and width from 2 on.

        Raises:
            UserError: height or width is 1, so that no key is left after pooling.
        """
        height, width = x.shape[2:]
        if height < 2 or width < 2:
            raise UserError(
                "pooled self-attention has no key left when height or width is below 2: its keys are 2x2 max-pooled. "
                f"Give a map of at least 2x2 instead of {height}x{width}."
            )
        key = F.max_pool2d(self.phi(x), 2).flatten(2)
        value = F.max_pool2d(self.g(x), 2).flatten(2)
        attended = self.o(self.core(self.theta(x).flatten(2), key, value).unflatten(2, (height, width)))
        return x + (attended if self.gamma is None else self.gamma * attended)

    def prepare_for_export(self) -> PooledSelfAttention:
        """Return a copy with plain convolutions, divided by their spectral norms; gamma is folded into `o`."""
        folded = copy.deepcopy(self)
        for name, conv in list(folded.named_children()):
            if isinstance(conv, SpectralConv2d):
                setattr(folded, name, conv.frozen())
        fold_gamma(folded.gamma, folded.o)
        folded.gamma = None
        return folded


def pooled_state_from_tensorflow(variables: Mapping[str, torch.Tensor], scope: str) -> dict[str, torch.Tensor]:
    """Convert the official TensorFlow variables to the state of `PooledSelfAttention`.

    TensorFlow stores `sn_conv_{theta,phi,g,attn}/w` as (1, 1, in, out), which renaming cannot turn around.

    Args:
        variables: tensors by the checkpoint's names; others are ignored.
        scope: where the block lies, such as "generator/g_non_local".

    Returns:
        The state for `load_state_dict`; `sv0`, which evaluation does not read, is 1.

    Raises:
        UserError: a variable of the block is missing.
    """
    state = {}
    try:
        for name, published in (("theta", "theta"), ("phi", "phi"), ("g", "g"), ("o", "attn")):
            prefix = f"{scope}/sn_conv_{published}"
            state[f"{name}.weight"] = variables[f"{prefix}/w"].permute(3, 2, 0, 1).contiguous()
            state[f"{name}.u0"] = variables[f"{prefix}/u"]
            state[f"{name}.sv0"] = torch.ones(1)
        state["gamma"] = variables[f"{scope}/sigma_ratio"]
    except KeyError as error:
        raise UserError(
            f"the TensorFlow variable {error} is missing. Give the scope whose variables are "
            f"sn_conv_theta/w and the like, instead of {scope!r}."
        ) from error
    return state


class FullSelfAttention(nn.Module):
    """SAGAN self-attention of heykeetae: no pooling, no output convolution, no spectral norm inside.

    State names and shapes are the published ones: `query_conv`, `key_conv` (in_dim // 8), `value_conv`, all with bias,
    `gamma` (1,).

    Args:
        in_dim: number of input and output channels, at least 8.
        return_attention: also return the attention map, as the published module does. The map is
            (batch, positions, positions) and then has to be stored; without it, it never needs to be.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, in_dim: int, return_attention: bool = False) -> None:
        super().__init__()
        _check_channels("in_dim", in_dim)
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(1))
        self.core = None if return_attention else PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend from every position to every position.

        Args:
            x: (batch, in_dim, height, width), any height and width.

        Returns:
            The result, shaped as `x`; with `return_attention` also the weights (batch, positions, positions), each row
            one query.
        """
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        if self.core is not None:
            return self._joined(self.core(query, key, value), x)
        attention = torch.matmul(query.transpose(1, 2), key).softmax(dim=2)
        return self._joined(torch.matmul(value, attention.transpose(1, 2)), x), attention

    def prepare_for_export(self) -> FullSelfAttention:
        """Return a copy whose value convolution carries gamma (exact: attention is linear in the values)."""
        folded = copy.deepcopy(self)
        fold_gamma(folded.gamma, folded.value_conv)
        folded.gamma = None
        return folded

    def _joined(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gate the attended features (batch, in_dim, positions) and add them to the input."""
        gated = attended if self.gamma is None else self.gamma * attended
        return x + gated.reshape(x.shape)


class SpectralConv1d(nn.Conv1d):
    """1x1 convolution of flat maps, its weight divided by its spectral norm.

    State, from rosinality: `weight_orig` (out, in, 1), `bias`, `weight_u` (out,), where the power iteration starts, and
    the buffer `weight`, which the published code overwrites in every call and nobody reads.

    Args:
        in_channels: input channels.
        out_channels: output channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)
        self.weight_orig = nn.Parameter(self.weight.detach())
        del self.weight
        self.weight_u: torch.Tensor
        self.register_buffer("weight", torch.zeros_like(self.weight_orig))
        self.register_buffer("weight_u", torch.randn(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, positions) to (batch, out_channels, positions)."""
        return F.conv1d(x, self.weight_orig / spectral_norm(self.weight_orig, self.weight_u), self.bias)

    def frozen(self) -> nn.Conv1d:
        """Return the plain convolution that computes the same."""
        plain = nn.Conv1d(self.in_channels, self.out_channels, kernel_size=1)
        plain.weight = nn.Parameter((self.weight_orig / spectral_norm(self.weight_orig, self.weight_u)).detach())
        plain.bias = copy.deepcopy(self.bias)
        return plain


class SelfAttentionOverQueries(nn.Module):
    """SAGAN self-attention of rosinality: the softmax runs over the queries, and spectral norms are inside.

    Normalising value @ softmax over queries is ordinary attention with query and key exchanged, which is how it is
    computed. The published code moves `weight_u` one power iteration on in every call, in evaluation too, so that its
    results drift from call to call; here, as in its first call after loading, the stored `weight_u` counts.

    State names and shapes are the published ones: `query`, `key` (in_channel // 8) and `value` with `weight_orig`,
    `weight`, `weight_u` and `bias` each (see `SpectralConv1d`), `gamma` ().

    Args:
        in_channel: number of input and output channels, at least 8.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, in_channel: int) -> None:
        super().__init__()
        _check_channels("in_channel", in_channel)
        self.query: nn.Conv1d = SpectralConv1d(in_channel, in_channel // 8)
        self.key: nn.Conv1d = SpectralConv1d(in_channel, in_channel // 8)
        self.value: nn.Conv1d = SpectralConv1d(in_channel, in_channel)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.zeros(()))
        self.core = PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channel, height, width) to the same shape, for any height and width."""
        flat = x.flatten(2)
        attended = self.core(self.key(flat), self.query(flat), self.value(flat))
        return x + (attended if self.gamma is None else self.gamma * attended).reshape(x.shape)

    def prepare_for_export(self) -> SelfAttentionOverQueries:
        """Return a copy with plain convolutions, divided by their spectral norms; gamma is folded into `value`."""
        folded = copy.deepcopy(self)
        for name, conv in list(folded.named_children()):
            if isinstance(conv, SpectralConv1d):
                setattr(folded, name, conv.frozen())
        fold_gamma(folded.gamma, folded.value)
        folded.gamma = None
        return folded


def _check_channels(name: str, channels: int) -> None:
    if channels < 8:
        raise ValueError(
            f"{name} is {channels}, but queries have {name} // 8 channels. Give at least 8, as in the checkpoint."
        )


_PAPER = "Self-Attention Generative Adversarial Networks, ICML 2019"
_PRECISION = "energies and softmax stay in FP32 (dot products overflow); the sum over values runs in FP16"
_INT8 = "the projections; the attention products stay in FP16"
_OVERFLOW = Overflow(400.0, {"batch": 1, "height": 5, "width": 7})


def _largest(keys: int, channels: int, sizes: Sizes) -> int:
    """Return the elements of the larger of the attention (batch, positions, keys) and a feature map."""
    return sizes["batch"] * sizes["height"] * sizes["width"] * max(keys, channels)


def _largest_pooled(arguments: Arguments, sizes: Sizes) -> int:
    return _largest((sizes["height"] // 2) * (sizes["width"] // 2), arguments["channels"], sizes)


BLOCKS.add(
    BlockSpec(
        name="sagan",
        title="SAGAN self-attention, pooled keys",
        paper=_PAPER,
        year=2019,
        code="https://github.com/brain-research/self-attention-gan, https://github.com/ajbrock/BigGAN-PyTorch, "
        "https://github.com/open-mmlab/mmgeneration",
        build=PooledSelfAttention,
        original="edgeattn.validation.originals.sagan:PooledSelfAttention",
        variants=(
            Variant(
                "official",
                {"channels": 16},
                listings={"biggan_attn": {"channels": 256}},
                references={"biggan_attn": {"channels": 16}},
                published=Published(
                    "SAGAN, generator with attention after block 4, ImageNet 128x128",
                    {"channels": 128},
                    {"batch": 1, "height": 64, "width": 64},
                ),
                overflow=_OVERFLOW,
            ),
            Variant("mmgen", {"channels": 16}, key_map={r"\b(theta|phi|g|o)\.conv\.": r"\1."}),
        ),
        largest=_largest_pooled,
        precision=_PRECISION,
        int8=_INT8,
        sizes=(
            {"batch": 2, "height": 5, "width": 7},
            {"batch": 1, "height": 8, "width": 6},
            {"batch": 3, "height": 3, "width": 11},
            {"batch": 1, "height": 2, "width": 2},
        ),
    )
)

BLOCKS.add(
    BlockSpec(
        name="sagan-full",
        title="SAGAN self-attention, all keys",
        paper=_PAPER,
        year=2019,
        code="https://github.com/heykeetae/Self-Attention-GAN",
        build=FullSelfAttention,
        original="edgeattn.validation.originals.sagan:FullSelfAttention",
        variants=(
            Variant(
                "official",
                {"in_dim": 16},
                listings={"sagan_heykeetae": {"in_dim": 128}},
                published=Published(
                    "SAGAN 64x64, attn2 of the generator, CelebA",
                    {"in_dim": 64},
                    {"batch": 1, "height": 32, "width": 32},
                ),
                overflow=_OVERFLOW,
            ),
            Variant(
                "with-attention",
                {"in_dim": 16, "return_attention": True},
                references={"sagan_heykeetae": {"in_dim": 16, "return_attention": True}},
            ),
        ),
        largest=lambda arguments, sizes: _largest(sizes["height"] * sizes["width"], arguments["in_dim"], sizes),
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("x", ("batch", "in_dim", "height", "width")),),
    )
)

BLOCKS.add(
    BlockSpec(
        name="sagan-over-queries",
        title="SAGAN self-attention, softmax over queries",
        paper=_PAPER,
        year=2019,
        code="https://github.com/rosinality/sagan-pytorch",
        build=SelfAttentionOverQueries,
        original="edgeattn.validation.originals.sagan:SelfAttentionOverQueries",
        variants=(
            Variant(
                "official",
                {"in_channel": 16},
                listings={"sagan_rosinality": {"in_channel": 128}},
                references={"sagan_rosinality": {"in_channel": 16}},
                published=Published(
                    "SAGAN 128x128 of rosinality, attention at 32x32",
                    {"in_channel": 128},
                    {"batch": 1, "height": 32, "width": 32},
                ),
                overflow=_OVERFLOW,
            ),
        ),
        largest=lambda arguments, sizes: _largest(sizes["height"] * sizes["width"], arguments["in_channel"], sizes),
        precision=_PRECISION,
        int8=_INT8,
        inputs=(TensorInput("x", ("batch", "in_channel", "height", "width")),),
    )
)
