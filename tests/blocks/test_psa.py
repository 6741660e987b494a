"""Point-wise spatial attention beyond the common contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.psa import COLLECT, DISTRIBUTE, PointwiseSpatialAttention
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import psa as original
from edgeattn.validation.randomise import randomise


def build(**arguments: Any) -> PointwiseSpatialAttention:
    """Return a small randomised block."""
    block = randomise(PointwiseSpatialAttention(**{"in_channels": 6, "mid_channels": 4, **arguments}))
    assert isinstance(block, PointwiseSpatialAttention)
    return block


def update_of(block: PointwiseSpatialAttention, x: torch.Tensor) -> torch.Tensor:
    """Return the half of the output that attention computes."""
    with torch.no_grad():
        return block(x)[:, x.shape[1] :]


@pytest.mark.parametrize(
    ("mask_h", "mask_w"), [(1, 3), (5, 9), (7, 3), (11, 13)], ids=["small", "equal", "mixed", "large"]
)
@pytest.mark.parametrize("psa_type", [0, 1, 2])
def test_masks_of_any_size(mask_h: int, mask_w: int, psa_type: int) -> None:
    arguments = {"psa_type": psa_type, "mask_h": mask_h, "mask_w": mask_w}
    block = build(**arguments).double()
    twin = original.PointwiseSpatialAttention(in_channels=6, mid_channels=4, **arguments).eval().double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block(x), twin(x), atol=1e-12)


def test_a_mask_of_one_pixel_leaves_every_other_sender_the_weight_of_a_zero_logit() -> None:
    """Without the zeros in the softmax, each pixel would only see itself."""
    block = build(psa_type=COLLECT, mask_h=1, mask_w=1, shrink_factor=1)
    x = torch.randn(1, 6, 2, 3)
    with torch.no_grad():
        reduced = block.get_submodule("reduce")(x)
        own = block.get_submodule("attention")(reduced).flatten(2)  # (1, 1, 6)
        weights = torch.softmax(torch.diag(own[0, 0]), dim=0)
        expected = block.proj(torch.matmul(reduced.flatten(2), weights).view(reduced.shape))
    assert torch.allclose(update_of(block, x), expected, atol=1e-6)


def test_without_softmax_distribute_is_collect_with_the_roles_exchanged() -> None:
    """Both spread the same logits to matrices that are transposes of each other."""
    collect = build(psa_type=COLLECT, mask_h=3, mask_w=5, shrink_factor=1, psa_softmax=False)
    distribute = build(psa_type=DISTRIBUTE, mask_h=3, mask_w=5, shrink_factor=1, psa_softmax=False)
    features = torch.randn(1, 4, 3, 4)
    with torch.no_grad():
        matrix = [
            block._attend(features, block.get_submodule("attention"), direction).flatten(2)
            for block, direction in ((collect, COLLECT), (distribute, DISTRIBUTE))
        ]
        spread = collect._spread(collect.get_submodule("attention")(features))
    assert torch.allclose(matrix[0], torch.matmul(features.flatten(2), spread), atol=1e-6)
    assert torch.allclose(matrix[1], torch.matmul(features.flatten(2), spread.transpose(1, 2)), atol=1e-6)
    assert not torch.allclose(matrix[0], matrix[1], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (6, 7), (5, 8), (4, 9)])
@pytest.mark.parametrize("factor", [2, 3])
def test_mmseg_resizes_by_the_remainder_of_the_size(height: int, width: int, factor: int) -> None:
    arguments = {"mask_h": 7, "mask_w": 3, "proj_padding": 1, "align_corners": None, "shrink_factor": factor}
    block = build(**arguments).double()
    twin = original.PointwiseSpatialAttention(in_channels=6, mid_channels=4, **arguments).eval().double()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block(x), twin(x), atol=1e-10)


def test_mmseg_projection_adds_a_ring_that_the_official_one_lacks() -> None:
    arguments = {"mask_h": 3, "mask_w": 3, "shrink_factor": 1}
    official, mmseg = build(**arguments), build(**arguments, proj_padding=1, align_corners=False)
    x = torch.randn(1, 6, 4, 5)
    assert not torch.allclose(update_of(official, x), update_of(mmseg, x), atol=1e-3)


def test_mmseg_state_loads_through_its_key_map() -> None:
    block = build(mask_h=3, mask_w=3)
    published = {f"decode_head.{key}": value for key, value in block.state_dict().items()}
    for ours, theirs in (("0", "conv"), ("1", "bn")):
        for name in ("reduce", "reduce_p", "proj"):
            published = {key.replace(f"{name}.{ours}.", f"{name}.{theirs}."): value for key, value in published.items()}
        for name in ("attention", "attention_p"):
            published = {
                key.replace(f"{name}.{ours}.", f"{name}.0.{theirs}."): value for key, value in published.items()
            }
    published = {key.replace(".3.weight", ".1.weight"): value for key, value in published.items()}
    published |= {"backbone.stem.0.weight": torch.zeros(1), "decode_head.bottleneck.conv.weight": torch.zeros(1)}
    other = PointwiseSpatialAttention(6, 4, mask_h=3, mask_w=3)
    report = load_checkpoint(other, published, key_map=BLOCKS.get("psa").variant("mmseg").key_map)
    assert not report.missing
    assert not report.unexpected
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in other.state_dict().items())


def test_the_reduction_runs_on_the_sampled_pixels_only() -> None:
    block = build(mask_h=5, mask_w=5)
    model = to_onnx(block, (torch.randn(1, 6, 5, 5),), input_names=["x"], output_names=["y"])
    assert [node.op_type for node in model.graph.node].count("Resize") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"psa_type": 3}, "psa_type"),
        ({"shrink_factor": 0}, "shrink_factor"),
        ({"mask_h": 0, "compact": True}, "mask_h"),
        ({"mask_w": 4}, "mask_w=4"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointwiseSpatialAttention(6, 4, **arguments)


def test_a_size_that_cannot_be_put_back_is_refused() -> None:
    with pytest.raises(UserError, match="multiples of 2"):
        build(mask_h=3, mask_w=3)(torch.randn(1, 6, 5, 6))


def test_a_compact_mask_fits_one_size() -> None:
    block = build(mask_h=3, mask_w=4, compact=True)
    with pytest.raises(UserError, match="mask of 3x4, but the shrunk map is 4x3"):
        block(torch.randn(1, 6, 7, 5))
