"""Double attention: gather descriptors of the whole map, distribute them to every position.

Paper: Chen et al., "A2-Nets: Double Attention Networks", NeurIPS 2018 (arXiv 1810.11579).
Code: https://github.com/nguyenvo09/Double-Attention-Network, `double_attention_layer.py`;
https://github.com/xmu-xiaoma666/External-Attention-pytorch, `model/attention/A2Atttention.py`. The authors published
no PyTorch code.

    A = convA(x) (c_m, N)    B = softmax_N(convB(x)) (c_n, N)    V = softmax_c_n(convV(x)) (c_n, N)
    Z = (A B^T) V            out = conv_reconstruct(Z), or Z itself
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

SOFTMAX_AXES = {"paper": (2, 1), "legacy_batch": (0, 0)}
"""Axes of (batch, c_n, positions) over which the maps B and the vectors V are normalised, by name."""


def _gather_and_distribute(
    features: torch.Tensor,
    maps: torch.Tensor,
    vectors: torch.Tensor,
    size: tuple[int, ...],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the position-wise mixture of gathered descriptors, through a 1x1 convolution where one is given."""
    mixture = torch.matmul(torch.matmul(features, maps.transpose(1, 2)), vectors)
    mixture = mixture.reshape(*features.shape[:2], *size)
    return mixture if weight is None else nn.functional.conv2d(mixture, weight, bias)


class DoubleAttention(nn.Module):
    """Double attention; no residual is added, in the published code nor here.

    State names are those of both public implementations: `convA` (c_m), `convB` and `convV` (c_n), and
    `conv_reconstruct` (in_channels) where asked for, all 1x1 with bias.

    Quirk: the second implementation leaves the softmax axis out, and torch then takes the first of three, the batch:
    `softmax_axes="legacy_batch"`. Its result for one image depends on the others of the batch; alone in a batch, every
    weight is 1. The batch may still be dynamic in an export, with that meaning.

    Args:
        in_channels: channels of the input.
        c_m: channels of a descriptor.
        c_n: number of descriptors.
        reconstruct: whether a last convolution leads back to `in_channels`.
        softmax_axes: a name of `SOFTMAX_AXES`: what the weights were trained with.

    Raises:
        ValueError: an unknown `softmax_axes`.
    """

    def __init__(
        self, in_channels: int, c_m: int, c_n: int, reconstruct: bool = False, softmax_axes: str = "paper"
    ) -> None:
        super().__init__()
        if softmax_axes not in SOFTMAX_AXES:
            known = ", ".join(map(repr, SOFTMAX_AXES))
            raise ValueError(f"softmax_axes of double attention is {softmax_axes!r}. Give one of {known}.")
        self.maps_axis, self.vectors_axis = SOFTMAX_AXES[softmax_axes]
        self.convA = nn.Conv2d(in_channels, c_m, kernel_size=1)
        self.convB = nn.Conv2d(in_channels, c_n, kernel_size=1)
        self.convV = nn.Conv2d(in_channels, c_n, kernel_size=1)
        self.conv_reconstruct = nn.Conv2d(c_m, in_channels, kernel_size=1) if reconstruct else None
        # Weights over the batch do not sum to 1 over positions or descriptors, so the sums have no bound.
        bounded = softmax_axes == "paper"
        self.gather_and_distribute = _gather_and_distribute if bounded else Fp32Step(_gather_and_distribute)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to the same, or to c_m channels without `conv_reconstruct`."""
        features = self.convA(x).flatten(2)
        maps = self.convB(x).flatten(2).softmax(dim=self.maps_axis)
        vectors = self.convV(x).flatten(2).softmax(dim=self.vectors_axis)
        last = self.conv_reconstruct
        state = () if last is None else (last.weight, last.bias)
        out: torch.Tensor = self.gather_and_distribute(features, maps, vectors, x.shape[2:], *state)
        return out


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of the projections and the descriptors."""
    c_m, c_n = arguments["c_m"], arguments["c_n"]
    return int(sizes["batch"] * max(sizes["height"] * sizes["width"] * max(c_m, c_n), c_m * c_n))


BLOCKS.add(
    BlockSpec(
        name="double-attention",
        title="double attention",
        paper="A2-Nets: Double Attention Networks, NeurIPS 2018",
        year=2018,
        code="https://github.com/nguyenvo09/Double-Attention-Network, "
        "https://github.com/xmu-xiaoma666/External-Attention-pytorch",
        build=DoubleAttention,
        original="edgeattn.validation.originals.double_attention:DoubleAttention",
        variants=(
            Variant(
                "paper",
                {"in_channels": 8, "c_m": 6, "c_n": 4, "reconstruct": True},
                listings={"a2_double": {"in_channels": 512, "c_m": 128, "c_n": 128, "reconstruct": True}},
                references={
                    "a2_double": {"in_channels": 8, "c_m": 6, "c_n": 4, "reconstruct": True},
                    "a2_plain": {"in_channels": 8, "c_m": 6, "c_n": 4},
                },
                published=Published(
                    "A2-Net, ResNet-50 stage 4, ImageNet 224x224",
                    {"in_channels": 1024, "c_m": 256, "c_n": 256, "reconstruct": True},
                    {"batch": 1, "height": 14, "width": 14},
                ),
            ),
            Variant(
                "legacy-batch",
                {"in_channels": 8, "c_m": 6, "c_n": 4, "reconstruct": True, "softmax_axes": "legacy_batch"},
                listings={
                    "xmu_a2": {
                        "in_channels": 512,
                        "c_m": 128,
                        "c_n": 128,
                        "reconstruct": True,
                        "softmax_axes": "legacy_batch",
                    }
                },
                references={
                    "xmu_a2": {
                        "in_channels": 8,
                        "c_m": 6,
                        "c_n": 4,
                        "reconstruct": True,
                        "softmax_axes": "legacy_batch",
                    }
                },
                overflow=Overflow(
                    2000.0,
                    {"batch": 1, "height": 16, "width": 16},
                    state={r"conv_reconstruct\.weight": 0.01},
                ),
            ),
        ),
        largest=_largest,
        precision="softmaxes stay in FP32; with weights over the batch also both sums and the last convolution: such "
        "weights do not sum to 1, and the sums grow with the number of positions",
        int8="the four 1x1 convolutions; the products with the attention maps stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)
