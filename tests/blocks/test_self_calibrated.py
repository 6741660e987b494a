"""Self-calibrated convolution beyond the common contract."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from edgeattn.blocks.self_calibrated import SCBottleneck, SCConv, _nearest, _unambiguous, upsample
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.randomise import randomise


class Upsample(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return upsample(x[:, :, : x.shape[2] // 4, : x.shape[3] // 4], x.shape[2], x.shape[3])


def test_gathered_index_is_torchs_at_every_size() -> None:
    for size in range(4, 400):
        small = torch.arange(size // 4, dtype=torch.float32)[None, None]
        expected = F.interpolate(small, size=size)[0, 0].long()
        assert torch.equal(_nearest(size, size // 4, small.device), expected), size


@pytest.mark.parametrize("size", [114, 171, 186, 234, 279, 351, 354])
def test_sizes_that_runtimes_round_differently_are_gathered(size: int) -> None:
    assert not _unambiguous(size, size // 4)


def test_resize_stands_where_rounding_cannot_matter() -> None:
    assert all(_unambiguous(size, size // 4) for size in (4, 7, 14, 28, 56, 57, 112))
    assert not _unambiguous(10, 2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [(114, 14), (56, 57), (10, 30)])
def test_exported_upsampling_takes_the_same_pixels(size: tuple[int, int], dynamic: bool) -> None:
    module = Upsample()
    x = torch.randn(1, 1, *size)
    axes = ({2: "height", 3: "width"},) if dynamic else None
    example = torch.randn(1, 1, 13, 17) if dynamic else x
    model = to_onnx(module, (example,), input_names=["x"], output_names=["y"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert (session.run(None, {"x": x.numpy()})[0] == module(x).numpy()).all()


def test_incomplete_squares_are_not_seen() -> None:
    block = randomise(SCConv(4, 4))
    x = torch.randn(1, 4, 14, 14)
    changed = x.clone()
    changed[:, :, 12:] += 5.0
    assert torch.equal(block.k2(x), block.k2(changed))
    assert block.k2(torch.randn(1, 4, 7, 7)).shape == (1, 4, 1, 1)


def test_nothing_is_rectified_inside_and_only_the_last_convolution_strides() -> None:
    block = randomise(SCConv(4, 4, stride=2))
    assert not any(isinstance(module, torch.nn.ReLU) for module in block.modules())
    assert [module[-2].stride for module in (block.k2, block.k3, block.k4)] == [(1, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("shape", [(1, 4, 3, 8), (1, 4, 8, 3)])
def test_a_map_below_the_pool_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"4x4 pixels.*larger image"):
        SCConv(4, 4)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SCConv(4, 8), "inplanes=4, planes=8.*equal"),
        (lambda: SCConv(4, 4, padding=2), "padding=2.*dilation, 1"),
        (lambda: SCBottleneck(8, 4), "downsample=True.*16"),
    ],
)
def test_wrong_arguments_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
