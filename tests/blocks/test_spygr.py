"""Spatial pyramid graph reasoning beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.spygr import GraphReasoning, SpatialPyramidGraphReasoning
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def test_the_laplacian_removes_what_all_positions_share() -> None:
    """With one node of equal similarity everywhere, the Laplacian subtracts the mean over the positions."""
    block = randomise(GraphReasoning(3, 1)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        block.phi.weight.zero_()
        block.phi.bias.fill_(2.0)
        expected = torch.relu(block.weight(x - x.mean(dim=(2, 3), keepdim=True)))
        assert torch.allclose(block(x), expected)


def test_positions_without_similarity_keep_their_features() -> None:
    block = randomise(GraphReasoning(3, 4))
    x = torch.randn(1, 3, 4, 5)
    with torch.no_grad():
        block.phi.weight.zero_()
        block.phi.bias.fill_(-1.0)
        assert torch.allclose(block(x), torch.relu(block.weight(x)), atol=1e-6)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_shared_levels_are_one_set_of_weights(upsampling: str) -> None:
    shared = randomise(SpatialPyramidGraphReasoning(4, 3, levels=3, shared=True, upsampling=upsampling))
    assert {key.split(".")[1] for key in shared.state_dict()} == {"0"}
    own = SpatialPyramidGraphReasoning(4, 3, levels=3, upsampling=upsampling).eval()
    own.load_state_dict(
        {key.replace("levels.0", f"levels.{i}"): value for key, value in shared.state_dict().items() for i in range(3)}
    )
    x = torch.randn(1, 4, 9, 6)
    with torch.no_grad():
        assert torch.equal(shared(x), own(x))


def test_a_map_too_small_for_the_levels_is_refused() -> None:
    with pytest.raises(UserError, match=r"width .* at least 4, got 3"):
        SpatialPyramidGraphReasoning(4, 3, levels=3)(torch.randn(1, 4, 4, 3))


@pytest.mark.parametrize("arguments", [{"channels": 0}, {"nodes": 0}, {"levels": 0}, {"upsampling": "cubic"}])
def test_bad_arguments_are_refused(arguments: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|nearest or bilinear"):
        SpatialPyramidGraphReasoning(**{"channels": 4, **arguments})  # type: ignore[arg-type]
