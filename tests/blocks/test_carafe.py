"""CARAFE beyond the common contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeattn.blocks.carafe import CARAFEPack


def uniform(**arguments: Any) -> CARAFEPack:
    """Return a block whose predicted kernels are all equal weights."""
    block = CARAFEPack(**arguments).eval()
    with torch.no_grad():
        block.content_encoder.weight.zero_()
        block.content_encoder.bias.zero_()
    return block


def test_taps_outside_the_map_are_dropped_without_renormalisation() -> None:
    y = uniform(channels=1, scale_factor=2)(torch.ones(1, 1, 6, 7))
    assert torch.allclose(y[0, 0, 0, 0], torch.tensor(9 / 25))
    assert torch.allclose(y[0, 0, -1, 6], torch.tensor(15 / 25))
    assert torch.allclose(y[0, 0, 5, 6], torch.tensor(1.0))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_subpixel_has_its_own_kernel(row: int, column: int) -> None:
    """Logits favour the upper left tap for one sub-pixel only: channel t * s * s + i * s + j."""
    block = uniform(channels=1, scale_factor=2, up_kernel=3)
    with torch.no_grad():
        block.content_encoder.bias.view(9, 4)[0, row * 2 + column] = 100.0
    x = torch.rand(1, 1, 4, 5) + 1
    y = block(x)[0, 0]
    assert torch.allclose(y[2 + row, 4 + column], x[0, 0, 0, 1])
    assert torch.allclose(y[3 - row, 5 - column], x[0, 0, 0:3, 1:4].mean())


def test_groups_are_neighbouring_channels() -> None:
    block = uniform(channels=4, scale_factor=1, up_kernel=3, up_group=2)
    with torch.no_grad():
        block.content_encoder.bias.view(2, 9)[1, 4] = 100.0  # the second group copies its input
    x = torch.rand(1, 4, 5, 5)
    y = block(x)
    assert torch.allclose(y[:, 2:], x[:, 2:])
    assert torch.allclose(y[0, :2, 2, 2], x[0, :2, 1:4, 1:4].mean(dim=(1, 2)))


def test_arguments_that_change_the_size_or_split_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="odd up_kernel, got 4"):
        CARAFEPack(4, 2, up_kernel=4)
    with pytest.raises(ValueError, match="divides channels = 4, got 3"):
        CARAFEPack(4, 2, up_group=3)
    with pytest.raises(ValueError, match="encoder_kernel 2"):
        CARAFEPack(4, 2, encoder_kernel=2)
    with pytest.raises(ValueError, match="scale_factor >= 1, got 0"):
        CARAFEPack(4, 0)
