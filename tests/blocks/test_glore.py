"""GloRe beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.glore import GloReUnit
from edgeattn.export.to_onnx import to_onnx
from edgeattn.validation.randomise import randomise


def silenced() -> GloReUnit:
    """Return a unit whose nodes receive nothing from the positions."""
    unit = randomise(GloReUnit(6, 3))
    with torch.no_grad():
        unit.conv_state.weight.zero_()
        unit.conv_state.bias.zero_()
    return unit


def test_node_bias_is_one_number_per_node_and_is_rectified() -> None:
    unit = silenced()
    x = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        unit.gcn["conv1"].bias.copy_(torch.tensor([-1.0, -2.0, -3.0]))
        constant = unit.blocker(torch.zeros_like(x))
        assert torch.equal(unit(x), x + constant)  # the ReLU stands before gcn.conv2
        unit.gcn["conv1"].bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
        per_state = 2 * unit.gcn["conv2"].weight.sum(dim=(1, 2))  # node 1 has the value 2 in every state
        features = per_state[:, None, None] * unit.conv_proj(x)[:, 1:2]
        assert torch.allclose(unit(x), x + unit.blocker(unit.conv_extend(features)), atol=1e-5)


def test_epsilon_of_the_batch_normalisation() -> None:
    unit = silenced()
    with torch.no_grad():
        unit.gcn["conv1"].bias.fill_(-1.0)
        unit.blocker.running_var.zero_()
        unit.blocker.running_mean.fill_(-1.0)
        unit.blocker.weight.fill_(1.0)
        unit.blocker.bias.zero_()
        for form in (unit, unit.prepare_for_export()):
            assert torch.allclose(form(torch.zeros(1, 6, 2, 3)), torch.tensor(100.0))


def test_normalisation_makes_nodes_independent_of_the_number_of_positions() -> None:
    x = torch.randn(1, 6, 4, 5)
    twice = torch.cat([x, x], dim=3)
    for normalize in (True, False):
        unit = randomise(GloReUnit(6, 3, normalize=normalize))
        with torch.no_grad():
            assert torch.allclose(unit(twice)[..., :5], unit(x), atol=1e-5) is normalize


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_export_holds_one_convolution_and_no_batch_normalisation(dimensions: int) -> None:
    unit = randomise(GloReUnit(6, 3, dimensions))
    x = torch.randn(1, 6, *[4, 3, 2][:dimensions])
    nodes = [node.op_type for node in to_onnx(unit, (x,), input_names=["x"], output_names=["y"]).graph.node]
    assert nodes.count("Conv") == 1
    assert "BatchNormalization" not in nodes


def test_other_numbers_of_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions of a GloRe unit is 4"):
        GloReUnit(6, 3, dimensions=4)
