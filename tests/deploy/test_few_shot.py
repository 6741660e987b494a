"""CAN as two graphs: together they are the whole original network, for any episode."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.deploy.few_shot import FewShotGraphs, few_shot_graphs
from edgeattn.foundation import UserError
from edgeattn.models.can import CAN, episode_membership
from edgeattn.validation.originals import can as original
from edgeattn.validation.randomise import randomise

SMALL = {"num_classes": 4, "base_width": 4, "map_size": (3, 2), "reduction": 2}
SIZE = (48, 32)
# Class of every support image: unequal numbers, in no order.
EPISODES = {"one-shot": [0, 1, 2, 3, 4], "unequal": [1, 0, 1, 2, 1, 0, 2], "two-way": [1, 0]}


def small() -> CAN:
    """Return a network whose features depend on the image: random gains of less than 1 would lose it on the way."""
    model = randomise(CAN(**SMALL), seed=11)  # type: ignore[arg-type]
    assert isinstance(model, CAN)
    with torch.no_grad():
        for module in model.base.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.abs_().add_(4)
    return model


@pytest.fixture(scope="module")
def graphs() -> FewShotGraphs:
    return few_shot_graphs(small(), SIZE)


@pytest.fixture(scope="module")
def sessions(
    graphs: FewShotGraphs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, onnxruntime.InferenceSession]:
    paths = graphs.save(tmp_path_factory.mktemp("can"))
    return {path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths}


@pytest.mark.parametrize("labels", EPISODES.values(), ids=EPISODES)
def test_both_graphs_are_the_whole_network(
    sessions: dict[str, onnxruntime.InferenceSession], labels: list[int]
) -> None:
    whole = original.CAN(**SMALL).eval()  # type: ignore[arg-type]
    whole.load_state_dict(small().state_dict(), strict=True)
    generator = torch.Generator().manual_seed(len(labels))
    support = torch.randn(len(labels), 3, *SIZE, generator=generator)
    queries = torch.randn(4, 3, *SIZE, generator=generator)
    membership = episode_membership(labels, max(labels) + 1)
    with torch.no_grad():
        expected = whole.episode(support[None], queries[None], membership).numpy()
    features = [sessions["embed"].run(None, {"images": batch.numpy()})[0] for batch in (support, queries)]
    feed = {
        "support_features": features[0][None],
        "membership": membership.numpy(),
        "query_features": features[1][None],
    }
    found = sessions["compare"].run(None, feed)[0]
    assert found.shape == (1, 4, max(labels) + 1)
    # Scores are cosines of similar features: judge the error by how much they differ, not by their size.
    assert expected.std() > 0.03
    assert np.abs(found - expected).max() <= 2e-5


def test_a_declared_episode_is_the_same_network() -> None:
    model = small()
    images = torch.randn(6, 2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.embed(images.flatten(0, 1)).unflatten(0, (6, 2)).transpose(0, 1)
        membership = episode_membership(range(5), 5).expand(2, -1, -1)
        scores = model.compare(features[:, :5], membership, features[:, 5:])
        assert torch.allclose(model(*images), scores[:, 0], atol=1e-5)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="64x64 give features of 4x4, but the network compares features of 3x2"):
        few_shot_graphs(small(), (64, 64))


def test_graphs_hold_only_what_they_need(graphs: FewShotGraphs) -> None:
    weights = [{tensor.name for tensor in graph.graph.initializer} for graph in (graphs.embed, graphs.compare)]
    assert not any("clasifier" in name or "cam" in name for name in weights[0])
    assert not any("clasifier" in name or "base" in name for name in weights[1])
