"""BAM beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.bam import BAM
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def test_logits_are_multiplied_and_the_gate_lies_between_one_and_two() -> None:
    block = randomise(BAM(4, 2)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        gate = block(x) / x
        expected = 1 + (block.channel_att(x) * block.spatial_att(x)).sigmoid()
    assert torch.allclose(gate, expected)
    assert 1 < gate.min() < gate.max() < 2


def test_the_square_pool_sees_the_left_square_only() -> None:
    block = randomise(BAM(4, 2))
    x = torch.randn(1, 4, 3, 5)
    changed = x.clone()
    changed[..., 3:] += 1
    with torch.no_grad():
        logits = block.channel_att(x)
        assert torch.equal(block.channel_att(changed), logits)
        assert torch.equal(block.channel_att(x[..., :3]), logits)
        changed[..., 2] += 1
        assert not torch.allclose(block.channel_att(changed), logits)


def test_both_pools_agree_on_square_maps_only() -> None:
    square, everywhere = randomise(BAM(4, 2)), BAM(4, 2, square_pool=False).eval()
    everywhere.load_state_dict(square.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(square(x), everywhere(x))
        x = torch.randn(2, 4, 5, 6)
        assert not torch.allclose(square(x), everywhere(x), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(4, 3), (3, 6), (3, 7)])
def test_maps_that_the_published_code_cannot_pool_are_refused(height: int, width: int) -> None:
    x = torch.randn(1, 4, height, width)
    with pytest.raises(UserError, match=rf"got {height} x {width}.*square_pool=False"):
        BAM(4, 2)(x)
    assert BAM(4, 2, square_pool=False).eval()(x).shape == x.shape


def test_logits_are_broadcast_once_and_normalisations_are_folded() -> None:
    model = to_onnx(randomise(BAM(4, 2)), (torch.randn(1, 4, 3, 3),), input_names=["x"], output_names=["y"])
    operators = [node.op_type for node in model.graph.node]
    assert not {"BatchNormalization", "Expand", "Slice"} & set(operators)
    assert operators.count("Conv") == 6


def test_a_gate_without_hidden_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="BAM with 8 channels has reduction=16"):
        BAM(8)
