"""Double attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.double_attention import DoubleAttention
from edgeattn.validation.randomise import randomise


def test_maps_sum_to_one_over_positions_and_vectors_over_descriptors() -> None:
    """With equal features everywhere, every mixture of averages is that feature."""
    block = randomise(DoubleAttention(6, 5, 3))
    with torch.no_grad():
        block.convA.weight.zero_()
        out = block(torch.randn(2, 6, 4, 5))
    assert torch.allclose(out, block.convA.bias[:, None, None].expand_as(out), atol=1e-5)


def test_legacy_softmax_of_a_single_image_weighs_everything_with_one() -> None:
    block = randomise(DoubleAttention(6, 5, 3, softmax_axes="legacy_batch"))
    x = torch.randn(1, 6, 4, 5)
    with torch.no_grad():
        expected = 3 * block.convA(x).sum(dim=(2, 3), keepdim=True)
        assert torch.allclose(block(x), expected.expand(1, 5, 4, 5), rtol=1e-4)


def test_legacy_softmax_makes_an_image_depend_on_its_batch() -> None:
    x = torch.randn(2, 6, 4, 5)
    for axes, equal in (("paper", True), ("legacy_batch", False)):
        block = randomise(DoubleAttention(6, 5, 3, softmax_axes=axes))
        with torch.no_grad():
            assert torch.allclose(block(x)[:1], block(x[:1]), atol=1e-5) is equal


def test_no_residual_is_added() -> None:
    block = randomise(DoubleAttention(6, 5, 3, reconstruct=True))
    with torch.no_grad():
        for value in block.conv_reconstruct.parameters():
            value.zero_()
        assert not block(torch.randn(1, 6, 4, 5)).any()


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="softmax_axes of double attention is 'batch'"):
        DoubleAttention(6, 5, 3, softmax_axes="batch")
