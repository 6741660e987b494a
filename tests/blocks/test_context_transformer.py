"""Context-Transformer beyond the common contract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.context_transformer import ContextTransformer
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise

SPEC = BLOCKS.get("context-transformer")
LISTING = Path(__file__).parents[1] / "data" / "state_dicts" / "context_transformer.json"


def block(*kernels: int, **arguments: object) -> ContextTransformer:
    made = randomise(ContextTransformer(3, 4, kernels, **arguments))
    with torch.no_grad():
        made.scale.fill_(5.0)
    return made


def test_context_is_pooled_with_partial_windows_at_the_border() -> None:
    module = block(3)
    scores = torch.randn(1, 6, 4, 4)
    changed = scores.clone()
    changed[:, :, 3, 3] += 3.0  # outside every whole window
    assert (module(changed) - module(scores))[0, 0].abs().max() > 1e-3


def test_energies_are_unscaled_products_of_residual_projections() -> None:
    module = block(1)
    rows = torch.randn(5, 3)
    with torch.no_grad():
        query, key, value = (rows + rows @ h.weight.t() + h.bias for h in (module.theta, module.phi, module.g))
        novel = (
            rows + (torch.exp(query @ key.t()) / torch.exp(query @ key.t()).sum(1, keepdim=True)) @ value * module.Wz
        )
        logits = 5 * (novel / (novel * novel).sum(1, keepdim=True).sqrt()) @ module.OBJ_Target.weight.t()
    assert torch.allclose(module(rows.t().reshape(1, 3, 1, 5))[0], logits.softmax(1), atol=1e-6)


def test_boxes_follow_map_by_map_row_by_row_with_all_boxes_of_a_position_together() -> None:
    module = block(1, 1)
    with torch.no_grad():
        module.Wz.zero_()  # no context: every box for itself, as at the start of training
    boxes = torch.randn(14, 3)
    first = boxes[:12].reshape(2, 3, 6).permute(2, 0, 1)[None]  # 2x3 positions of 2 boxes
    second = boxes[12:].reshape(1, 1, 6).permute(2, 0, 1)[None]
    expected = (5 * torch.nn.functional.normalize(boxes) @ module.OBJ_Target.weight.t()).softmax(1)
    assert torch.allclose(module(first, second)[0], expected, atol=1e-6)


def test_rows_of_the_target_classifier_are_taken_as_they_are_stored() -> None:
    module, scores = block(1), torch.randn(1, 3, 1, 2)
    before = module(scores)
    with torch.no_grad():
        module.OBJ_Target.weight.mul_(2)
    assert not torch.allclose(module(scores), before, atol=1e-3)


def test_a_zero_feature_has_no_direction() -> None:
    module, scores = block(1), torch.zeros(1, 3, 1, 2)
    with torch.no_grad():
        module.Wz.zero_()
    assert module(scores).isnan().all()


def test_incremental_scores_put_the_source_classes_first() -> None:
    module, scores = block(1, incremental=True), torch.randn(1, 3, 1, 2)
    before = module(scores)
    with torch.no_grad():
        module.fc_base.bias[0] += 1
    ratio = module(scores) / before
    assert before.shape == (1, 2, 7)
    assert torch.allclose(ratio[..., 1:], ratio[..., 1:2].expand(-1, -1, 6), atol=1e-5)
    assert torch.allclose(ratio[..., 0] / ratio[..., 1], torch.tensor(1.0).exp().expand(1, 2), atol=1e-5)


def test_bias_of_phi_cancels() -> None:
    module, scores = block(2), torch.randn(1, 6, 3, 4)
    before = module(scores)
    with torch.no_grad():
        module.phi.bias.add_(3.0)
    assert torch.allclose(module(scores), before, atol=1e-6)


@pytest.mark.parametrize("incremental", [False, True])
def test_preparation_drops_layers_and_keeps_the_result(incremental: bool) -> None:
    module, scores = block(2, incremental=incremental), torch.randn(2, 6, 3, 4)
    prepared = prepare_for_export(module)
    assert torch.allclose(prepared(scores), module(scores), atol=1e-6)
    count = sum(parameter.numel() for parameter in prepared.parameters())
    assert count == sum(parameter.numel() for parameter in module.parameters()) - 12 - 3 - 1  # phi, Wz, scale
    assert isinstance(prepared.phi, torch.nn.Identity)


def attention_nodes(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "PixelAttention" for node in model.graph.node)


def test_static_sizes_attend_in_chunks_and_dynamic_ones_at_once() -> None:
    module, scores = block(1, chunk=16), torch.randn(1, 6, 4, 5)
    assert torch.allclose(module(scores), block(1, chunk=None)(scores), atol=1e-6)
    names = {"input_names": ["conf"], "output_names": ["scores"]}
    static = to_onnx(module, (scores,), **names)
    assert attention_nodes(static) == 3  # of 40 boxes
    assert attention_nodes(to_onnx(module, (scores,), **names, dynamic_axes=[{2: "height", 3: "width"}])) == 1
    assert attention_nodes(to_onnx(block(1, chunk=None), (scores,), **names)) == 1
    shaped = onnx.shape_inference.infer_shapes(inline_plugins(static), strict_mode=True, data_prop=True)
    sizes = [np.prod([dim.dim_value for dim in v.type.tensor_type.shape.dim]) for v in shaped.graph.value_info]
    assert max(sizes) == 16 * 40


def test_whole_network_gives_the_block_its_own_keys() -> None:
    keys = json.loads(LISTING.read_text())["keys"]
    state = {key: torch.zeros(()).expand(shape) for key, shape in keys.items()}
    module = ContextTransformer()
    report = load_checkpoint(module, state, key_map=SPEC.variant("official").key_map)
    assert set(report.used) == set(module.state_dict())
    assert {key.split(".")[0] for key in report.ignored} == {"base", "Norm", "extras", "conf", "loc", "obj"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"kernels": ()}, "kernels=\\(\\)"),
        ({"kernels": (3, 0)}, "at least 1"),
        ({"chunk": 0}, "chunk=0.*None"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextTransformer(**arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [([(1, 6, 2, 2)], "1 maps came for 2"), ([(1, 6, 2, 2), (1, 7, 2, 2)], "map 1 has 7 channels.*num_classes")],
)
def test_wrong_maps_are_refused(shapes: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        block(2, 1)(*(torch.zeros(shape) for shape in shapes))
