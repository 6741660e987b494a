"""The global context block beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.global_context import ContextBlock
from edgeattn.validation.randomise import randomise


@pytest.mark.parametrize("order", [("channel_add", "channel_mul"), ("channel_mul", "channel_add")])
def test_multiplication_comes_before_addition(order: tuple[str, ...]) -> None:
    block = randomise(ContextBlock(6, 0.5, "avg", order))
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        context = x.mean(dim=(2, 3), keepdim=True)
        gate = block.channel_mul_conv(context).sigmoid()
        assert torch.allclose(block(x), x * gate + block.channel_add_conv(context), atol=1e-5)


def test_mask_bias_has_no_effect() -> None:
    block = randomise(ContextBlock(6, 0.5))
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        attention = block.conv_mask(x).flatten(2).softmax(dim=2)  # with the bias
        context = (x.flatten(2) * attention).sum(dim=2)
        assert torch.allclose(block.context(x), context, atol=1e-5)


def test_layer_norm_is_over_the_planes_with_an_affine_of_its_own() -> None:
    """Without its affine the normalised vector has mean 0 and variance 1 whatever the context."""
    block = randomise(ContextBlock(6, 0.5))
    x = torch.randn(1, 6, 4, 5)
    with torch.no_grad():
        block.channel_add_conv[1].weight.fill_(1.0)
        block.channel_add_conv[1].bias.fill_(10.0)  # the ReLU lets everything pass
        block.channel_add_conv[3].weight.fill_(1.0)
        block.channel_add_conv[3].bias.zero_()
        assert torch.allclose(block(x) - x, torch.tensor(30.0), atol=1e-4)  # the sum over three planes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling_type": "max"}, "pooling_type of a context block is 'max'"),
        ({"fusion_types": ("add",)}, r"fusion_types of a context block is \('add',\)"),
        ({"fusion_types": ()}, "fusion_types of a context block is"),
        ({"fusion_types": "channel_add"}, "fusion_types of a context block is 'channel_add'"),
        ({"ratio": 0.1}, "ratio of a context block is 0.1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextBlock(**{"inplanes": 6, "ratio": 0.5, **arguments})
