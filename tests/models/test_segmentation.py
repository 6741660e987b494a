"""What the networks of `models/zoo/segmentation.py` do that no state_dict shows: dilations, pooling, allowed sizes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.validation.randomise import raise_gains, randomise

# Dilations of the first and of the other 3x3 convolutions of the third stage, those of the fourth stage, and whether
# the pooling rounds up: read from the running public networks.
PUBLISHED = {
    "danet-r101": (1, 2, [4, 8, 16], False),
    "danet-r101-deep-stem": (1, 2, [4, 8, 16], False),
    "emanet-r101": (1, 2, [2, 8, 16], False),
    "ocnet-base-r101": (2, 2, [4, 4, 4], True),
    "ocnet-pyramid-r101": (2, 2, [4, 4, 4], True),
    "ocnet-asp-r101": (2, 2, [4, 4, 4], True),
    "psanet-r50": (2, 2, [4, 4, 4], False),
    "psanet-r101": (2, 2, [4, 4, 4], False),
    "ann-r101": (1, 2, [2, 4, 4], True),
}
# Arguments with which stages have several bottlenecks and contexts their published pyramids, too slow to export often.
FULLER: Mapping[str, Mapping[str, object]] = {
    "danet-r101": {"blocks": (2, 2, 3, 5), "multi_dilation": (4, 8, 16)},
    "emanet-r101": {"blocks": (2, 2, 3, 3), "grids": (1, 2, 4)},
    "ocnet-base-r101": {"blocks": (2, 2, 3, 3)},
    "ocnet-pyramid-r101": {"blocks": (1, 1, 2, 2), "sizes": (1, 2, 3, 6)},
    "ocnet-asp-r101": {"blocks": (1, 1, 2, 2), "dilations": (12, 24, 36)},
    "psanet-r101": {"blocks": (2, 2, 3, 3), "mask": (7, 15)},
    "ann-r101": {"blocks": (2, 2, 3, 3), "psp_size": (1, 3, 6, 8)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dilations_and_pooling_are_the_published_ones(name: str) -> None:
    first, others, fourth, rounds_up = PUBLISHED[name]
    with torch.device("meta"):
        network = MODELS.get(name).build()
    found: dict[int, list[nn.Conv2d]] = {256: [], 512: []}
    for path, module in network.named_modules():
        if path.endswith(".conv2") and isinstance(module, nn.Conv2d) and module.in_channels in found:
            found[module.in_channels].append(module)
    assert all(conv.padding == conv.dilation for convs in found.values() for conv in convs)
    third = [conv.dilation[0] for conv in found[256]]
    assert third == [first, *[others] * (len(third) - 1)]
    assert [conv.dilation[0] for conv in found[512]] == fourth
    pool = next(module for module in network.modules() if isinstance(module, nn.MaxPool2d))
    assert (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (3, 2, 1, rounds_up)


@pytest.mark.parametrize("name", FULLER)
def test_fuller_network_equals_its_original(name: str) -> None:
    spec = MODELS.get(name)
    arguments = {**spec.small, **FULLER[name]}
    network = raise_gains(randomise(spec.network(**arguments), seed=6).double(), by=0.6)
    module, attribute = spec.original.split(":")
    original = getattr(importlib.import_module(module), attribute)(**arguments).eval().double()
    original.load_state_dict(network.state_dict(), strict=True)
    image = torch.randn(2, 3, 81, 113, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = network(image), original(image)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).norm() / theirs.norm()) <= 1e-12
        assert float((theirs - theirs.mean(dim=0)).norm() / theirs.norm()) > 0.01


def test_psanet_refuses_sizes_whose_corners_do_not_align() -> None:
    spec = MODELS.get("psanet-r101")
    network = spec.network(**spec.small).eval()
    with pytest.raises(UserError, match=r"width .* 100\. Pad or resize the image to 113"):
        network(torch.zeros(1, 3, 65, 100))
