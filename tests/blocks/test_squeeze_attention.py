"""The squeeze-and-attention block beyond the common contract, above all with the usual pool of 2."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from edgeattn.blocks.squeeze_attention import SqueezeAttention
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.originals import squeeze_attention as original
from edgeattn.validation.randomise import randomise


def test_the_usual_block_exports_for_every_even_size() -> None:
    block = randomise(SqueezeAttention(3, 4))
    twin = original.SqueezeAttention(3, 4).eval()
    twin.load_state_dict(block.state_dict())
    axes = ({2: "height", 3: "width"},)
    model = to_onnx(block, (torch.randn(1, 3, 4, 6),), input_names=["x"], output_names=["y"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 4, 6), (1, 3, 10, 2), (1, 3, 14, 22)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = twin(x)
            assert torch.allclose(block(x), expected, atol=1e-5)
        assert np.allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7), (1, 2)])
def test_odd_maps_are_refused_with_the_reason(height: int, width: int) -> None:
    with pytest.raises(UserError, match=rf"multiples of 2, got \({height}, {width}\)"):
        SqueezeAttention(3, 4)(torch.randn(1, 3, height, width))


def test_attention_scales_and_is_added() -> None:
    block = randomise(SqueezeAttention(3, 4))
    x = torch.randn(1, 3, 4, 6)
    with torch.no_grad():
        attention = block.conv_atten(torch.nn.functional.avg_pool2d(x, 2))
        upsampled = attention.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert torch.allclose(block(x), upsampled * block.conv(x) + upsampled, atol=1e-6)


def test_the_gate_bounds_the_attention() -> None:
    plain, gated = SqueezeAttention(3, 4), SqueezeAttention(3, 4, gate=True)
    for block in (plain, gated):
        torch.nn.init.constant_(block.conv_atten.conv[4].bias, 9.0)
        torch.nn.init.zeros_(block.conv_atten.conv[4].weight)
        torch.nn.init.zeros_(block.conv.conv[4].weight)
        block.eval()
    x = torch.randn(1, 3, 4, 6)
    assert torch.allclose(plain(x), torch.tensor(9.0))
    assert torch.allclose(gated(x), torch.tensor(9.0).sigmoid())


@pytest.mark.parametrize("name", ["ch_in", "ch_out", "pool", "depth"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        SqueezeAttention(**({"ch_in": 3, "ch_out": 4} | {name: 0}))


def test_unknown_upsampling_is_refused() -> None:
    with pytest.raises(ValueError, match="upsampling='cubic'"):
        SqueezeAttention(3, 4, upsampling="cubic")
