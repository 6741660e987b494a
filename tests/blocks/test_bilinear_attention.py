"""Bilinear attention networks beyond the common contract."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from edgeattn.blocks.bilinear_attention import BCNet, BiAttention, BilinearAttentionNetwork, Counter, WeightNormLinear
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def test_weight_norm_has_one_norm_for_the_whole_matrix() -> None:
    layer = randomise(WeightNormLinear(3, 2))
    assert layer.weight_g.shape == ()
    assert torch.allclose(layer.weight.norm(), layer.weight_g)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2), dim=None)
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(layer.weight_g)
        reference.parametrizations.weight.original1.copy_(layer.weight_v)
    assert torch.allclose(layer.weight, reference.weight)


def test_masked_regions_get_nothing_and_all_pairs_share_one_softmax() -> None:
    block = randomise(BiAttention(4, 5, 3, 2))
    v, q = torch.randn(1, 6, 4), torch.randn(1, 3, 5)
    mask = torch.tensor([[False, False, True, False, True, False]])
    attention, logits = block(v, q, mask)
    assert torch.equal(attention[:, :, mask[0]], torch.zeros(1, 2, 2, 3))
    assert torch.all(logits[:, :, mask[0]] == -65504.0)
    assert torch.allclose(attention.sum(dim=(2, 3)), torch.ones(1, 2))
    assert logits.isfinite().all()


def test_the_mask_is_part_of_the_exported_graph() -> None:
    block = randomise(BiAttention(4, 5, 3, 2))
    inputs = (torch.randn(1, 6, 4), torch.randn(1, 3, 5), torch.zeros(1, 6, dtype=torch.bool))
    model = to_onnx(block, inputs, input_names=["v", "q", "mask"], output_names=["p", "logits"])
    assert {entry.name for entry in model.graph.input} == {"v", "q", "mask"}
    assert any("mask" in name for node in model.graph.node for name in node.input)


def test_weights_of_an_export_hold_their_norm() -> None:
    block = randomise(BilinearAttentionNetwork(4, 3, glimpses=2, answers=3, objects=3))
    prepared = prepare_for_export(block)
    assert not any(name.endswith(("_g", "_v")) for name, _ in prepared.named_parameters())
    assert not list(prepared.counter.parameters())
    inputs = (torch.randn(2, 4, 4), torch.rand(2, 4, 4), torch.randn(2, 3, 3), torch.zeros(2, 4, dtype=torch.bool))
    for actual, expected in zip(prepared(*inputs), block(*inputs), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-6)


def test_attention_maps_come_from_the_first_words_alone() -> None:
    block = randomise(BilinearAttentionNetwork(4, 3, glimpses=2, answers=3, objects=3))
    inputs = (torch.randn(1, 4, 4), torch.rand(1, 4, 4), torch.randn(1, 3, 3), torch.zeros(1, 4, dtype=torch.bool))
    answers, attention = block(*inputs)
    with torch.no_grad():
        block.q_prj[0].linear.bias.add_(1.0)
    changed_answers, changed_attention = block(*inputs)
    assert torch.equal(attention, changed_attention)
    assert not torch.allclose(answers, changed_answers)


def test_boxes_of_padded_regions_do_not_count() -> None:
    block = randomise(BilinearAttentionNetwork(4, 3, glimpses=2, answers=3, objects=3))
    v, boxes, q = torch.randn(1, 4, 4), torch.rand(1, 4, 4), torch.randn(1, 3, 3)
    mask = torch.tensor([[False, True, False, True]])
    moved = torch.where(mask.unsqueeze(2), torch.rand(1, 4, 4), boxes)
    assert torch.equal(block(v, boxes, q, mask)[0], block(v, moved, q, mask)[0])


def test_counter_counts() -> None:
    counter = Counter(objects=4, already_sigmoided=True).eval()  # fresh functions are f(x) = x but for a share at 0
    with torch.no_grad():
        for function in counter.f:
            function.weight[0] = 0.0
    apart = torch.tensor([[0.0, 0.0, 0.1, 0.1], [0.3, 0.3, 0.4, 0.4], [0.6, 0.6, 0.7, 0.7], [0.0, 0.8, 0.1, 0.9]]).T[
        None
    ]
    same = apart[:, :, :1].expand(-1, -1, 4)
    everything, pair = torch.ones(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for boxes, relevance, count in ((apart, everything, 4), (same, everything, 1), (apart, pair, 2)):
        assert counter(boxes, relevance).argmax(dim=1).item() == count


def test_unused_functions_of_the_counter_are_stored_and_have_no_effect() -> None:
    counter = randomise(Counter(3))
    boxes, relevance = torch.rand(1, 4, 5), torch.randn(1, 5)
    before = counter(boxes, relevance)
    with torch.no_grad():
        for function in list(counter.f)[8:]:
            function.weight.zero_()
    assert torch.equal(counter(boxes, relevance), before)


def test_boxes_without_area_give_no_nan_in_the_exported_graph() -> None:
    counter = randomise(Counter(3))
    inputs = (torch.zeros(1, 4, 3), torch.randn(1, 3))
    model = to_onnx(counter, inputs, input_names=["boxes", "attention"], output_names=["counts"])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"boxes": inputs[0].numpy(), "attention": inputs[1].numpy()})
    assert torch.allclose(torch.from_numpy(actual), counter(*inputs), rtol=0, atol=1e-6)


def test_neighbours_are_summed_not_averaged() -> None:
    block = randomise(BCNet(4, 5, 2, None, k=3)).double()
    v, q, w = (torch.randn(1, *size, dtype=torch.float64) for size in ((3, 4), (2, 5), (3, 2)))
    products = (block(v, q) * w.unsqueeze(3)).sum(dim=(1, 2))
    assert torch.allclose(block.forward_with_weights(v, q, w), products.view(1, 2, 3).sum(dim=2), rtol=0, atol=1e-12)


def test_wrong_arguments_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="glimpse has to be from 1 to 32, got 0"):
        BiAttention(4, 5, 3, 0)
    with pytest.raises(ValueError, match="glimpse has to be from 1 to 32, got 33"):
        BiAttention(4, 5, 3, 33)
    with pytest.raises(ValueError, match="norm_h_mat needs h_out from 1 to 32, got h_out=None"):
        BCNet(4, 5, 3, None, norm_h_mat=True)
    with pytest.raises(ValueError, match="objects has to be at least 1"):
        Counter(0)
    with pytest.raises(UserError, match="takes the 5 most relevant boxes, but there are only 3"):
        Counter(5)(torch.rand(1, 4, 3), torch.randn(1, 3))
