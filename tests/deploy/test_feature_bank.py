"""A feature bank as two graphs: over a sequence of windows they are the whole original operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from edgeattn.blocks.feature_bank import FeatureBankNonLocal
from edgeattn.deploy.feature_bank import FeatureBankGraphs, feature_bank_graphs
from edgeattn.foundation import UserError
from edgeattn.validation.originals import feature_bank as original
from edgeattn.validation.randomise import randomise

CHANNELS = (12, 10, 8)
CLIPS, WINDOW = 7, 5


@pytest.fixture(scope="module")
def block() -> FeatureBankNonLocal:
    made = randomise(FeatureBankNonLocal(*CHANNELS), seed=5)
    assert isinstance(made, FeatureBankNonLocal)
    return made


@pytest.fixture(scope="module")
def graphs(block: FeatureBankNonLocal) -> FeatureBankGraphs:
    return feature_bank_graphs(block)


def test_over_a_sequence_both_graphs_are_the_whole_operator(
    block: FeatureBankNonLocal, graphs: FeatureBankGraphs, tmp_path: Path
) -> None:
    whole = original.FeatureBankNonLocal(*CHANNELS).eval()
    whole.load_state_dict(block.state_dict(), strict=True)
    encode, attend = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in graphs.save(tmp_path)
    )
    generator = torch.Generator().manual_seed(2)
    clips = torch.randn(CLIPS, CHANNELS[1], generator=generator)
    # Each clip is encoded once, as it comes; the first two together.
    kept = list(encode.run(None, {"bank": clips[None, :2].numpy()})[0][0])
    kept += [encode.run(None, {"bank": clip[None, None].numpy()})[0][0, 0] for clip in clips[2:]]
    for moment in range(CLIPS):
        slots = range(moment - WINDOW // 2, moment + WINDOW // 2 + 1)
        regions = torch.randn(1 + moment % 3, CHANNELS[0], generator=generator)
        raw = torch.stack([clips[slot] if 0 <= slot < CLIPS else torch.zeros(CHANNELS[1]) for slot in slots])[None]
        with torch.no_grad():
            expected = whole(regions, raw).numpy()
        window = graphs.window([kept[slot] if 0 <= slot < CLIPS else None for slot in slots])
        found = attend.run(None, {"short_term": regions.numpy(), "encoded": window})[0]
        np.testing.assert_array_equal(found[:, : CHANNELS[0]], regions.numpy())
        latent, wanted = found[:, CHANNELS[0] :], expected[:, CHANNELS[0] :]
        assert np.linalg.norm(latent - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_the_graphs_divide_the_weights(graphs: FeatureBankGraphs) -> None:
    encoder, reader = ({item.name for item in graph.graph.initializer} for graph in (graphs.encode, graphs.attend))
    assert not any("non_local_layer" in name for name in encoder)
    assert not any(name.startswith("model.lt_feat_conv") for name in reader)


def test_a_window_without_slots_is_refused(graphs: FeatureBankGraphs) -> None:
    with pytest.raises(UserError, match="no slot"):
        graphs.window([])
