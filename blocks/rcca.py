"""The recurrent criss-cross attention head of CCNet.

Paper: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019 (arXiv 1811.11721).
Code: https://github.com/speedinghzl/CCNet, `networks/ccnet.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.blocks.abn import ABN
from edgeattn.blocks.criss_cross import CCNET, CODE, PRECISION, CrissCrossAttention, largest_of_cross
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Published, TensorInput, Variant


class RCCAModule(nn.Module):
    """Criss-cross attention applied `recurrence` times with shared weights, between convolutions, to class logits.

    State names are the official ones (`conva`, `cca`, `convb`, `bottleneck`); normalisation is `ABN` (leaky 0.01).

    Args:
        in_channels: channels of the backbone's last stage, a multiple of 4; the attention works on a quarter of them.
        out_channels: channels of the bottleneck.
        num_classes: number of output logits.
        recurrence: how often the attention is applied; 2 reaches every pixel from every pixel.

    Raises:
        ValueError: recurrence below 1.
    """

    def __init__(self, in_channels: int, out_channels: int, num_classes: int, recurrence: int = 2) -> None:
        super().__init__()
        if recurrence < 1:
            raise ValueError(f"the recurrence of criss-cross attention is at least 1, got {recurrence}")
        inner = in_channels // 4
        self.recurrence = recurrence
        self.conva = nn.Sequential(nn.Conv2d(in_channels, inner, 3, padding=1, bias=False), ABN(inner))
        self.cca = CrissCrossAttention(inner)
        self.convb = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, bias=False), ABN(inner))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels + inner, out_channels, 3, padding=1, bias=False),
            ABN(out_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, num_classes, kernel_size=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map features (batch, in_channels, height, width) to logits (batch, num_classes, height, width)."""
        attended = self.conva(x)
        for _ in range(self.recurrence):
            attended = self.cca(attended)
        return self.bottleneck(torch.cat([x, self.convb(attended)], dim=1))


BLOCKS.add(
    BlockSpec(
        name="rcca",
        title="recurrent criss-cross attention head",
        paper=CCNET,
        year=2019,
        code=CODE,
        build=RCCAModule,
        original="edgeattn.validation.originals.rcca:RCCAModule",
        variants=(
            Variant(
                "official",
                {"in_channels": 64, "out_channels": 16, "num_classes": 5, "recurrence": 2},
                listings={"ccnet_rcca": {"in_channels": 2048, "out_channels": 512, "num_classes": 19}},
                published=Published(
                    "CCNet, ResNet-101, Cityscapes 769x769",
                    {"in_channels": 2048, "out_channels": 512, "num_classes": 19, "recurrence": 2},
                    {"batch": 1, "height": 97, "width": 97},
                ),
            ),
        ),
        largest=lambda arguments, sizes: max(
            largest_of_cross(arguments["in_channels"] // 4, sizes),
            (arguments["in_channels"] + arguments["in_channels"] // 4)
            * (sizes["batch"] * sizes["height"] * sizes["width"]),
        ),
        precision=PRECISION,
        int8="all convolutions; the attention products stay in FP16",
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)
