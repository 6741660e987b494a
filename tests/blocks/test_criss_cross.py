"""Criss-cross attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS, CrissCrossAttention
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


def test_mmcv_state_loads_through_its_key_map() -> None:
    block = randomise(CrissCrossAttention(16))
    published = {name: value for name, value in block.state_dict().items() if name != "gamma"}
    published["gamma.scale"] = block.state_dict()["gamma"].reshape(())
    other = CrissCrossAttention(16)
    load_checkpoint(other, published, key_map=BLOCKS.get("criss-cross").variant("mmcv").key_map)
    assert torch.equal(other.gamma, block.gamma)


def test_large_energies_stay_exact_next_to_the_mask() -> None:
    """A masked energy must lose against every real one, however large the real ones are."""
    block = randomise(CrissCrossAttention(8))
    with torch.no_grad():
        block.query_conv.weight.mul_(100)
    x = torch.randn(1, 8, 4, 5)
    query, key, value = block.query_conv(x), block.key_conv(x), block.value_conv(x)
    attended = (block.core(query, key, value, torch.zeros_like(x)))[0, :, 0, 0]
    column = [(row, 0) for row in range(1, 4)]
    line = column + [(0, other) for other in range(5)]
    energy = torch.stack([(query[0, :, 0, 0] * key[0, :, row, col]).sum() for row, col in line])
    expected = sum(p * value[0, :, row, col] for p, (row, col) in zip(energy.softmax(0), line, strict=True))
    assert torch.allclose(attended, expected, atol=1e-4)


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 channels"):
        CrissCrossAttention(4)
