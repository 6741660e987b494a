"""Efficient channel attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.efficient_channel import EfficientChannelAttention, kernel_size_of
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_gates_see_neighbours_in_order_and_zeros_beyond_the_ends(size: int, private: bool) -> None:
    layer = EfficientChannelAttention(4, size, private=private).double()
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    means = x.mean(dim=(0, 2, 3)).tolist()
    with torch.no_grad():
        weights = layer.conv.weight[:, 0].tolist()
        gates = (layer(x) / x)[0, :, 0, 0]
    for channel in range(4):
        kernel = weights[channel if private else 0]
        logit = sum(kernel[j] * means[channel + j - size // 2] for j in range(size) if 0 <= channel + j - size // 2 < 4)
        assert torch.isclose(gates[channel], torch.tensor(logit, dtype=torch.float64).sigmoid())


@pytest.mark.parametrize("shape", [(1, 1, 7), (512, 1, 3)])
def test_kernel_size_comes_from_the_weight(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    layer = EfficientChannelAttention(512, kernel_size_of(weight), private=shape[0] > 1)
    layer.load_state_dict({"conv.weight": weight})


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 3), (1, 1, 3, 3)])
def test_other_weights_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"conv\.weight"):
        kernel_size_of(torch.zeros(shape))


def test_the_gate_is_neither_expanded_nor_a_one_dimensional_convolution() -> None:
    layer = EfficientChannelAttention(6, 3)
    model = to_onnx(layer, (torch.randn(1, 6, 3, 4),), input_names=["x"], output_names=["y"])
    operators = [node.op_type for node in model.graph.node]
    assert operators == ["ReduceMean", "Transpose", "Conv", "Transpose", "Sigmoid", "Mul"]
    assert [len(tensor.dims) for tensor in model.graph.initializer if tensor.dims and tensor.data_type == 1] == [4]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="k_size=4"):
        EfficientChannelAttention(8, 4)
    with pytest.raises(ValueError, match="k_size=-1"):
        EfficientChannelAttention(8, -1)
    with pytest.raises(ValueError, match="channel=0"):
        EfficientChannelAttention(0)
    with pytest.raises(ValueError, match="not both"):
        EfficientChannelAttention(8, private=True, circular=True)
    with pytest.raises(ValueError, match="shorter than half of k_size=7"):
        EfficientChannelAttention(2, 7, circular=True)
