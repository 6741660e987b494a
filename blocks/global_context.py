"""Global context block (GCNet): one attention map for all positions, a bottleneck, and a broadcast.

Paper: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCVW 2019
(arXiv 1904.11492). Code: https://github.com/xvjiarui/GCNet, `mmdet/ops/gcb/context_block.py`;
https://github.com/open-mmlab/mmcv, `mmcv/cnn/bricks/context_block.py`.

    c = sum_n softmax_N(conv_mask(x))_n x_n    T(c) = W2 ReLU(LN(W1 c))
    out = x sigmoid(T_mul(c)) + T_add(c), either of the two or both
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant

POOLING_TYPES = ("att", "avg")
FUSION_TYPES = ("channel_add", "channel_mul")


class ContextBlock(nn.Module):
    """Global context block; x is scaled first, then added to, in whatever order the fusions are named.

    State names and shapes are the official ones: `conv_mask` (1 channel, only with pooling "att"), and for each fusion
    `channel_add_conv` or `channel_mul_conv` with `0` (planes), `1` (LayerNorm over all planes), `3` (inplanes).
    mmcv calls the first argument `in_channels`; its state is the same.

    `conv_mask.bias` is loaded and saved but not used: a softmax does not change when all its inputs shift.

    Args:
        inplanes: channels of the input.
        ratio: planes of the bottleneck relative to `inplanes`.
        pooling_type: "att" (softmax over positions) or "avg".
        fusion_types: some of `FUSION_TYPES`.

    Raises:
        ValueError: an unknown pooling or fusion, no fusion, or a ratio that leaves no plane.
    """

    def __init__(
        self,
        inplanes: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
    ) -> None:
        super().__init__()
        if pooling_type not in POOLING_TYPES:
            raise ValueError(f"pooling_type of a context block is {pooling_type!r}. Give one of {POOLING_TYPES}.")
        if isinstance(fusion_types, str) or not fusion_types or not set(fusion_types) <= set(FUSION_TYPES):
            raise ValueError(f"fusion_types of a context block is {fusion_types!r}. Give some of {FUSION_TYPES}.")
        planes = int(inplanes * ratio)
        if planes < 1:
            raise ValueError(f"ratio of a context block is {ratio}. Give at least 1 / inplanes = 1 / {inplanes}.")
        self.conv_mask = nn.Conv2d(inplanes, 1, kernel_size=1) if pooling_type == "att" else None
        self.channel_add_conv = _bottleneck(inplanes, planes) if "channel_add" in fusion_types else None
        self.channel_mul_conv = _bottleneck(inplanes, planes) if "channel_mul" in fusion_types else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inplanes, height, width) to the same shape, for any height and width."""
        context = self.context(x)
        if self.channel_mul_conv is not None:
            x = x * _transform(self.channel_mul_conv, context).sigmoid()
        if self.channel_add_conv is not None:
            x = x + _transform(self.channel_add_conv, context)
        return x

    def context(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (batch, inplanes, height, width) to (batch, inplanes)."""
        if self.conv_mask is None:
            return x.mean(dim=(2, 3))
        flat = x.flatten(2)
        # As a product of a row with x this is three times as fast in ONNX Runtime as a convolution to one channel.
        attention = torch.matmul(self.conv_mask.weight.flatten(1), flat).softmax(dim=2)
        return torch.matmul(flat, attention.flatten(1)[:, :, None]).flatten(1)


def _bottleneck(inplanes: int, planes: int) -> nn.Sequential:
    """Return the parameters of W2 ReLU(LN(W1 c)) under their official names."""
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, kernel_size=1),
        nn.LayerNorm([planes, 1, 1]),
        nn.ReLU(),
        nn.Conv2d(planes, inplanes, kernel_size=1),
    )


def _transform(bottleneck: nn.Sequential, context: torch.Tensor) -> torch.Tensor:
    """Apply a bottleneck to vectors (batch, inplanes) and return (batch, inplanes, 1, 1), to be broadcast."""
    state = dict(bottleneck.named_parameters())
    hidden = functional.linear(context, state["0.weight"].flatten(1), state["0.bias"])
    hidden = functional.layer_norm(hidden, hidden.shape[1:], state["1.weight"].flatten(), state["1.bias"].flatten())
    return functional.linear(hidden.relu(), state["3.weight"].flatten(1), state["3.bias"])[:, :, None, None]


_BOTH = ("channel_add", "channel_mul")

BLOCKS.add(
    BlockSpec(
        name="global-context",
        title="global context block",
        paper="GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, ICCVW 2019",
        year=2019,
        code="https://github.com/xvjiarui/GCNet, https://github.com/open-mmlab/mmcv",
        build=ContextBlock,
        original="edgeattn.validation.originals.global_context:ContextBlock",
        variants=(
            Variant(
                "add",
                {"inplanes": 8, "ratio": 0.5},
                listings={
                    "gcnet_cb_add": {"inplanes": 1024, "ratio": 1 / 16},
                    "mmcv_contextblock": {"inplanes": 1024, "ratio": 1 / 16},
                },
                references={
                    "gcnet_cb_add": {"inplanes": 8, "ratio": 0.5},
                    "mmcv_contextblock": {"inplanes": 8, "ratio": 0.5},
                },
                published=Published(
                    "Mask R-CNN, ResNet-50-FPN, stage 4, COCO 1333x800",
                    {"inplanes": 1024, "ratio": 1 / 16},
                    {"batch": 1, "height": 50, "width": 84},
                ),
                overflow=Overflow(300.0, {"batch": 1, "height": 5, "width": 7}, state={r"conv_mask\.weight": 200.0}),
            ),
            Variant(
                "mul",
                {"inplanes": 8, "ratio": 0.5, "fusion_types": ("channel_mul",)},
                listings={"gcnet_cb_mul": {"inplanes": 1024, "ratio": 1 / 16, "fusion_types": ("channel_mul",)}},
                references={"gcnet_cb_mul": {"inplanes": 8, "ratio": 0.5, "fusion_types": ("channel_mul",)}},
            ),
            Variant(
                "add-mul-avg",
                {"inplanes": 8, "ratio": 0.5, "pooling_type": "avg", "fusion_types": _BOTH},
                listings={
                    "gcnet_cb_addmul_avg": {
                        "inplanes": 1024,
                        "ratio": 1 / 16,
                        "pooling_type": "avg",
                        "fusion_types": _BOTH,
                    }
                },
                references={
                    "gcnet_cb_addmul_avg": {
                        "inplanes": 8,
                        "ratio": 0.5,
                        "pooling_type": "avg",
                        "fusion_types": _BOTH,
                    }
                },
            ),
        ),
        largest=lambda arguments, sizes: sizes["batch"] * arguments["inplanes"] * sizes["height"] * sizes["width"],
        precision="the logits of the attention and its softmax, the average over positions and the LayerNorm stay in "
        "FP32; the sum over positions with softmax weights and the fusion run in FP16",
        int8="nothing: the block has no convolution of more than one position, and is bound by memory",
        inputs=(TensorInput("x", ("batch", "inplanes", "height", "width")),),
    )
)
