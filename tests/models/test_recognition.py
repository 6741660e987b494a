"""Recognition networks on weights that carry the image to the scores.

Random gains of batch normalisation below 1 lose the image on its way through a deep network, and leave scores that
hardly depend on it: equality would then say little about the attention. Here the gains are above 1.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from edgeattn.models import MODELS
from edgeattn.validation.randomise import randomise

SPREAD = 0.01
RELATIVE_L2 = 1e-5
# Stages and windows that would be slow to export, but are quick to run. Patchwise weights have no softmax: the values
# are squared by each unit, so that there are few.
CASES: dict[str, dict[str, object]] = {
    "san10-pairwise": {"layers": (1, 1, 2, 1, 1), "kernels": (3, 5, 3, 3, 3)},
    "san10-patchwise": {"layers": (0, 1, 1, 0, 0), "kernels": (3, 7, 5, 3, 3)},
    **{name: {} for name in ("can-resnet12", "a2-r50", "cgnl-r50", "cgnlx-r50", "nl-r50-cub", "ltpa-resnet164")},
    **{f"ltpa-vgg-{place}{suffix}": {} for place in ("before", "after") for suffix in ("", "-sigmoid")},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_that_follow_the_image_equal_the_original(name: str) -> None:
    spec = MODELS.get(name)
    arguments = {**spec.small, **CASES[name]}
    model = randomise(spec.network(**arguments), seed=5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.abs_().add_(1)
    module_name, attribute = spec.original.split(":")
    original = getattr(importlib.import_module(module_name), attribute)(**arguments).eval()
    original.load_state_dict(model.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(8)
    images = [torch.randn(2, 3, *spec.test_sizes[0], generator=generator) for _ in spec.inputs]
    with torch.no_grad():
        actual, expected = model(*images), original(*images)
    assert float((expected[0] - expected[1]).norm() / expected.norm()) > SPREAD
    assert float((actual - expected).norm() / expected.norm()) <= RELATIVE_L2
