"""Split attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.split_attention import ResNeStBottleneck, SplitAttention
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.validation.randomise import randomise


def operators(block: torch.nn.Module, channels: int) -> list[str]:
    model = to_onnx(block, (torch.randn(1, channels, 4, 5),), input_names=["x"], output_names=["y"])
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("groups", "radix"), [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 3)])
def test_prepared_form_reorders_nothing(groups: int, radix: int) -> None:
    channels = 2 * groups * radix
    block = randomise(SplitAttention(channels, 6, groups=groups, radix=radix, inter_channels=12))
    prepared = prepare_for_export(block)
    x = torch.randn(2, channels, 4, 5)
    assert torch.allclose(prepared(x), block(x), rtol=1e-5, atol=1e-6)
    found = operators(block, channels)
    assert "Transpose" not in found
    assert ("Softmax" in found) == (radix > 2)
    if radix == 2:
        assert prepared.fc2.weight.numel() == block.fc2.weight.numel() / 2


def test_logits_are_cardinality_major_and_splits_radix_major() -> None:
    block = randomise(SplitAttention(8, 4, groups=2, radix=2))
    block.fc2.weight.data.zero_()
    order = torch.tensor([0.0, 0, 9, 9, 9, 9, 0, 0])  # group 0: split 1; group 1: split 0
    block.fc2.bias.data.copy_(order)
    x = torch.randn(1, 8, 4, 5)
    first, second = block.bn0(block.conv(x)).relu().split(4, dim=1)
    expected = torch.cat([second[:, :2], first[:, 2:]], dim=1)
    assert torch.allclose(block(x), expected, atol=2e-3)


def test_one_split_is_gated_and_not_normalised() -> None:
    block = randomise(SplitAttention(4, 4, radix=1))
    block.fc2.weight.data.zero_()
    block.fc2.bias.data.zero_()
    x = torch.randn(1, 4, 4, 5)
    assert torch.allclose(block(x), block.bn0(block.conv(x)).relu() / 2)


def test_hidden_layer_has_at_least_32_channels() -> None:
    assert SplitAttention(8, 8).fc1.out_channels == 32
    assert SplitAttention(128, 128).fc1.out_channels == 64
    assert SplitAttention(168, 168).fc1.out_channels == 84
    assert SplitAttention(168, 168, inter_channels=88).fc1.out_channels == 88  # timm's multiple of 8


@pytest.mark.parametrize(
    ("arguments", "before", "after", "stride"),
    [
        ({"stride": 2}, False, True, (1, 1)),
        ({"stride": 2, "avd_first": True}, True, False, (1, 1)),
        ({"stride": 2, "avd": False}, False, False, (2, 2)),
        ({"is_first": True}, False, True, (1, 1)),
        ({}, False, False, (1, 1)),
    ],
)
def test_pool_takes_the_stride(arguments: dict, before: bool, after: bool, stride: tuple[int, int]) -> None:
    block = ResNeStBottleneck(16, 4, downsample=True, **arguments)
    assert (block.pool_before is not None, block.pool_after is not None) == (before, after)
    assert block.conv2.conv.stride == stride


def test_pool_counts_zeros_and_that_of_the_shortcut_does_not() -> None:
    block = ResNeStBottleneck(16, 4, stride=2, downsample=True)
    ones = torch.ones(1, 1, 3, 3)
    assert block.pool_after(ones)[0, 0, 0, 0] == pytest.approx(4 / 9)
    assert torch.equal(block.downsample[0](ones), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SplitAttention(8, 8, radix=0), "radix=0.*at least 1"),
        (lambda: SplitAttention(6, 8, groups=2), "in_channels=6.*groups=2.*radix=2"),
        (lambda: ResNeStBottleneck(8, 4), "downsample=True.*16"),
    ],
)
def test_wrong_arguments_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
