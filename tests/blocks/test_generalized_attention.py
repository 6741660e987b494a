"""Generalised attention beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks.generalized_attention import GeneralizedAttention
from edgeattn.export.to_onnx import prepare_for_export, to_onnx
from edgeattn.foundation import UserError
from edgeattn.validation.originals.generalized_attention import GeneralizedAttention as Original
from edgeattn.validation.randomise import randomise

TYPES = [f"{number:04b}" for number in range(1, 16)]
AMBIGUOUS = [kind for kind in TYPES if kind[1] == "1" and kind[3] == "0"]


def pair(channels: int = 12, **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    block = randomise(GeneralizedAttention(channels, num_heads=2, **arguments))
    original = Original(channels, num_heads=2, **arguments)
    original.load_state_dict(block.state_dict())
    return block.double(), original.double().eval()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("q_stride", "kv_stride"), [(1, 2), (2, 3)])
def test_every_type_equals_the_original(kind: str, transposed: bool, q_stride: int, kv_stride: int) -> None:
    arguments = {"attention_type": kind, "q_stride": q_stride, "kv_stride": kv_stride, "position_magnitude": 2}
    if kind in AMBIGUOUS:
        arguments["transposed_query"] = transposed
    elif transposed:
        return
    block, original = pair(**arguments)
    prepared = prepare_for_export(block)
    for size in ((5, 5),) if transposed else ((5, 5), (4, 7)):
        x = torch.randn(2, 12, *size, dtype=torch.float64)
        expected = original(x)
        assert torch.allclose(block(x), expected, rtol=0, atol=1e-12)
        assert torch.allclose(prepared(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "q_stride", "reach"), [("1000", 1, 0), ("1111", 2, 2), ("0011", 1, 3)])
def test_spatial_range_equals_the_published_map(kind: str, q_stride: int, reach: int) -> None:
    block, original = pair(256, attention_type=kind, q_stride=q_stride, spatial_range=reach)
    built = GeneralizedAttention(256, num_heads=2, attention_type=kind, spatial_range=reach)
    assert torch.equal(built.local_constraint_map, original.constraint_map(256))
    x = torch.randn(1, 256, 9, 7, dtype=torch.float64)
    assert torch.allclose(block(x), original(x), rtol=0, atol=1e-12)
    assert torch.allclose(prepare_for_export(block)(x), original(x), rtol=0, atol=1e-12)


def test_range_reaches_one_pixel_further_down_and_right() -> None:
    """With keys at every pixel, range 0 lets a pixel see itself and the next one down and right."""
    near = GeneralizedAttention(512, num_heads=1, spatial_range=0, kv_stride=1)._near(4, 4)
    assert torch.equal(near, torch.eye(4, dtype=torch.bool) | torch.eye(5, dtype=torch.bool)[1:, :4])


def test_published_code_transposes_queries_of_types_with_b_but_not_d() -> None:
    block, _ = pair(attention_type="0100", transposed_query=True)
    paper = GeneralizedAttention(12, num_heads=2, attention_type="0100", transposed_query=False).double()
    paper.load_state_dict(block.state_dict())
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64)
    assert (block(x) - paper(x)).abs().max() > 1e-2
    with pytest.raises(UserError, match=r"4x6 queries.*transposed_query=False"):
        block(torch.zeros(1, 12, 4, 6, dtype=torch.float64))
    with pytest.raises(UserError, match=r"height.*cannot be dynamic"):
        to_onnx(
            block.float(),
            (torch.randn(2, 12, 4, 4),),
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=({2: "height", 3: "width"},),
        )


def test_energies_are_not_scaled_down() -> None:
    block, _ = pair(attention_type="1000", kv_stride=1)
    x = torch.randn(1, 12, 2, 3, dtype=torch.float64)
    query, key, value = (conv(x).view(2, 6, 6) for conv in (block.query_conv, block.key_conv, block.value_conv))
    attention = (query.transpose(1, 2) @ key).softmax(dim=2)
    expected = block.proj_conv((value @ attention.transpose(1, 2)).view(1, 12, 2, 3)) * block.gamma + x
    assert torch.allclose(block(x), expected, atol=1e-12)


def test_key_content_projects_one_vector_per_head() -> None:
    """Type 0010 adds the same vector everywhere, and its export has no projection of all keys to values."""
    block = randomise(GeneralizedAttention(12, num_heads=2, attention_type="0010"))
    x = torch.randn(1, 12, 5, 7)
    added = block(x) - x
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    model = to_onnx(block, (x,), input_names=["x"], output_names=["y"])
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert [shapes[node.input[1]] for node in convolutions] == [(2, 12, 1, 1), (12, 12, 1, 1)]


def test_heads_need_not_fill_the_channels() -> None:
    assert GeneralizedAttention(250, position_embedding_dim=8).value_conv.out_channels == 243


def test_prepared_block_refuses_a_map_beyond_its_tables() -> None:
    prepared = GeneralizedAttention(12, num_heads=2, export_size=6).eval().prepare_for_export()
    prepared(torch.zeros(1, 12, 6, 5))
    with pytest.raises(UserError, match=r"at most 6 pixels.*export_size=7"):
        prepared(torch.zeros(1, 12, 7, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_type": "111"}, "attention_type='111'"),
        ({"attention_type": "0000"}, "not all 0"),
        ({"num_heads": 13}, "num_heads=13"),
        ({"kv_stride": 0}, "kv_stride=0"),
        ({"position_embedding_dim": 6}, "position_embedding_dim=6.*multiple of 4"),
        ({"attention_type": "1100"}, "transposed_query=None.*True.*False"),
        ({"transposed_query": True}, "others need None"),
        ({"attention_type": "0010", "spatial_range": 2}, "one attention map"),
        ({"spatial_range": 2}, "256 or 512, not 12"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneralizedAttention(12, **({"num_heads": 2} | arguments))
