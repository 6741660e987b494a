"""Learn to pay attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.learn_to_pay import AttentionHead, AttnVGG, GridAttentionBlock, LinearAttentionBlock
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise

SMALL = {"base_channels": 4, "num_classes": 5}


def parameters(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def nodes(block: torch.nn.Module, x: torch.Tensor, outputs: int) -> int:
    names = [f"output_{index}" for index in range(outputs)]
    return len(to_onnx(block, (x,), input_names=["x"], output_names=names).graph.node)


def test_export_drops_the_branch_that_the_scores_do_not_need() -> None:
    block = randomise(AttnVGG(**SMALL, return_maps=False))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    prepared = prepare_for_export(block)
    dead = parameters(block.conv_block6) + parameters(block.dense)
    assert parameters(prepared) == parameters(block) - dead + prepared.projected.weight.numel()
    assert torch.allclose(prepared(x), block(x), rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert nodes(block, x, 1) < nodes(randomise(AttnVGG(**SMALL)), x, 4)


def test_the_dropped_branch_has_a_quarter_of_the_published_parameters() -> None:
    with torch.device("meta"):
        block = AttnVGG()
    dead = parameters(block.conv_block6) + parameters(block.dense)
    assert round(dead / 1e6, 2) == 4.98
    assert round(parameters(block) / 1e6, 2) == 19.99


@pytest.mark.parametrize(
    "arguments", [{"return_maps": True}, {"return_maps": False, "normalize_attn": False}], ids=["maps", "sigmoid"]
)
def test_the_branch_stays_where_an_output_needs_it(arguments: dict[str, bool]) -> None:
    prepared = prepare_for_export(randomise(AttnVGG(**SMALL, **arguments)))
    assert prepared.conv_block6 is not None
    assert prepared.dense is not None


@pytest.mark.parametrize(("compatibility", "depends"), [("parametrised", False), ("dot", True)])
def test_scores_depend_on_the_global_feature_only_with_the_dot_product(compatibility: str, depends: bool) -> None:
    block = randomise(LinearAttentionBlock(6, compatibility=compatibility))
    local = torch.randn(1, 6, 3, 4)
    g, other = torch.randn(1, 6, 1, 1), torch.randn(1, 6, 1, 1)
    assert torch.allclose(block(local, g)[1], block(local, other)[1]) != depends
    assert not torch.allclose(block(local, g)[0], block(local, other)[0])


def test_sigmoid_weights_are_averaged_over_positions() -> None:
    block = randomise(LinearAttentionBlock(6, normalize_attn=False))
    local, g = torch.randn(1, 6, 3, 4), torch.randn(1, 6, 1, 1)
    score, pooled = block(local, g)
    assert torch.allclose(pooled, (score.sigmoid() * local).mean(dim=(2, 3)), rtol=0, atol=1e-6)


def test_independent_classifiers_are_the_softmax_of_summed_log_probabilities_and_one_layer_in_an_export() -> None:
    block = randomise(AttentionHead(4, 6, 5, classifier="independent", return_maps=False))
    inputs = (torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2), torch.randn(2, 6, 1, 3), torch.randn(2, 6, 1, 1))
    prepared = prepare_for_export(block)
    assert prepared.classify is not None
    assert not hasattr(prepared, "classify1")
    scores = block(*inputs)
    assert torch.allclose(scores.sum(dim=1), torch.ones(2))
    assert torch.allclose(prepared(*inputs), scores, rtol=0, atol=1e-6)


def test_wrong_arguments_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="compatibility is one of parametrised, dot, not 'cosine'"):
        LinearAttentionBlock(4, compatibility="cosine")
    with pytest.raises(ValueError, match="classifier is one of"):
        AttentionHead(classifier="both")
    with pytest.raises(ValueError, match="up_factor has to be at least 1"):
        GridAttentionBlock(4, 4, 4, 0)
    with pytest.raises(ValueError, match="im_size has to be a multiple of 32"):
        AttnVGG(im_size=40)
    with pytest.raises(UserError, match="width of the image must be 32, got 16"):
        AttnVGG(**SMALL)(torch.randn(1, 3, 32, 16))
    with pytest.raises(UserError, match="height of the local map must be 2 times that of the global map"):
        GridAttentionBlock(4, 4, 4, 2)(torch.randn(1, 4, 5, 6), torch.randn(1, 4, 3, 3))
