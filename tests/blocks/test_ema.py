"""The EMA unit beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.ema import EMAUnit
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import ema as original
from edgeattn.validation.randomise import randomise


def test_the_mixture_has_the_last_responsibilities_and_the_bases_after_them() -> None:
    unit = randomise(EMAUnit(6, 3, stage_num=1, clamp_norms=True)).double()
    x = torch.randn(1, 6, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        features = unit.conv1(x).flatten(2)[0]
        z = torch.softmax(features.T @ unit.mu[0], dim=1)
        mu = features @ z
        mu = mu / mu.norm(dim=0)
        expected = torch.relu(unit.conv2(torch.relu((mu @ z.T).view(x.shape))) + x)
        actual, bases = unit(x)
    assert torch.allclose(bases[0], mu)
    assert torch.allclose(actual, expected)


def test_forward_leaves_the_bases_alone_in_training_too() -> None:
    unit = EMAUnit(6, 3)
    before = unit.mu.clone()
    unit.train()(torch.randn(2, 6, 3, 4))
    assert torch.equal(unit.mu, before)


def test_the_steps_carry_no_gradient() -> None:
    unit = EMAUnit(6, 3)
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    unit(x)[0].sum().backward()
    assert unit.conv1.weight.grad is None
    assert unit.conv2[0].weight.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize("clamp_norms", [False, True], ids=["added", "clamped"])
def test_an_abandoned_basis_follows_the_published_denominators(clamp_norms: bool) -> None:
    """A basis with a tiny share is nearly zero with the added 1e-6, and a unit vector with the clamp."""
    unit = randomise(EMAUnit(6, 3, stage_num=1, clamp_norms=clamp_norms)).double()
    twin = original.EMAUnit(6, 3, stage_num=1, clamp_norms=clamp_norms).eval().double()
    x = torch.rand(1, 6, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        unit.conv1.weight.mul_(0.1)
        unit.conv1.bias.fill_(5.0)
        unit.mu[:, :, 0] = -1.7
        twin.load_state_dict(unit.state_dict())
        bases, expected = unit(x)[1], twin(x)[1]
    assert torch.allclose(bases, expected, rtol=1e-9, atol=1e-12)
    norm = float(expected[0, :, 0].norm())
    assert abs(norm - 1) < 1e-6 if clamp_norms else norm < 1e-6


def test_the_first_convolution_never_runs_over_the_map() -> None:
    model = to_onnx(EMAUnit(6, 3), (torch.randn(1, 6, 3, 4),), input_names=["x"], output_names=["y", "mu"])
    assert [node.op_type for node in model.graph.node].count("Conv") == 1


def test_mmseg_state_loads_through_its_key_map() -> None:
    unit = randomise(EMAUnit(6, 3))
    names = {"mu": "ema_module.bases", "conv1": "ema_mid_conv.conv"}
    names |= {"conv2.0": "ema_out_conv.conv", "conv2.1": "ema_out_conv.bn"}
    published = {"decode_head.conv_seg.weight": torch.zeros(1), "backbone.stem.0.weight": torch.zeros(1)}
    for key, value in unit.state_dict().items():
        prefix = next(name for name in names if key.startswith(name))
        published["decode_head." + key.replace(prefix, names[prefix], 1)] = value
    other = EMAUnit(6, 3)
    report = load_checkpoint(other, published, key_map=BLOCKS.get("ema").variant("mmseg").key_map)
    assert not report.missing
    assert not report.unexpected
    assert all(torch.equal(value, unit.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(("c", "k", "stages"), [(0, 3, 1), (6, 0, 1), (6, 3, 0)])
def test_empty_units_are_refused(c: int, k: int, stages: int) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EMAUnit(c, k, stages)
