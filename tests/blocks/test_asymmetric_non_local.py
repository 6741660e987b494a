"""Asymmetric non-local blocks beyond the common contract."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.asymmetric_non_local import AFNB, APNB
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import asymmetric_non_local as originals
from edgeattn.validation.randomise import randomise

REFERENCES = Path(__file__).parents[1] / "data" / "reference"
SMALL = {"channels": 8, "key_channels": 4, "value_channels": 5}


def test_unequal_copies_of_the_shared_projection_are_refused() -> None:
    state = randomise(APNB(**SMALL)).state_dict()
    assert torch.equal(state["stages.0.f_query.0.weight"], state["stages.0.f_key.0.weight"])
    state["stages.0.f_query.0.weight"] = state["stages.0.f_query.0.weight"] + 1
    block = APNB(**SMALL)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(UserError, match=r"stages\.0\.f_key\.0\.weight and stages\.0\.f_query\.0\.weight differ"):
        load_checkpoint(block, state)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_the_shared_projection_stays_shared_after_loading_and_preparing() -> None:
    block = APNB(**SMALL)
    load_checkpoint(block, randomise(APNB(**SMALL), seed=1).state_dict())
    for stage in (*block.stages, *block.prepare_for_export().stages):
        assert stage.f_query is stage.f_key
    assert AFNB(6, 8, 8, 4, 5).stages[0].f_query is not AFNB(6, 8, 8, 4, 5).stages[0].f_key


def test_only_the_pyramid_block_ends_in_a_relu() -> None:
    low, high = torch.randn(1, 6, 5, 7), torch.randn(1, 10, 5, 7)
    fusion = randomise(AFNB(6, 10, 8, 4, 5))
    assert fusion(low, high).min() < 0
    assert randomise(APNB(**SMALL))(torch.randn(1, 8, 5, 7)).min() == 0


def test_keys_are_averaged_after_their_relu() -> None:
    """Averages of ReLU outputs are positive almost surely; the ReLU of averages would often be 0."""
    block = randomise(APNB(**SMALL))
    keys = []
    block.stages[0].core.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[1]))
    x = torch.randn(1, 8, 9, 9)
    block(x)
    expected = torch.cat([F.adaptive_avg_pool2d(block.stages[0].f_key(x), s).flatten(2) for s in (1, 3, 6, 8)], dim=2)
    assert torch.allclose(keys[0], expected, atol=1e-5)


def test_97_positions_are_pooled_exactly() -> None:
    block = randomise(APNB(2, 2, 2)).double()
    original = originals.APNB(2, 2, 2).eval().double()
    original.load_state_dict(block.state_dict())
    x = torch.randn(1, 2, 97, 97, dtype=torch.float64)
    assert torch.allclose(block(x), original(x), rtol=0, atol=1e-10)


def test_low_level_map_may_have_another_size() -> None:
    block = randomise(AFNB(6, 10, 8, 4, 5)).double()
    original = originals.AFNB(6, 10, 8, 4, 5).eval().double()
    original.load_state_dict(block.state_dict())
    low, high = torch.randn(2, 6, 11, 4, dtype=torch.float64), torch.randn(2, 10, 5, 7, dtype=torch.float64)
    assert torch.allclose(block(low, high), original(low, high), rtol=0, atol=1e-10)


def shared_state(name: str, query: str, key: str) -> dict[str, torch.Tensor]:
    """Return the recorded parameters; those of the one projection were drawn under the query's names."""
    keys: Mapping[str, list[int]] = json.loads((REFERENCES / "provenance.json").read_text())["files"][f"{name}.npz"][
        "keys"
    ]
    state = {}
    for entry, shape in keys.items():
        drawn_as = entry.replace(key, query)
        draw = np.random.RandomState(zlib.crc32(drawn_as.encode())).random_sample(shape)
        width = np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 1
        value = 0.5 + draw if entry.endswith("running_var") else (2 * draw - 1) * width
        if not entry.endswith("num_batches_tracked"):
            state[entry] = torch.from_numpy(np.asarray(value).astype(np.float32))
    return state


@pytest.mark.parametrize(
    ("name", "variant", "query", "key", "arguments"),
    [
        ("ann_apnb", "official", "f_query", "f_key", SMALL),
        (
            "mmseg_ann_apnb",
            "mmseg",
            "query_project",
            "key_project",
            SMALL | {"value_channels": 4, "stages": 2, "norm_bias": False},
        ),
    ],
)
def test_public_pyramid_blocks_compute_the_same(
    name: str, variant: str, query: str, key: str, arguments: dict[str, Any]
) -> None:
    """The contract's rule draws the copies of a shared projection apart, so these references are compared here."""
    key_map = BLOCKS.get("asymmetric-pyramid-non-local").variant(variant).key_map
    with np.load(REFERENCES / f"{name}.npz") as file:
        arrays = {entry: torch.from_numpy(file[entry]).double() for entry in file}
    assert len(arrays) == 4
    for module in (APNB(**arguments), originals.APNB(**arguments)):
        load_checkpoint(module, shared_state(name, query, key), key_map=key_map)
        module.eval().double()
        for case in ("case0", "case1"):
            actual = module(arrays[f"{case}.x"])
            assert torch.allclose(actual, arrays[f"{case}.output_0"], rtol=1e-10, atol=1e-10)


def test_meaningless_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="stages >= 1, got 0"):
        APNB(**SMALL, stages=0)
    with pytest.raises(ValueError, match=r"psp_size.*got \(0, 3\)"):
        AFNB(6, 10, 8, 4, 5, psp_size=(0, 3))
