"""Cross attention of few-shot classification beyond the common contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from edgeattn.blocks.cross_attention import CAM
from edgeattn.foundation import UserError
from edgeattn.validation.originals import cross_attention as originals
from edgeattn.validation.randomise import randomise


def test_weights_are_one_plus_a_softmax_of_means_at_temperature_0_025() -> None:
    block = randomise(CAM(2, 3, reduction=3)).double()
    p, q = torch.randn(1, 1, 4, 2, 3, dtype=torch.float64), torch.randn(1, 1, 4, 2, 3, dtype=torch.float64)
    weighted, _ = block(p, q)
    cosine = F.normalize(p.flatten(3), dim=2)[0, 0].T @ F.normalize(q.flatten(3), dim=2)[0, 0]
    weight = block.conv2(
        torch.relu(block.conv1.bn(block.conv1.conv(cosine.mean(dim=0)[None, :, None, None])))
    ).flatten()
    expected = ((cosine * weight).mean(dim=1) / 0.025).softmax(dim=0) + 1
    assert torch.allclose(weighted[0, 0, 0] / p[0, 0], expected.view(2, 3), rtol=0, atol=1e-10)


def test_other_sizes_than_six_by_six_keep_height_and_width_apart() -> None:
    block = randomise(CAM(2, 5, reduction=4)).double()
    original = originals.CAM(2, 5, reduction=4).eval().double()
    original.load_state_dict(block.state_dict())
    p, q = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64), torch.randn(2, 2, 4, 2, 5, dtype=torch.float64)
    for actual, expected in zip(block(p, q), original(p, q), strict=True):
        assert actual.shape == (2, 2, 3, 4, 2, 5)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-10)


def test_both_directions_share_the_meta_learner() -> None:
    block = randomise(CAM()).double()
    p, q = torch.randn(1, 2, 4, 6, 6, dtype=torch.float64), torch.randn(1, 3, 4, 6, 6, dtype=torch.float64)
    for actual, expected in zip(block(q, p), reversed(block(p, q)), strict=True):
        assert torch.allclose(actual, expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_positions_without_features_give_no_nan() -> None:
    p, q = torch.randn(1, 2, 4, 6, 6), torch.zeros(1, 2, 4, 6, 6)
    block = randomise(CAM())
    assert block.scores(p, q).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in block(p, q))


def test_wrong_sizes_and_arguments_are_refused() -> None:
    block = CAM()
    p = torch.randn(1, 2, 4, 6, 6)
    with pytest.raises(UserError, match="height of CAM's features must be 6, got 5"):
        block(p[..., :5, :], p)
    with pytest.raises(UserError, match="width of CAM's features must be 6, got 3"):
        block.scores(p, p[..., :3])
    with pytest.raises(ValueError, match="reduction from 1 to height"):
        CAM(2, 2, reduction=5)
