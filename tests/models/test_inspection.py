"""What a checkpoint holds is told from names and shapes, and never more than they prove."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeattn.blocks.squeeze_excitation import SqueezeExcitation
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, inspection
from edgeattn.models.checkpoint import read_checkpoint, save_checkpoint
from edgeattn.models.inspection import find_blocks, guess_model, guess_models, inspect_checkpoint

BUNDLED = MODELS.get("ccnet-digits").checkpoint
assert BUNDLED is not None


def test_a_bundled_checkpoint():
    found = inspect_checkpoint(BUNDLED)
    model = MODELS.get("ccnet-digits").build()
    assert found.container == "safetensors"
    assert found.file_bytes == BUNDLED.stat().st_size
    counters = {name for name, _ in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert found.tensors == len(read_checkpoint(BUNDLED))
    assert found.parameters == sum(v.numel() for n, v in model.state_dict().items() if n not in counters)
    assert found.certain == ("ccnet-digits",)
    assert found.guesses[0].certainty == 1
    assert all(guess.certainty < 1 for guess in found.guesses[1:])
    assert "ccnet-digits at 128x160 (layout official)" in found.export()
    (block,) = found.blocks
    assert any(candidate.startswith("rcca ") for candidate in block.candidates)
    assert found.as_dict()["guesses"][0]["certainty"] == 1


@pytest.mark.parametrize(("zipped", "container"), [(True, "torch (zip)"), (False, "torch (before 1.6)")])
def test_containers_of_torch(tmp_path, zipped, container):
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": SqueezeExcitation(32).state_dict()}, file, _use_new_zipfile_serialization=zipped)
    found = inspect_checkpoint(file)
    assert found.container == container
    assert found.types == {"float32": 2}
    assert found.certain == ()
    assert [block.prefix for block in found.blocks] == [""]
    assert "replace_attention" in found.export()


def test_blocks_are_found_where_they_lie():
    state = {f"stem.{name}": value for name, value in nn.Conv2d(3, 8, 3).state_dict().items()}
    for index in (10, 2):
        block = SqueezeExcitation(32, hidden=4).state_dict()
        state |= {f"layer{index}.0.se.{name}": value for name, value in block.items()}
    blocks = find_blocks(state)
    assert [block.prefix for block in blocks] == ["layer10.0.se", "layer2.0.se"]
    assert all("squeeze-excitation (official)" in block.candidates and block.parameters == 256 for block in blocks)


def test_ordinary_networks_hold_no_blocks():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    assert find_blocks(layers.state_dict()) == ()


def test_a_guess_needs_every_tensor(tmp_path):
    state = read_checkpoint(BUNDLED)
    whole = save_checkpoint(state, tmp_path / "whole.safetensors", {})
    assert guess_model(whole).model == "ccnet-digits"
    name = next(name for name in state if name.endswith("weight"))
    less = {key: value for key, value in state.items() if key != name}
    more = {**state, "extra": torch.zeros(3)}
    other = {**state, name: torch.zeros(1, 2, 3)}
    for number, changed in enumerate((less, more, other)):
        file = save_checkpoint(changed, tmp_path / f"{number}.safetensors", {})
        with pytest.raises(UserError, match=r"fits no declared network strictly\. Nearest: ccnet-digits"):
            guess_model(file)
    with pytest.raises(UserError, match=r"none shares a tensor"):
        guess_model(save_checkpoint({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors", {}))


def test_networks_of_equal_tensors_are_not_chosen_between(tmp_path, monkeypatch):
    twin = dataclasses.replace(MODELS.get("ccnet-digits"), name="twin")
    monkeypatch.setattr(inspection, "MODELS", [MODELS.get("ccnet-digits"), twin])
    with pytest.raises(UserError, match="ccnet-digits and twin alike"):
        guess_model(BUNDLED)


def test_absent_counters_do_not_count():
    shapes = {name: tuple(value.shape) for name, value in read_checkpoint(BUNDLED).items() if "num_batches" not in name}
    assert guess_models(shapes)[0].certainty == 1


LISTINGS = Path(__file__).parent.parent / "data" / "state_dicts"


@pytest.mark.parametrize(
    ("listing", "candidate"),
    [
        ("timm_se", "squeeze-excitation (timm)"),
        ("timm_cbam", "cbam (timm)"),
        ("timm_nonlocal", "non-local (timm)"),
        ("timm_sk", "selective-kernel (timm)"),
        ("timm_splat", "split-attention (official)"),
        ("eca", "efficient-channel-attention (official)"),
        ("bam", "bam (official)"),
        ("ccnet_cca", "criss-cross (official)"),
        ("mmcv_cca", "criss-cross (mmcv)"),
        ("danet_pam", "danet-pam (official)"),
        ("gcnet_cb_add", "global-context (add)"),
        ("jadore_mha", "multi-head (jadore)"),
        ("san_pairwise", "san-pairwise (official)"),
    ],
)
def test_published_listings_are_recognised(listing, candidate):
    keys = json.loads((LISTINGS / f"{listing}.json").read_text(encoding="utf-8"))["keys"]
    state = {f"backbone.{name}": torch.empty(shape, device="meta") for name, shape in keys.items()}
    (block,) = find_blocks(state)
    assert block.prefix == "backbone"
    assert candidate in block.candidates
