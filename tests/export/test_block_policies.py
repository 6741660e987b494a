"""What the blocks inside a network keep out of INT8."""

from __future__ import annotations

import torch
from torch import nn

from edgeattn.blocks.squeeze_excitation import SqueezeExcitation
from edgeattn.export.block_policies import declared_exclusions
from edgeattn.export.int8 import Int8Options, quantise
from edgeattn.export.to_onnx import to_onnx


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.gate = SqueezeExcitation(16, 4)
        self.unused = SqueezeExcitation(16, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.gate(self.stem(image))
        return result


def test_blocks_are_found_by_their_class() -> None:
    network = Network().eval()
    image = torch.randn(1, 3, 12, 12)
    model = to_onnx(network, (image,), input_names=["image"], output_names=["y"])
    found = declared_exclusions(network, model)
    assert found == ("gate.fc",)  # the block's `fc`, where the graph holds it
    batches = [{"image": torch.randn(1, 3, 12, 12).numpy()} for _ in range(8)]
    result = quantise(model, batches, Int8Options(exclude=found))
    assert len(result.layers) == 1
    assert len(result.float_layers) == 2
    assert len(quantise(model, batches, Int8Options(minimum_snr=0)).layers) == 3
    alone = SqueezeExcitation(16, 4).eval()
    features = torch.randn(1, 16, 5, 5)
    assert declared_exclusions(alone, to_onnx(alone, (features,), input_names=["x"], output_names=["y"])) == ("fc",)
    assert declared_exclusions(nn.Identity(), model) == ()
