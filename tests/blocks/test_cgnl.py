"""CGNL beyond the common contract."""

from __future__ import annotations

import math

import pytest
import torch

from edgeattn.blocks.cgnl import CGNL
from edgeattn.export.to_onnx import to_onnx
from edgeattn.validation.randomise import randomise


def test_a_negative_group_inverts_its_sign_and_leaves_the_others_alone() -> None:
    block = randomise(CGNL(8, 4, groups=2))
    x = torch.randn(2, 8, 5, 3)
    with torch.no_grad():
        block.gn.bias.zero_()
        before = block(x) - x
        block.g.weight[2:].mul_(-1)  # the second group's channels
        after = block(x) - x
    assert torch.allclose(after[:, :4], before[:, :4], atol=1e-5)
    assert torch.allclose(after[:, 4:], -before[:, 4:], atol=1e-5)
    assert before.abs().amin(dim=(2, 3)).max() > 1e-3


def test_attention_is_that_of_the_full_matrix_over_positions_and_channels() -> None:
    """The compact form equals the M x M matrix of products that it stands for."""
    block = randomise(CGNL(4, 2, use_scale=True, groups=1))
    x = torch.randn(1, 4, 3, 2)
    with torch.no_grad():
        theta, phi, g = (convolution(x).flatten() for convolution in (block.t, block.p, block.g))
        attended = (torch.outer(theta, phi) @ g / math.sqrt(12)).reshape(1, 2, 3, 2)
        assert torch.allclose(block(x), block.gn(block.z(attended)) + x, atol=1e-5)


def test_gaussian_approaches_the_exponential() -> None:
    """A high order is exp(2 c (t p - 1)) summed over p and g."""
    block = randomise(CGNL(4, 2, groups=1, order=12)).double()
    x = 30 * torch.randn(1, 4, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        theta, phi, g = (convolution(x).flatten() for convolution in (block.t, block.p, block.g))
        attended = (torch.exp(2e-4 * (torch.outer(theta, phi) - 1)) @ g).reshape(1, 2, 3, 2)
        assert torch.allclose(block(x), block.gn(block.z(attended)) + x, atol=1e-8)


def test_gaussian_without_keys_keeps_its_constant_term() -> None:
    block = randomise(CGNL(4, 2, groups=1, order=3))
    x = torch.randn(1, 4, 3, 2)
    with torch.no_grad():
        block.p.weight.zero_()
        constant = (math.exp(-2e-4) * block.g(x).sum()).expand(1, 2, 3, 2)
        assert torch.allclose(block(x), block.gn(block.z(constant)) + x, atol=1e-5)


def test_the_gaussian_exports_to_few_nodes() -> None:
    """The published code needs 214 for 8 groups and order 3; ours does not grow with the groups."""
    block = randomise(CGNL(16, 16, groups=8, order=3))
    model = to_onnx(block, (torch.randn(1, 16, 4, 5),), input_names=["x"], output_names=["y"])
    assert len(model.graph.node) <= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"groups": 3}, "groups of CGNL is 3"), ({"groups": 2, "order": 0}, "order of CGNL is 0")],
)
def test_bad_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGNL(8, 4, **arguments)
