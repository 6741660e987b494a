"""Feature bank operators beyond the common contract."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.feature_bank import FeatureBankLayer, FeatureBankNonLocal, FeatureBankPool
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


def operator(**arguments: object) -> FeatureBankNonLocal:
    return randomise(FeatureBankNonLocal(12, 10, 8, **arguments))


def test_empty_slots_stay_in_the_softmax() -> None:
    block = operator()
    short_term, bank = torch.randn(2, 12), torch.randn(2, 5, 10)
    longer = torch.cat([bank, torch.zeros(2, 3, 10)], dim=1)
    assert not torch.allclose(block(short_term, longer), block(short_term, bank), atol=1e-3)
    assert torch.equal(block(short_term, bank)[:, :12], short_term)


def test_two_graphs_with_a_kept_bank_equal_the_whole() -> None:
    block = operator(num_non_local_layers=3)
    short_term, bank = torch.randn(3, 12), torch.randn(3, 7, 10)
    encoded = block.encode_bank(bank)
    graphs = [
        to_onnx(block, (bank,), input_names=["bank"], output_names=["encoded"], method="encode_bank"),
        to_onnx(
            block, (short_term, encoded), input_names=["short_term", "encoded"], output_names=["out"], method="attend"
        ),
    ]
    encoder, attend = (
        onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]) for graph in graphs
    )
    (kept,) = encoder.run(None, {"bank": bank.numpy()})
    (out,) = attend.run(None, {"short_term": short_term.numpy(), "encoded": kept})
    expected = block(short_term, bank)
    assert torch.allclose(torch.from_numpy(out), expected, atol=1e-5)
    assert torch.allclose(block.attend(short_term, encoded), expected, atol=1e-5)
    kinds = {node.op_type for node in graphs[1].graph.node}
    assert "Conv" not in kinds


def test_one_bank_may_serve_all_regions() -> None:
    block = operator()
    short_term, bank = torch.randn(4, 12), torch.randn(1, 7, 10)
    assert torch.allclose(block(short_term, bank), block(short_term, bank.expand(4, -1, -1)), atol=1e-6)


def test_caffe2_blobs_load_through_their_key_map() -> None:
    block = operator(num_non_local_layers=3, affine=False)
    blobs = {"lt_feat_conv": "lfb_1x1", "st_feat_conv": "box_pooled_fbonl_reduc"}
    for number in (1, 2, 3):
        parts = {"st_feat_conv": "theta", "lt_feat_conv": "phi", "global_conv": "g", "out_conv": "out"}
        for ours, theirs in parts.items():
            blobs[f"non_local_layer_{number}.{ours}.conv"] = f"lfb_nl{number - 1}_{theirs}"
    published = {}
    for name, value in block.state_dict().items():
        module, _, kind = name.rpartition(".")
        published[f"{blobs[module]}_{kind[0]}"] = value
    other = FeatureBankNonLocal(12, 10, 8, num_non_local_layers=3, affine=False)
    load_checkpoint(other, published, key_map=BLOCKS.get("feature-bank").variant("official").key_map)
    short_term, bank = torch.randn(2, 12), torch.randn(2, 5, 10)
    assert torch.equal(other(short_term, bank), block(short_term, bank))


def test_normalisation_has_parameters_in_mmaction2_only() -> None:
    assert "ln.weight" in FeatureBankLayer(8, 8, 8).state_dict()
    assert not any(".ln." in name for name in FeatureBankNonLocal(8, 8, 8, affine=False).state_dict())


def test_without_preactivation_the_latent_features_are_rectified() -> None:
    block = operator(pre_activate=False)
    assert (block(torch.randn(4, 12), torch.randn(4, 5, 10))[:, 12:] >= 0).all()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_non_local_layers is 0"):
        FeatureBankNonLocal(8, 8, 8, num_non_local_layers=0)
    with pytest.raises(ValueError, match="'sum'"):
        FeatureBankPool("sum")
