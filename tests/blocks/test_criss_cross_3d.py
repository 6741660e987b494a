"""Criss-cross attention in three dimensions beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.criss_cross_3d import CrissCrossAttention3D
from edgeattn.validation.randomise import randomise


def attended(block: CrissCrossAttention3D, x: torch.Tensor, voxel: tuple[int, int, int]) -> torch.Tensor:
    """Return gamma times the sum over the three lines through a voxel, by explicit indices, for batch 1."""
    query, key, value = (projection(x)[0] for projection in (block.query_conv, block.key_conv, block.value_conv))
    row, column, frame = voxel
    lines = [(other, column, frame) for other in range(x.shape[2]) if other != row]
    lines += [(row, other, frame) for other in range(x.shape[3])]
    lines += [(row, column, other) for other in range(x.shape[4])]
    energy = torch.stack([(query[:, row, column, frame] * key[:, h, w, d]).sum() for h, w, d in lines])
    weights = energy.softmax(dim=0)
    return block.gamma * sum(weight * value[:, h, w, d] for weight, (h, w, d) in zip(weights, lines, strict=True))


def test_as_defined_a_voxel_counts_itself_twice() -> None:
    block = randomise(CrissCrossAttention3D(8, published_order=False)).double()
    x = torch.randn(1, 8, 3, 4, 2, dtype=torch.float64)
    with torch.no_grad():
        y = block(x)
        for voxel in ((0, 0, 0), (2, 1, 1), (1, 3, 0)):
            expected = attended(block, x, voxel) + x[(0, slice(None), *voxel)]
            torch.testing.assert_close(y[(0, slice(None), *voxel)], expected)


def test_published_order_differs_from_the_definition() -> None:
    published = randomise(CrissCrossAttention3D(8))
    defined = CrissCrossAttention3D(8, published_order=False).eval()
    defined.load_state_dict(published.state_dict())
    x = torch.randn(1, 8, 3, 4, 2)
    with torch.no_grad():
        assert (published(x) - defined(x)).norm() > 0.05 * defined(x).norm()
        single = torch.randn(1, 8, 3, 1, 5)  # a line of one column has one order
        torch.testing.assert_close(published(single), defined(single))


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="in_dim=4"):
        CrissCrossAttention3D(4)
