"""Quirks of the three forms of stand-alone self-attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgeattn.blocks.stand_alone import (
    ChannelwiseAttention,
    ChannelwiseStem,
    PlaceMixtureStem,
    SharedMapAttention,
    StandAloneAttention,
)
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def identity_projections(module: nn.Module) -> None:
    """Make every projection of a square module the identity."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                child.weight.copy_(torch.eye(child.weight.shape[0])[:, :, None, None])


def test_padding_is_not_masked_and_receives_the_relative_term() -> None:
    module = StandAloneAttention(2, 2, kernel_size=3, groups=1)
    identity_projections(module)
    with torch.no_grad():
        module.rel_h.copy_(torch.tensor([3.0, 0.0, 1.0]).reshape(1, 1, 1, 3, 1))
        module.rel_w.copy_(torch.tensor([0.0, 2.0, 0.0]).reshape(1, 1, 1, 1, 3))
        result = module(torch.tensor([1.0, 0.5]).reshape(1, 2, 1, 1))
    logits = torch.tensor([3.0, 0.0, 1.0])[:, None] + 0.5 * torch.tensor([0.0, 2.0, 0.0])
    logits[1, 1] += 1 + 0.25
    weight = logits.flatten().softmax(0)[4]
    torch.testing.assert_close(result.flatten(), weight * torch.tensor([1.0, 0.5]))


def test_heads_have_their_own_maps_in_the_paper_form_only() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 5, 4, generator=generator)
    other = torch.cat([x[:, :2], torch.randn(1, 2, 5, 4, generator=generator)], dim=1)
    paper = StandAloneAttention(4, 4, kernel_size=3, groups=2)
    shared = SharedMapAttention(4, 4, kernel_size=3, groups=1, bias=False)
    with torch.no_grad():
        for module in (paper, shared):
            identity_projections(module)
        torch.testing.assert_close(paper(x)[:, :2], paper(other)[:, :2])
        assert not torch.allclose(shared(x)[:, :2], shared(other)[:, :2], atol=1e-2)


def test_channelwise_form_does_not_mix_channels_in_the_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 5, 4, generator=generator)
    other = torch.cat([x[:, :1], torch.randn(1, 3, 5, 4, generator=generator)], dim=1)
    module = ChannelwiseAttention(4, 4, kernel_size=3)
    identity_projections(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x)[:, 0], module(other)[:, 0])


def test_channelwise_softmax_is_stable() -> None:
    module = randomise(ChannelwiseAttention(4, 4, kernel_size=3))
    with torch.no_grad():
        result = module(1e4 * torch.randn(1, 4, 5, 4, generator=torch.Generator().manual_seed(3)))
    assert result.isfinite().all()
    assert result.abs().max() > 1


def test_stem_folds_its_mixture_into_one_projection_per_tap() -> None:
    stem = randomise(ChannelwiseStem(3, 4, kernel_size=2, m=3))
    prepared = stem.prepare_for_export()
    assert len(prepared.value_conv) == 4
    assert len(stem.value_conv) == 3
    assert stem.emb_mix is not None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StandAloneAttention(4, 8, kernel_size=4), "kernel_size.*4"),
        (lambda: StandAloneAttention(4, 6, groups=2), r"out_channels \(6\)"),
        (lambda: ChannelwiseAttention(4, 5), r"out_channels \(5\)"),
        (lambda: ChannelwiseStem(3, 5, groups=2), r"groups \(2\)"),
        (lambda: SharedMapAttention(3, 8, groups=2), r"in_channels \(3\)"),
        (lambda: SharedMapAttention(4, 6, groups=2), r"out_channels \(6\)"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_mixture_of_the_stem_depends_on_the_place_in_the_image() -> None:
    module = PlaceMixtureStem(3, 2, 2, 2, kernel_size=1, mix=2, bias=False)
    identity_projections(module)
    with torch.no_grad():
        module.weight_values[1].weight.mul_(5)
        module.emb_m.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        module.emb_x.copy_(torch.tensor([[50.0, -50.0], [0.0, 0.0]]))
        module.emb_y.zero_()
        result = module(torch.ones(1, 2, 3, 2))
    torch.testing.assert_close(result[0, 0], torch.tensor([5.0, 1.0]).expand(3, 2))


def test_an_even_window_gives_a_larger_map_that_starts_with_the_mean_of_its_window() -> None:
    module = randomise(PlaceMixtureStem(5, 7, 3, 4, kernel_size=4, bias=False))
    x = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(3))
    result, value = module(x), module._value(x)
    assert result.shape == (1, 4, 6, 8)
    torch.testing.assert_close(result[0, :, 0, 3], value[0, :, :2, 1:5].sum(dim=(1, 2)) / 16)


def test_the_stem_of_places_refuses_other_sizes() -> None:
    with pytest.raises(UserError, match="height of the stem's input must be 5, got 6"):
        PlaceMixtureStem(5, 7, 3, 4)(torch.zeros(1, 3, 6, 7))
    with pytest.raises(ValueError, match=r"in_channels \(3\) must be a multiple of groups \(2\)"):
        PlaceMixtureStem(5, 7, 3, 4, groups=2)
