"""Object context of OCNet beyond the common contract."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn.blocks.abn import ABN
from edgeattn.blocks.object_context import ASPOC, BaseOC, PyramidOC, SelfAttentionStage, TiledSelfAttentionStage
from edgeattn.export.to_onnx import prepare_for_export
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import object_context as originals
from edgeattn.validation.randomise import randomise

REFERENCES = Path(__file__).parents[1] / "data" / "reference"
BASE = {"in_channels": 8, "out_channels": 8, "key_channels": 4, "value_channels": 6}
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "ocnet_base": ("BaseOC", BASE),
    "ocnet_base_sizes": ("BaseOC", BASE | {"sizes": (1, 2)}),
    "ocnet_base_scale2": ("BaseOC", BASE | {"value_channels": 8, "sizes": (2,), "concat": False}),
    "ocnet_pyramid": ("PyramidOC", {"in_channels": 4, "out_channels": 4}),
    "ocnet_asp": ("ASPOC", {"features": 6, "out_features": 4, "dilations": (2, 3, 5)}),
}


def rule(key: str, shape: list[int]) -> torch.Tensor:
    """Return the value of a published parameter, see `data/reference/provenance.json`; f_key has f_query's."""
    draw = np.random.RandomState(zlib.crc32(key.replace("f_key", "f_query").encode())).random_sample(shape)
    if key.endswith("running_var"):
        return torch.from_numpy((0.5 + draw).astype(np.float32))
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 3
    return torch.from_numpy(((2 * draw - 1) * np.sqrt(3 / fan_in)).astype(np.float32))


@pytest.mark.parametrize("name", RECORDED)
def test_public_implementation_computes_the_same(name: str) -> None:
    keys = json.loads((REFERENCES / "provenance.json").read_text())["files"][f"{name}.npz"]["keys"]
    state = {key: rule(key, shape) for key, shape in keys.items()}
    cls, arguments = RECORDED[name]
    block = {"BaseOC": BaseOC, "PyramidOC": PyramidOC, "ASPOC": ASPOC}[cls](**arguments)
    original = getattr(originals, cls)(**arguments)
    with np.load(REFERENCES / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]).double() for key in file}
    for module in (block, original):
        load_checkpoint(module, state)
    prepared = prepare_for_export(block).double()  # folded from FP32 parameters
    for module, limit in ((block, 1e-10), (original, 1e-10), (prepared, 2e-6)):
        module.eval().double()
        for key, x in arrays.items():
            if not key.endswith("output_0"):
                expected = arrays[f"{key.partition('.')[0]}.output_0"]
                with torch.no_grad():
                    assert (module(x) - expected).norm() <= limit * expected.norm()


def test_queries_and_keys_stay_one_module() -> None:
    block = randomise(BaseOC(8, 8, 4, 6))
    state = block.state_dict()
    other = BaseOC(8, 8, 4, 6)
    other.load_state_dict(state, strict=True)
    stage = other.stages[0]
    assert isinstance(stage, SelfAttentionStage)
    assert stage.f_query is stage.f_key
    assert "stages.0.f_query.0.weight" in state


def test_unequal_queries_and_keys_are_refused_by_name() -> None:
    state = randomise(PyramidOC(4, 4)).state_dict()
    state["stages.2.f_query.1.bias"] = state["stages.2.f_query.1.bias"] + 1
    with pytest.raises(UserError, match=r"stages\.2\.f_query\.1\.bias and stages\.2\.f_key\.1\.bias differ"):
        PyramidOC(4, 4).load_state_dict(state)


def test_context_comes_before_features() -> None:
    block = randomise(BaseOC(2, 2, 2, 2))
    first = block.conv_bn_dropout[0]
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        first.weight[:, :2] = 0  # the context's half
        x = torch.randn(1, 2, 3, 4)
        stage = block.stages[0]
        assert isinstance(stage, SelfAttentionStage)
        before = block(x)
        stage.f_value.weight.mul_(2)
        assert torch.equal(block(x), before)


def test_normalisation_is_abn() -> None:
    block = randomise(BaseOC(4, 4, 2, 2))
    flipped = BaseOC(4, 4, 2, 2).eval()
    state = block.state_dict()
    for name in state:
        if name.endswith(".1.weight"):
            state[name] = -state[name]
    flipped.load_state_dict(state)
    x = torch.randn(1, 4, 3, 5)
    with torch.no_grad():
        assert torch.equal(block(x), flipped(x))  # the sign of the scale does not count
    assert sum(isinstance(module, ABN) for module in block.modules()) == 2


def test_last_tiles_take_the_remainder_and_nothing_crosses_tiles() -> None:
    stage = randomise(TiledSelfAttentionStage(4, 2, 4, 3, scale=3)).double()
    x = torch.randn(1, 4, 8, 10, dtype=torch.float64, requires_grad=True)
    row, column = 7, 4  # the last row of tiles has rows 4 to 7, the middle column of tiles columns 3 to 5
    (gradient,) = torch.autograd.grad(stage(x)[0, :, row, column].sum(), x)
    seen = gradient[0].abs().sum(dim=0) > 0
    expected = torch.zeros(8, 10, dtype=torch.bool)
    expected[4:8, 3:6] = True
    assert torch.equal(seen, expected)


def test_coarse_context_is_interpolated_with_aligned_corners() -> None:
    stage = randomise(SelfAttentionStage(4, 2, 4, 3, scale=2))
    x = torch.randn(1, 4, 5, 7)
    with torch.no_grad():
        context = stage(x)
        pooled = nn.functional.max_pool2d(x, 2)
        coarse = stage.W(stage.attend(stage.f_key(pooled), stage.f_value(pooled)))
    assert coarse.shape[2:] == (2, 3)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(context[..., row, column], coarse[..., row, column])


@pytest.mark.parametrize(("height", "width", "axis"), [(5, 9, "height"), (9, 5, "width")])
def test_maps_smaller_than_the_tiles_are_refused(height: int, width: int, axis: str) -> None:
    with pytest.raises(UserError, match=f"the {axis} of object context is 5"):
        PyramidOC(4, 4)(torch.zeros(1, 4, height, width))


def test_maps_smaller_than_the_scale_are_refused() -> None:
    with pytest.raises(UserError, match="the height of object context is 1"):
        ASPOC(4, 4)(torch.zeros(1, 4, 1, 6))


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="in_channels=4 and out_channels=6"):
        BaseOC(4, 6, 2, 2)
    with pytest.raises(ValueError, match=r"sizes=\(1, 0\)"):
        PyramidOC(4, 4, sizes=(1, 0))
    with pytest.raises(ValueError, match=r"sizes=\(\)"):
        BaseOC(4, 4, 2, 2, sizes=())
    with pytest.raises(ValueError, match="out_features=1"):
        ASPOC(4, 1)
    with pytest.raises(ValueError, match=r"dilations=\(1, 2\)"):
        ASPOC(4, 4, dilations=(1, 2))
