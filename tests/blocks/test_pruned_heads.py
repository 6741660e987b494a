"""Pruned heads beyond the common contract."""

from __future__ import annotations

import math

import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.multi_head import FoldedAttention
from edgeattn.blocks.pruned_heads import ConstantAttention, GatedHeadAttention
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import pruned_heads as originals
from edgeattn.validation.randomise import randomise

CLOSED, OPEN = -3.0, 3.0


def gated(*log_a: float) -> GatedHeadAttention:
    block = randomise(GatedHeadAttention(12, len(log_a)))
    with torch.no_grad():
        block.gate.log_a.copy_(torch.tensor(log_a).reshape(1, -1, 1, 1))
    return block


def test_gates_of_evaluation_know_no_temperature() -> None:
    edge = math.log(11)
    gates = gated(-edge - 1e-3, edge + 1e-3, 1.0, -edge + 1e-2).gates()
    assert gates[0] == 0
    assert gates[1] == 1
    assert torch.allclose(gates[2], 1.2 * torch.sigmoid(torch.tensor(1.0)) - 0.1)
    assert 0 < gates[3] < 1e-2


def test_closed_heads_are_removed_and_nothing_else_changes() -> None:
    """Heads 0 and 2 of the first layer and 1 of the second are closed; head 3 of the second is fractional."""
    model = nn.Sequential(gated(CLOSED, OPEN, CLOSED, OPEN), gated(OPEN, CLOSED, OPEN, 0.5))
    original = nn.Sequential(*(originals.GatedHeadAttention(12, 4) for _ in range(2)))
    original.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 5, 12)
    prepared = prepare_for_export(model)
    assert [layer.num_heads for layer in prepared] == [2, 3]
    assert [tuple(layer.query.weight.shape) for layer in prepared] == [(6, 12), (9, 12)]
    assert [tuple(layer.out.weight.shape) for layer in prepared] == [(12, 6), (12, 9)]
    assert torch.allclose(prepared(x), original(x), atol=1e-6)
    assert sum(map(torch.numel, prepared.parameters())) < 0.65 * sum(map(torch.numel, model.parameters()))
    assert model[0].mem_conv.W.shape == (12, 36)


def test_scale_is_that_of_the_head_not_of_the_heads_left() -> None:
    block = gated(CLOSED, OPEN, CLOSED)
    prepared = prepare_for_export(block)
    assert isinstance(prepared, FoldedAttention)
    expected = block.mem_conv.W[:, 4:8].t() / math.sqrt(4)
    assert torch.allclose(prepared.query.weight, expected)


def test_fractional_gate_is_kept_in_the_output_matrix() -> None:
    block = gated(0.0, OPEN, CLOSED)
    prepared = prepare_for_export(block)
    assert torch.allclose(prepared.out.weight[:, :4], 0.5 * block.out_conv.W[:4].t())
    assert torch.allclose(prepared.out.weight[:, 4:], block.out_conv.W[4:8].t())


def test_without_heads_the_output_bias_is_left() -> None:
    block = gated(CLOSED, CLOSED, CLOSED)
    prepared = prepare_for_export(block)
    assert isinstance(prepared, ConstantAttention)
    model = to_onnx(
        block, (torch.randn(2, 5, 12),), input_names=["x"], output_names=["y"], dynamic_axes=[{0: "batch", 1: "length"}]
    )
    x = torch.randn(3, 7, 12)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), block.out_conv.b.expand(3, 7, 12))
    assert torch.allclose(block(x), block.out_conv.b.expand(3, 7, 12))
    assert block.out_conv.b.abs().min() > 0


@pytest.mark.parametrize(("scope", "cross"), [("enc_attn-0", False), ("dec_enc_attn-5", True)])
def test_variables_of_tensorflow_load_as_they_are(scope: str, cross: bool) -> None:
    block = randomise(GatedHeadAttention(12, 3, cross=cross))
    names = ["mem_conv/W", "mem_conv/b", "out_conv/W", "out_conv/b", "gate/log_a"]
    names += ["query_conv/W", "query_conv/b"] if cross else []
    published = {f"mod/{scope}/{name}:0": block.state_dict()[name.replace("/", ".")].clone() for name in names}
    other = GatedHeadAttention(12, 3, cross=cross).eval()
    load_checkpoint(other, published, key_map=BLOCKS.get("pruned-heads").variants[0].key_map)
    x = torch.randn(1, 5, 12)
    assert torch.equal(other.cross(x, x), block.cross(x, x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5. Give a divisor of embed_dim"),
        ({"num_heads": 3, "alive": (1, 0)}, "Give 0 or 1 for each of the 3 heads"),
        ({"num_heads": 3, "alive": (1, 0, 2)}, "Give 0 or 1 for each of the 3 heads"),
    ],
)
def test_heads_that_do_not_exist_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedHeadAttention(12, **arguments)
