"""Networks with other arguments than the published ones: told by shapes, written behind the name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import CheckpointMismatchError, save_checkpoint
from edgeattn.models.inspection import guess_model, guess_models
from edgeattn.models.published import load_published, state_shapes
from edgeattn.models.variants import numbered_classes, variant_of_shapes
from edgeattn.validation.randomise import randomise


@pytest.mark.parametrize("name", [spec.name for spec in MODELS if "num_classes" in spec.small])
def test_the_shapes_tell_the_number_of_classes(name):
    spec = MODELS.get(name)
    shapes = state_shapes(dataclasses.replace(spec, arguments={**spec.small, "num_classes": 9}))
    assert variant_of_shapes(spec, shapes).arguments["num_classes"] == 9


def test_a_variant_has_its_own_classes_and_no_bundled_data():
    declared, other = MODELS.get("ccnet-digits"), MODELS.get("ccnet-digits:num_classes=4")
    assert other.name == "ccnet-digits:num_classes=4"
    assert other.classes == numbered_classes(4)
    assert (other.checkpoint, other.samples, other.calibration) == (None, None, None)
    assert other.build()(torch.zeros(1, 3, 65, 97))[0].shape[1] == 4
    assert declared.checkpoint is not None
    assert MODELS.get("ccnet-digits:num_classes=11") is declared


def test_training_classes_of_a_few_shot_network_are_not_those_of_its_episodes():
    assert MODELS.get("can-resnet12:num_classes=20").classes == MODELS.get("can-resnet12").classes


def test_what_no_shape_tells_is_chosen():
    once = MODELS.get("ccnet-digits:recurrence=1")
    assert once.build().head.recurrence == 1
    assert once.checkpoint is not None
    aligned = MODELS.get("ccnet-r50-mmseg:align_corners=true")
    assert aligned.align_corners
    assert not MODELS.get("ccnet-r50-mmseg").align_corners
    logits = {"logits": torch.randn(1, 3, 4, 5)}
    assert aligned.labels(logits, (31, 39)).equal(MODELS.get("ccnet-r101").labels(logits, (31, 39)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ccnet-r101:", "names no argument of ccnet-r101 that may vary. Write for example ccnet-r101:num_classes=19"),
        ("ccnet-r101:classes=4", "'classes=4' names no argument"),
        (
            "ccnet-r101:num_classes=many",
            "'many' is no value for num_classes of ccnet-r101. Write it like the declared 19",
        ),
        ("ccnet-r101:num_classes=0", "'0' is no value"),
        ("ccnet-r101:num_classes=3x4", "'3x4' is no value"),
        ("ccnet-r101:align_corners=1", "'1' is no value for align_corners"),
        ("ccnet-r101:num_classes=3,num_classes=4", "num_classes is given twice"),
        (
            "eca-resnet50:k_sizes=3x5",
            "'3x5' is no value for k_sizes of eca-resnet50. Write it like the declared 3x5x5x7",
        ),
        ("cosnet-r101:num_classes=3", "cosnet-r101 has no variants"),
        ("ccnet-r102:num_classes=3", "unknown model 'ccnet-r102'"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(UserError) as error:
        MODELS.get(name)
    assert message in str(error.value)


def test_a_checkpoint_of_other_classes_is_recognised_and_loads_strictly(tmp_path):
    spec = MODELS.get("ccnet-digits:num_classes=4")
    state = randomise(spec.build(), seed=3).state_dict()
    guess = guess_model(save_checkpoint(state, tmp_path / "own.safetensors", {}))
    assert (guess.model, guess.certainty) == (spec.name, 1)
    network = MODELS.get(guess.model).build()
    load_published(spec, network, state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with pytest.raises(CheckpointMismatchError, match="Its shapes are those of ccnet-digits:num_classes=4"):
        load_published(MODELS.get("ccnet-digits"), MODELS.get("ccnet-digits").build(), state)


@pytest.mark.parametrize(
    "name",
    [
        "eca-resnet50:num_classes=10,k_sizes=3x5x7x9",
        "psanet-r50-ade20k:num_classes=4",
        "danet-r50-mmseg:num_classes=150",
    ],
)
def test_the_guess_names_the_variant(name):
    first, second, *_ = guess_models(state_shapes(MODELS.get(name)))
    assert first.model == name
    assert first.certainty == 1
    assert second.certainty < 1


def test_published_names_are_renamed_before_the_shapes_tell():
    spec = MODELS.get("se-resnet50-timm")
    ours = state_shapes(spec)
    published = {name.replace(".se.fc.0.", ".se.fc1.").replace(".se.fc.2.", ".se.fc2."): s for name, s in ours.items()}
    published |= {"fc.weight": (5, 2048), "fc.bias": (5,)}
    certain = [guess for guess in guess_models(published) if guess.certainty == 1]
    assert [(guess.model, guess.layout) for guess in certain] == [("se-resnet50-timm:num_classes=5", "timm")]
