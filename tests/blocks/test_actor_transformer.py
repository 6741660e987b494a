"""Actor-Transformer beyond the common contract."""

from __future__ import annotations

import math

import onnxruntime
import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.actor_transformer import ActorTransformer, CentreEncoding
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise

SPEC = BLOCKS.get("actor-transformer")
DIN_ENCODER = {
    *("Q_W.weight", "K_W.weight", "V_W.weight", "FFN_linear1.weight", "FFN_linear1.bias", "FFN_linear2.weight"),
    *("FFN_linear2.bias", "layernorm1.weight", "layernorm1.bias", "layernorm2.weight", "layernorm2.bias"),
}


def block(**arguments: object) -> ActorTransformer:
    return randomise(ActorTransformer(8, **arguments))


def clip(frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, frames, 5, 8), torch.rand(2, frames, 5, 2) * torch.tensor([1280.0, 720.0])


def test_centres_are_encoded_by_sine_and_cosine_in_turn_x_first() -> None:
    encoded = CentreEncoding(12).double()(torch.tensor([[100.0, 7.5]], dtype=torch.float64))[0]
    for axis, position in enumerate((100.0, 7.5)):
        for index in range(6):
            angle = position / 10000 ** (2 * (index // 2) / 6)
            wanted = math.cos(angle) if index % 2 else math.sin(angle)
            assert abs(encoded[6 * axis + index].item() - wanted) < 1e-4


def test_cosine_of_large_coordinates_survives_the_quarter_turn() -> None:
    pixels = torch.arange(0, 1280, 0.25)
    cosine = CentreEncoding(4)(torch.stack([pixels, pixels], dim=1))[:, 1]
    assert (cosine - pixels.double().cos()).abs().max() < 1e-4


def test_state_is_din_and_positions_have_none() -> None:
    assert set(block().state_dict()) == {f"AT.{name}" for name in DIN_ENCODER}


def test_actors_may_come_in_any_order() -> None:
    module = block(num_activities=3, num_actions=4)
    features, centres = clip()
    order = torch.tensor([3, 0, 4, 1, 2])
    activities, actions = module(features, centres)
    moved_activities, moved_actions = module(features[:, :, order], centres[:, :, order])
    assert torch.allclose(moved_activities, activities, atol=1e-5)
    assert torch.allclose(moved_actions, actions[:, order], atol=1e-5)
    swapped, _ = module(features[:, :, order], centres)  # a position belongs to its actor
    assert not torch.allclose(swapped, activities, atol=1e-3)


def test_group_is_the_maximum_over_actors_and_then_the_mean_over_frames() -> None:
    module, inputs = block(num_activities=3), clip()
    encoder = block()
    encoder.load_state_dict({key: value for key, value in module.state_dict().items() if key.startswith("AT.")})
    strongest = encoder(*inputs).max(dim=2).values
    assert torch.allclose(module(*inputs), module.fc_activities(strongest).mean(dim=1), atol=1e-5)


def test_pooling_first_differs_unless_there_is_one_frame() -> None:
    folded, pooled = (block(num_activities=3, temporal_pooled_first=first) for first in (False, True))
    assert not torch.allclose(folded(*clip()), pooled(*clip()), atol=1e-2)
    inputs = clip(frames=1)
    assert torch.allclose(folded(*inputs), pooled(*inputs), atol=1e-6)


def test_preparation_drops_the_keys_projection() -> None:
    module, inputs = block(num_activities=3), clip()
    prepared = prepare_for_export(module)
    assert torch.allclose(prepared(*inputs), module(*inputs), atol=1e-5)
    dropped = set(module.state_dict()) - set(prepared.state_dict())
    assert dropped == {"AT.K_W.weight"}


def test_whole_din_checkpoint_loads() -> None:
    module = block(num_activities=3, num_actions=4)
    around = dict.fromkeys(["backbone.conv1.weight", "fc_emb_1.weight", "nl_emb_1.bias"], torch.zeros(2))
    state = {**module.state_dict(), **around}
    other = ActorTransformer(8, num_activities=3).eval()
    report = load_checkpoint(other, state, key_map=SPEC.variant("official").key_map)
    assert set(report.ignored) == {*around, "fc_actions.weight", "fc_actions.bias"}
    assert torch.equal(other(*(inputs := clip())), module(*inputs)[0])


def test_fp16_form_reads_fractions_of_pixels() -> None:
    module = block(num_activities=3)
    features, centres = clip()
    centres = centres / 4 + 1024.3
    assert (centres.half() - centres).abs().max() > 0.3
    names = ["features", "centres"]
    model = to_fp16(to_onnx(module, (features, centres), input_names=names, output_names=["scores"])).model
    session = onnxruntime.InferenceSession(emulate_fp16(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"features": features.numpy(), "centres": centres.numpy()})
    expected = module.double()(features.double(), centres.double())
    assert (torch.from_numpy(actual) - expected).norm() / expected.norm() < 1e-2


def test_one_sine_serves_both_coordinates() -> None:
    model = to_onnx(block(), clip(), input_names=["features", "centres"], output_names=["actors"])
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Sin") == 1
    assert "Cos" not in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_dim": 6}, "6 channels.*multiple of 4"),
        ({"in_dim": 0}, "multiple of 4"),
        ({"in_dim": 8, "num_activities": 0}, "num_activities=0.*None"),
        ({"in_dim": 8, "num_actions": -1}, "num_actions=-1.*None"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActorTransformer(**arguments)
