"""Attention classifiers compute what the public networks compute, in every layout that they are published in.

`tests/data/networks/classifiers.json` holds outputs of the public code: of each network with one, one, two and one
blocks in its stages, ten classes, and the weights that `randomise(ours, SEED)` gives, by their published names; for one
normally distributed image of each size, whose seed is its height.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.models.spec import ModelSpec
from edgeattn.validation.randomise import randomise

RECORDED = json.loads((Path(__file__).parents[1] / "data/networks/classifiers.json").read_text(encoding="utf-8"))
SHORT = {"blocks": (1, 1, 2, 1), "num_classes": 10}
SEED = 3
FP32_RELATIVE_L2 = 1e-5


def image(size: str) -> torch.Tensor:
    height, width = map(int, size.split("x"))
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) <= FP32_RELATIVE_L2


def classifiers() -> list[ModelSpec]:
    return [spec for spec in MODELS if ".classifier_resnet:" in spec.original]


def test_public_outputs_of_every_classifier_are_recorded() -> None:
    assert {spec.name for spec in classifiers()} == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_scores_are_those_of_the_public_network(name: str) -> None:
    spec = MODELS.get(name)
    network = randomise(spec.network(**{**spec.arguments, **SHORT}), SEED)
    for size, scores in RECORDED[name]["outputs"].items():
        with torch.no_grad():
            assert_close(network(image(size)), torch.tensor([scores]))


@pytest.mark.parametrize("name", ["resnest50", "resnest50-fast-4s2x40d", "resnest50-fast-1s4x24d"])
def test_timm_publishes_the_names_of_the_official_resnest(name: str) -> None:
    shapes = [layout.published_shapes() for layout in MODELS.get(name).layouts]
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


def test_bam_pools_as_published_on_square_maps() -> None:
    spec = MODELS.get("bam-resnet50")
    small = {**spec.small, "base_width": 32}
    model = randomise(spec.network(**small), SEED)
    module, attribute = spec.original.split(":")
    original = getattr(importlib.import_module(module), attribute)(**{**small, "square_pool": True})
    original.load_state_dict(model.state_dict(), strict=True)
    square, wide = image("64x64"), image("64x96")
    wide[..., 64:] *= 3
    with torch.no_grad():
        assert_close(model(square), original(square))
        with pytest.raises(AssertionError):  # the published code leaves columns of a wide map out
            assert_close(model(wide), original(wide))


def test_an_image_too_small_for_self_calibration_is_refused() -> None:
    spec = MODELS.get("scnet50")
    network = spec.network(**{**spec.small, "blocks": (1, 1, 1, 2)}).eval()
    with pytest.raises(UserError, match="128 pixels"):
        network(image("96x128"))
