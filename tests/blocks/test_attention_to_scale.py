"""Attention to scale beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.attention_to_scale import AttentionToScale
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


def maps(scales: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    sizes = [(5, 8), (3, 4), (4, 6)][:scales]
    features = [torch.randn(1, 6, *size, generator=generator) for size in sizes]
    return (*features, *(torch.randn(1, 4, *size, generator=generator) for size in sizes))


def test_two_scales_need_one_map_of_differences() -> None:
    block = randomise(AttentionToScale(channels=6, hidden=8))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    prepared = prepare_for_export(block)
    assert torch.allclose(prepared(*maps(2)), block(*maps(2)), rtol=0, atol=1e-6)
    assert prepared.att.conv2.out_channels == 1
    saved = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in prepared.parameters())
    assert saved == 8 + 1
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("scales", [2, 3])
def test_no_export_concatenates(scales: int) -> None:
    block = randomise(AttentionToScale(scales=scales, channels=6, hidden=8))
    inputs = maps(scales)
    names = [f"x{index}" for index in range(len(inputs))]
    model = to_onnx(block, inputs, input_names=names, output_names=["y"])
    kinds = [node.op_type for node in model.graph.node]
    assert "Concat" not in kinds
    assert ("Softmax" in kinds) == (scales == 3)
    assert kinds.count("Conv") == scales + 1


def test_weights_are_shared_by_all_classes_and_add_up_to_one() -> None:
    block = randomise(AttentionToScale(scales=3, channels=6, hidden=8))
    features = maps(3)[:3]
    constant = [torch.full((1, 2, *entry.shape[2:]), 1.5) for entry in features]
    assert torch.allclose(block(*features, *constant), torch.full((1, 2, 5, 8), 1.5))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scales has to be at least 2, got 1"):
        AttentionToScale(scales=1)
    with pytest.raises(ValueError, match="sigmoid weighs two scales, but scales=3"):
        AttentionToScale(scales=3, sigmoid=True)
    with pytest.raises(UserError, match="takes 6 maps, got 4"):
        AttentionToScale(scales=3, channels=6, hidden=8)(*maps(2))
