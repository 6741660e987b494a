"""A checkpoint is loaded in the layout that it has, by names, and never in two at once."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from torch import nn

from edgeattn.blocks.recognition import shapes_of
from edgeattn.deploy.evidence import load_original
from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, inspection
from edgeattn.models import spec as spec_module
from edgeattn.models.checkpoint import CheckpointMismatchError, read_checkpoint, save_checkpoint
from edgeattn.models.inspection import guess_model, guess_models
from edgeattn.models.published import load_published
from edgeattn.models.spec import Layout
from edgeattn.validation.divergence import sources

BASE = MODELS.get("ccnet-digits")
OTHER = Layout("other", {r"^auxiliary\.": "", r"^backbone\.": "", r"^decode_head\.": "head."})
SPEC = dataclasses.replace(BASE, layouts=(Layout(), OTHER))


@pytest.fixture(scope="module")
def official():
    return read_checkpoint(BASE.checkpoint)


@pytest.fixture(scope="module")
def other(official):
    """The same weights as another code base publishes them."""

    def published(name):
        return f"decode_head.{name[5:]}" if name.startswith("head.") else f"backbone.{name}"

    return {published(name): tensor for name, tensor in official.items()}


def equal(model, state):
    loaded = model.state_dict()
    return all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in state.items())


def test_the_layout_whose_names_fit_is_chosen(official, other):
    for state, name in ((official, "official"), (other, "other")):
        model = SPEC.build()
        loaded = load_published(SPEC, model, state)
        assert loaded.layout == name
        assert loaded.report.fits
        assert bool(loaded.report.renamed) == (name == "other")
        assert loaded.as_dict()["layout"] == name
        assert equal(model, official)


def test_what_a_layout_leaves_out_may_be_there_or_not(official, other):
    with_head = {**other, "auxiliary.weight": torch.zeros(3)}
    layouts = (Layout(), Layout("other", {r"^auxiliary\..*": "", **OTHER.key_map}))
    spec = dataclasses.replace(BASE, layouts=layouts)
    for state in (other, with_head):
        model = spec.build()
        assert load_published(spec, model, state).layout == "other"
        assert equal(model, official)


def test_a_forced_layout_is_taken_or_refused(official, other):
    assert load_published(SPEC, SPEC.build(), other, "other").layout == "other"
    with pytest.raises(CheckpointMismatchError, match=r"given as official.*also published as other") as error:
        load_published(SPEC, SPEC.build(), other, "official")
    assert error.value.report.missing
    with pytest.raises(UserError, match=r"no layout 'timm'. Choose one of official, other"):
        load_published(SPEC, SPEC.build(), official, "timm")


def test_the_nearest_layout_is_explained_and_the_others_are_listed(other):
    broken = {name: tensor for name, tensor in other.items() if name != "backbone.conv1.weight"}
    model = SPEC.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=r"nearest layout is other.*official \(0 of its 137 tensors") as e:
        load_published(SPEC, model, broken)
    assert list(e.value.report.missing) == ["conv1.weight"]
    assert not e.value.report.unexpected
    assert equal(model, before)


def test_layouts_that_would_fill_it_differently_are_not_chosen_between():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    swapped = Layout("swapped", {r"^a\.": "b.", r"^b\.": "a."})
    same = Layout("same", {r"^nowhere": ""})
    spec = dataclasses.replace(BASE, layouts=(Layout(), same, swapped))
    model, state = Pair(), Pair().state_dict()
    with pytest.raises(UserError, match=r"several layouts.*official, swapped.*--layout"):
        load_published(spec, model, state)
    assert load_published(spec, model, state, "swapped").layout == "swapped"
    assert torch.equal(model.a.weight, state["b.weight"])
    spec = dataclasses.replace(BASE, layouts=(Layout(), same))
    assert load_published(spec, model, state).layout == "official"


def test_network_original_and_bisect_load_alike(other, official, tmp_path, monkeypatch):
    file = save_checkpoint(other, tmp_path / "other.safetensors", {})
    assert equal(load_original(SPEC, file), official)
    assert equal(sources.torch_form(SPEC, file).original, official)
    monkeypatch.setattr(MODELS, "_members", {**MODELS._members, SPEC.name: SPEC})
    run = ExportRun(ExportRequest(SPEC.name, str(file), sample_count=1), tmp_path / "run")
    assert run.loaded.layout == "other"
    assert run.facts["layout"] == "other"
    with pytest.raises(CheckpointMismatchError):
        ExportRun(ExportRequest(SPEC.name, str(file), layout="official", sample_count=1), tmp_path / "run")


def test_a_guess_names_the_layout(other, tmp_path, monkeypatch):
    """By the key map where nothing is listed, by the listing where there is one, without building the network."""
    file = save_checkpoint(other, tmp_path / "other.safetensors", {})
    monkeypatch.setattr(inspection, "MODELS", [SPEC])
    guess = guess_model(file)
    assert (guess.model, guess.layout, guess.certainty) == (SPEC.name, "other", 1)
    keys = {name: list(tensor.shape) for name, tensor in other.items()}
    keys["auxiliary.weight"] = [3]
    for listing, content in (("listed", keys), ("foreign", {"x": [3]})):
        (tmp_path / f"{listing}.json").write_text(json.dumps({"keys": content}))
    monkeypatch.setattr(spec_module, "_LISTINGS", tmp_path)
    layouts = (
        dataclasses.replace(OTHER, key_map={r"^auxiliary\..*": "", **OTHER.key_map}, listing="listed"),
        Layout("foreign", listing="foreign"),
    )
    refuse = dataclasses.replace(SPEC, layouts=layouts, network=lambda **_: pytest.fail("the network was built"))
    monkeypatch.setattr(inspection, "MODELS", [refuse])
    for optional in ({}, {"auxiliary.weight": torch.zeros(3)}):
        (guess,) = guess_models(shapes_of({**other, **optional}))
        assert (guess.layout, guess.matched, guess.expected, guess.unexpected) == ("other", 137, 137, 0)
    inspection._listed.cache_clear()


def test_every_listing_is_guessed_without_building_a_network(monkeypatch):
    """Alike are only networks of the same tensors, which no guess could tell apart."""
    listed = [spec for spec in MODELS if all(layout.listing for layout in spec.layouts)]
    monkeypatch.setattr(inspection, "MODELS", listed)
    monkeypatch.setattr(inspection, "state_shapes", lambda spec: pytest.fail(f"{spec.name} was built"))
    published = {
        (spec.name, layout.name): inspection._listed(layout.listing) for spec in listed for layout in spec.layouts
    }
    for (name, layout), shapes in published.items():
        certain = {guess.model: guess for guess in guess_models(shapes) if guess.certainty == 1}
        assert name in certain, name
        for guess in certain.values():
            assert published[guess.model, guess.layout] == shapes or guess.model == name
        if certain[name].layout != layout:
            assert published[name, certain[name].layout].keys() == shapes.keys()


def test_guessing_among_all_networks_is_quick():
    shapes = inspection._listed("ccnet-r101")
    start = time.process_time()
    assert guess_models(shapes)[0].certainty == 1
    assert time.process_time() - start < 5
