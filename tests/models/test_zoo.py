"""The declared networks: published layouts, equality with their originals, and the digits data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeattn.models import MODELS, ModelSpec, Preprocessing, digits
from edgeattn.validation.randomise import randomise


def test_cosnet_group_of_one_is_the_pair() -> None:
    model = randomise(MODELS.get("cosnet-digits").build(), seed=2)
    target, reference = torch.randn(2, 3, 48, 56), torch.randn(2, 3, 48, 56)
    with torch.no_grad():
        pair = model(target, reference)[0]
        assert torch.allclose(model.forward_group(target, reference[:, None]), pair, atol=1e-5)
        doubled = model.forward_group(target, torch.stack([reference, reference], dim=1))
    assert torch.allclose(doubled, pair, atol=1e-5)  # a reference twice weighs no more than once


def test_preprocessing_orders_and_scales() -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    image[..., 0] = 255
    rgb = Preprocessing("RGB", 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(image)
    assert rgb.shape == (1, 3, 2, 3)
    assert np.allclose(rgb[0, 0], 2)
    assert np.allclose(rgb[0, 2], -2)
    bgr = Preprocessing("BGR", 1.0, (10.0, 20.0, 30.0), (1.0, 1.0, 1.0))(image)
    assert np.allclose(bgr[0, :, 0, 0], [-10, -20, 225])


@pytest.mark.parametrize("name", ["ccnet-digits", "cosnet-digits"])
def test_samples_are_the_same_every_time_and_labelled(name: str) -> None:
    spec = MODELS.get(name)
    first, again = (list(spec.samples(3)) for _ in range(2))  # type: ignore[misc]
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))
        assert np.array_equal(one.target, other.target)
        assert len(one.images) == len(one.target) == len(spec.inputs)
        assert one.images[0].shape == (*spec.size, 3)
        assert 0 < one.target.max() < len(spec.classes)


def test_held_out_material_is_disjoint_from_training_material() -> None:
    train, test = digits.material("train"), digits.material("test")
    assert len(train.digits) + len(test.digits) == 1797
    for left, right in zip(train.photos, test.photos, strict=True):
        assert left.shape[1] + right.shape[1] == 640


def test_both_frames_of_a_pair_show_the_shared_digit() -> None:
    for sample in digits.held_out("pair", 5):
        assert sample.target is not None
        assert all(frame.any() for frame in sample.target)
        assert set(np.unique(sample.target)) == {0, 1}


def names_of_bundled() -> list[ModelSpec]:
    return [spec for spec in MODELS if spec.checkpoint]


def test_bundled_checkpoints_are_small() -> None:
    sizes = [spec.checkpoint.stat().st_size for spec in names_of_bundled() if spec.checkpoint]
    assert len(sizes) == 2
    assert sum(sizes) <= 6e6
