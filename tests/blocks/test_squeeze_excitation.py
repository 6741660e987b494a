"""Squeeze-and-excitation beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.squeeze_excitation import ChannelLinear, SqueezeExcitation
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


@pytest.mark.parametrize("bias", [False, True])
def test_channel_linear_is_a_linear_layer_at_every_position(bias: bool) -> None:
    layer = randomise(ChannelLinear(5, 3, bias=bias))
    x = torch.randn(2, 5, 3, 4)
    expected = torch.nn.functional.linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias).permute(0, 3, 1, 2)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.prepare_for_export()(x), expected, atol=1e-6)


def test_linear_state_is_exported_as_convolutions_in_six_nodes() -> None:
    layer = SqueezeExcitation(8, 4)
    model = to_onnx(layer, (torch.randn(1, 8, 3, 4),), input_names=["x"], output_names=["y"])
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["ReduceMean", "Conv", "Relu", "Conv", "Sigmoid", "Mul"]
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert shapes["model.fc.0.weight"] == [2, 8, 1, 1]
    assert layer.fc[0].weight.shape == (2, 8)


@pytest.mark.parametrize("prefix", ["", "se_module."])
def test_caffe_names_load_through_the_key_map(prefix: str) -> None:
    variant = BLOCKS.get("squeeze-excitation").variant("timm")
    layer = randomise(SqueezeExcitation(**variant.arguments))
    names = {"fc.0.": "fc1.", "fc.2.": "fc2."}
    published = {prefix + names[key[:5]] + key[5:]: value for key, value in layer.state_dict().items()}
    other = SqueezeExcitation(**variant.arguments)
    load_checkpoint(other, published, key_map=variant.key_map)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_layer_that_leaves_no_hidden_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 channels has reduction=16.*Give 1 to 8"):
        SqueezeExcitation(8)
    with pytest.raises(ValueError, match="reduction=0"):
        SqueezeExcitation(8, 0)
    with pytest.raises(ValueError, match="hidden=0"):
        SqueezeExcitation(8, hidden=0)
