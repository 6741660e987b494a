"""Selective kernels beyond the common contract."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.selective_kernel import SelectiveKernel, SKBottleneck, SKConv, divisible
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("block", "channels"),
    [
        (SKConv(8, groups=4), 8),
        (SKConv(64, groups=4, reduction=8, minimum=4), 64),
        (SelectiveKernel(8), 8),
        (SKBottleneck(64, 16, groups=4), 64),
    ],
    ids=["ppp-joined", "ppp-narrow", "timm", "insight"],
)
def test_two_branches_need_the_difference_of_their_logits_only(block: nn.Module, channels: int) -> None:
    randomise(block)
    x = torch.randn(2, channels, 4, 5)
    prepared = prepare_for_export(block)
    assert torch.allclose(prepared(x), block(x), rtol=1e-5, atol=1e-6)
    assert parameters(prepared) < parameters(block)
    model = to_onnx(block, (x,), input_names=["x"], output_names=["y"])
    assert "Softmax" not in {node.op_type for node in model.graph.node}


def test_linear_layers_are_joined_only_where_that_saves_weights() -> None:
    assert isinstance(SKConv(8, groups=4).prepare_for_export().fc, nn.Identity)
    assert isinstance(SKConv(64, reduction=8, minimum=4).prepare_for_export().fc, nn.Linear)


def test_selection_is_a_mean_of_the_branches() -> None:
    block = randomise(SKConv(8, branches=3, groups=2))
    x = torch.randn(1, 8, 4, 5)
    branches = torch.stack([conv(x) for conv in block.convs])
    assert (block(x) <= branches.amax(dim=0) + 1e-6).all()
    assert (block(x) >= branches.amin(dim=0) - 1e-6).all()


def test_hidden_layers_have_the_published_widths() -> None:
    official = dict(BLOCKS.get("selective-kernel").variant("official").arguments) | {"groups": 32}
    widths = [
        SelectiveKernel(**(official | {"in_channels": channels})).attn.fc_reduce.out_channels
        for channels in (128, 256, 512, 1024)
    ]
    assert widths == [32, 32, 32, 64]
    assert SKBottleneck(256, 64).conv_fc1.out_channels == 4  # no minimum
    assert SKConv(64).fc.out_features == 32
    assert SKConv(40, minimum=8).fc.out_features == 20
    assert divisible(12, 8) == 16  # 8 would be more than a tenth below


def test_caffe_layers_load_by_their_names() -> None:
    variant = BLOCKS.get("selective-kernel").variant("official")
    block = randomise(SelectiveKernel(**variant.arguments))
    names = {
        "paths.0.conv.": "conv3_2/3x3g32.",
        "paths.0.bn.": "conv3_2/3x3g32/bn.",
        "paths.1.conv.": "conv3_2/3x3g32d2.",
        "paths.1.bn.": "conv3_2/3x3g32d2/bn.",
        "attn.fc_reduce.": "conv3_2/B_fc1.",
        "attn.bn.": "conv3_2/B_fc1/bn.",
        "attn.fc_select.": "conv3_2/B_fc2.",
    }
    published = {}
    for key, value in block.state_dict().items():
        start = next(start for start in names if key.startswith(start))
        published[names[start] + key.removeprefix(start)] = value
    report = load_checkpoint(SelectiveKernel(**variant.arguments), published, key_map=variant.key_map)
    assert not report.missing
    assert not report.unexpected


def test_official_second_branch_is_dilated_and_that_of_insight_is_not() -> None:
    official = SelectiveKernel(**BLOCKS.get("selective-kernel").variant("official").arguments)
    assert [path.conv.dilation for path in official.paths] == [(1, 1), (2, 2)]
    assert SKBottleneck(512, 128).conv2g.dilation == (1, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelectiveKernel(8, kernel_sizes=(3, 4)), "kernel_sizes=.*odd"),
        (lambda: SelectiveKernel(9), "in_channels=9.*2 shares"),
        (lambda: SKConv(8, branches=0), "branches=0.*at least 1"),
        (lambda: SKConv(9), "features=9.*multiple of groups=8"),
        (lambda: SKBottleneck(64, 24), "planes=24.*groups=32"),
        (lambda: SKBottleneck(64, 32), "downsample=True.*128"),
    ],
)
def test_wrong_arguments_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
