"""Quirks of SAN's pairwise and patchwise attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import nn

from edgeattn.blocks.san import PairwiseAttention, PatchwiseAttention, SanBottleneck
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def constant_weights(module: PairwiseAttention | PatchwiseAttention, bias: torch.Tensor) -> None:
    """Let conv_w give its last bias everywhere and let the values be the input."""
    with torch.no_grad():
        last = module.conv_w[5]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        assert module.conv3.bias is not None
        last.weight.zero_()
        last.bias.copy_(bias)
        module.conv3.weight.copy_(torch.eye(module.conv3.weight.shape[0])[:, :, None, None])
        module.conv3.bias.zero_()


def test_channel_c_has_weight_c_modulo_groups_and_there_is_no_softmax_in_patchwise() -> None:
    module = randomise(PatchwiseAttention(4, 2, 4, share_planes=2, kernel_size=3))
    taps = torch.zeros(2, 9)
    taps[0, 4], taps[1, 4] = 3.0, -5.0
    constant_weights(module, taps.flatten())
    x = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(x), x * torch.tensor([3.0, -5.0, 3.0, -5.0])[:, None, None])


def test_taps_run_row_by_row_and_the_border_is_reflected() -> None:
    module = randomise(PatchwiseAttention(2, 2, 2, share_planes=2, kernel_size=3))
    first_row_last_column = torch.zeros(9)
    first_row_last_column[2] = 1.0
    constant_weights(module, first_row_last_column)
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    with torch.no_grad():
        result = module(x)
    assert result[0, 0].tolist() == [[5, 6, 7, 6], [1, 2, 3, 2], [5, 6, 7, 6]]


def test_pairwise_weights_are_a_softmax_over_the_window() -> None:
    module = randomise(PairwiseAttention(2, 2, 2, share_planes=2, kernel_size=3))
    constant_weights(module, torch.tensor([7.0]))
    x = torch.ones(1, 2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(module(x), x)


@pytest.mark.parametrize("axis", [0, 1])
def test_first_position_channel_is_x(axis: int) -> None:
    """A relation that sees only the first position channel gives weights that prefer one side along x alone."""
    module = PairwiseAttention(2, 1, 2, share_planes=2, kernel_size=3).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        first, second, last = module.conv_w[2], module.conv_w[3], module.conv_w[5]
        for norm in (module.conv_w[0], second):
            norm.weight.fill_(1)
        module.conv_p.weight[0, 0] = 1
        first.weight[0, 1] = 1
        last.weight.fill_(1)
        module.conv3.weight.copy_(torch.eye(2)[:, :, None, None])
        x = torch.zeros(1, 2, 5, 5)
        x[0, 0] = torch.arange(5.0)[None, :] if axis == 0 else torch.arange(5.0)[:, None]
        moved = float((module(x) - x)[0, 0, 2, 2])
    assert (abs(moved) > 0.05) == (axis == 0)


@pytest.mark.parametrize(("height", "width", "axis"), [(3, 8, "height 3"), (8, 2, "width 2")])
def test_maps_that_cannot_be_reflected_are_refused(height: int, width: int, axis: str) -> None:
    for module in (PairwiseAttention(4, 2, 4, 2), PatchwiseAttention(4, 2, 4, 2)):
        with pytest.raises(UserError, match=f"{axis}.*4 or more"):
            module(torch.zeros(1, 4, height, width))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PairwiseAttention(4, 2, 4, 2, kernel_size=4), "kernel_size.*4"),
        (lambda: PatchwiseAttention(4, 2, 6, 4), r"share_planes \(4\)"),
        (lambda: SanBottleneck("global", 4, 2, 4, 2), "pairwise, patchwise, not 'global'"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("form", [PairwiseAttention, PatchwiseAttention])
def test_a_window_costs_few_nodes_and_no_convolution_of_its_own(form: type[PairwiseAttention]) -> None:
    module = randomise(form(8, 2, 8, share_planes=4, kernel_size=7))
    model = to_onnx(module, (torch.zeros(1, 8, 9, 9),), input_names=["x"], output_names=["y"])
    assert len(model.graph.node) <= 100
    projections = 6 if form is PairwiseAttention else 5  # positions are a constant, projected once
    assert sum(node.op_type == "Conv" for node in model.graph.node) <= projections


@pytest.mark.parametrize("form", [PairwiseAttention, PatchwiseAttention])
def test_the_values_are_never_stacked_whole(form: type[PairwiseAttention]) -> None:
    module = randomise(form(8, 2, 64, share_planes=8, kernel_size=7))
    model = to_onnx(module, (torch.zeros(1, 8, 20, 20),), input_names=["x"], output_names=["y"])
    shaped = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    sizes = [math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in shaped.graph.value_info]
    assert max(sizes) == 64 * 7 * 26 * 20  # one row of taps per column, not 64 * 49 * 20 * 20
