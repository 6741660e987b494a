"""Luong attention beyond the common contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.luong import SCORES, LuongAttention, LuongDecoder
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise

PADDED = torch.tensor([[False] * 7, [True, True, False, False, False, False, False]])
"""A batch of a sentence of 7 words and one of 5, in reverse order, padded in front."""


def inputs(targets: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, targets, 4, generator=generator, dtype=torch.float64)
    return query, torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)


def test_coded_concat_is_the_papers_with_an_identity_for_the_source() -> None:
    coded = randomise(LuongAttention(4, "concat")).double()
    paper = LuongAttention(4, "concat_both").double()
    identity = torch.eye(4, dtype=torch.float64)
    state = coded.state_dict()
    paper.load_state_dict({**state, "W_a": torch.cat([state["W_a"], identity], dim=1)})
    assert torch.allclose(coded(*inputs())[0], paper(*inputs())[0])


def test_context_comes_before_the_query() -> None:
    block = randomise(LuongAttention(4, "dot")).double()
    query, memory = inputs()
    output, weights = block(query, memory)
    context = weights @ memory
    assert torch.allclose(output, (context @ block.W_h[:, :4].T + query @ block.W_h[:, 4:].T).tanh())


def test_scores_are_not_scaled() -> None:
    query, memory = inputs()
    expected = (query @ memory.transpose(1, 2)).softmax(dim=2)
    assert torch.allclose(LuongAttention(4, "dot").double()(query, memory)[1], expected)


@pytest.mark.parametrize("score", SCORES)
def test_padding_has_no_influence(score: str) -> None:
    block = randomise(LuongAttention(4, score)).double()
    query, memory = inputs()
    loud = memory.clone()
    loud[1, :2] = 1e3
    output, weights = block(query, memory, PADDED)
    assert torch.equal(block(query, loud, PADDED)[0], output)
    assert (weights[1, :, :2] == 0).all()
    assert torch.allclose(weights.sum(dim=2), torch.ones(2, 3, dtype=torch.float64))


def by_hand(
    block: LuongAttention, query: torch.Tensor, memory: torch.Tensor, centre: float, reach: int
) -> torch.Tensor:
    """Return local-p's weights of one target over a sentence in reverse order, word by word."""
    length = len(memory)
    scores = {word: float(memory[length - word] @ (block.W_a @ query)) for word in range(1, length + 1)}
    window = [word for word in scores if abs(word - math.floor(centre)) <= reach]
    total = sum(math.exp(scores[word]) for word in window)
    weights = torch.zeros(length, dtype=torch.float64)
    for word in window:
        gaussian = math.exp(-((word - centre) ** 2) / (2 * (reach / 2) ** 2))
        weights[length - word] = math.exp(scores[word]) / total * gaussian
    return weights


def test_predicted_window_lies_around_the_floor_and_the_gaussian_around_the_centre() -> None:
    block = randomise(LuongAttention(4, window="predictive", reach=2)).double()
    query, memory = inputs()
    _, weights = block(query, memory, PADDED)
    for row, words in ((0, 7), (1, 5)):
        for target in range(3):
            state = query[row, target]
            centre = (block.v_pos @ (block.W_pos @ state).tanh()).sigmoid().item() * words + 1
            expected = by_hand(block, state, memory[row, 7 - words :], centre, 2)
            assert torch.allclose(weights[row, target, 7 - words :], expected)
            assert expected.sum() < 1, "the weights are not normalised again"


def test_gaussian_in_the_softmax_gives_weights_that_sum_to_one() -> None:
    block = randomise(LuongAttention(4, window="predictive", reach=2, gaussian_first=True)).double()
    _, weights = block(*inputs(), PADDED)
    assert torch.allclose(weights.sum(dim=2), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("window", ["monotonic", "predictive"])
def test_a_source_in_order_gives_the_same_weights_in_order(window: str) -> None:
    backwards = randomise(LuongAttention(4, window=window, reach=2)).double()
    forwards = LuongAttention(4, window=window, reach=2, reverse=False).double()
    forwards.load_state_dict(backwards.state_dict())
    query, memory = inputs()
    position = (torch.arange(3.0, dtype=torch.float64)[None].repeat(2, 1) + 1,) if window == "monotonic" else ()
    expected = backwards(query, memory, PADDED, *position)[1].flip(2)
    assert torch.allclose(forwards(query, memory.flip(1), PADDED.flip(1), *position)[1], expected)


def test_monotonic_window_stops_at_the_last_word() -> None:
    block = randomise(LuongAttention(4, "dot", window="monotonic", reach=1)).double()
    position = torch.tensor([[1.0, 4.0, 40.0]] * 2, dtype=torch.float64)
    weights = block(*inputs(), PADDED, position)[1]
    words = [[sorted(7 - index for index in row.nonzero().flatten().tolist()) for row in batch] for batch in weights]
    assert words == [[[1, 2], [3, 4, 5], [6, 7]], [[1, 2], [3, 4, 5], [4, 5]]]


def test_an_empty_window_gives_no_context() -> None:
    block = randomise(LuongAttention(4, "dot", window="monotonic", reach=1)).double()
    query, memory = inputs()
    output, weights = block(query, memory, None, torch.full((2, 3), -5.0, dtype=torch.float64))
    assert (weights == 0).all()
    assert torch.allclose(output, (query @ block.W_h[:, 4:].T).tanh())


@pytest.mark.parametrize("score", ["general", "mlp"])
def test_attention_of_a_whole_opennmt_decoder_loads(score: str) -> None:
    linear = {"general": {"linear_in": (4, 4, False)}, "mlp": {"linear_context": (4, 4, False)}}[score]
    if score == "mlp":
        linear |= {"linear_query": (4, 4, True), "v": (4, 1, False)}
    linear["linear_out"] = (8, 4, score == "mlp")
    published = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in linear.items()})
    state = {f"decoder.attn.{key}": value for key, value in published.state_dict().items()}
    decoder = nn.ModuleDict({"decoder": nn.ModuleDict({"attn": LuongAttention(4, score)})})
    report = load_checkpoint(decoder, state, key_map=BLOCKS.get("luong").variant("opennmt").key_map)
    assert not report.missing
    assert not report.unexpected


def test_mlp_ends_without_tanh() -> None:
    block = LuongAttention(4, "mlp").double()
    with torch.no_grad():
        block.b_h.fill_(7.0)
    assert block(*inputs())[0].max() > 1


def step(decoder: LuongDecoder, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    word, attentional, h, c = (torch.randn(*shape, 4).double() for shape in ((2,), (2,), (2, 2), (2, 2)))
    return word, attentional, h, c * scale, inputs()[1], PADDED


def test_decoder_is_a_torch_lstm_with_gates_in_another_order_and_fed_with_its_output() -> None:
    decoder = randomise(LuongDecoder(4, layers=2)).double()
    word, attentional, h, c, *_ = given = step(decoder)
    x, columns = torch.cat([word, attentional], dim=1), 8
    _, hidden, cells, _ = decoder(*given)
    for layer in range(2):
        cell = nn.LSTMCell(columns, 4, bias=False).double()
        i, f, o, g = decoder.get_parameter(f"W_tgt_{layer + 1}").unflatten(0, (4, 4))
        weight = torch.cat([i, f, g, o])
        cell.load_state_dict({"weight_ih": weight[:, :columns], "weight_hh": weight[:, columns:]})
        x, state = cell(x, (h[layer], c[layer]))
        assert torch.allclose(hidden[layer], x)
        assert torch.allclose(cells[layer], state)
        columns = 4


def test_decoder_clips_the_cell_behind_its_output() -> None:
    decoder = randomise(LuongDecoder(4, layers=2)).double()
    with torch.no_grad():
        decoder.W_tgt_1[4:8] *= 0  # forget gates of 1 / 2
    _, _, cells, _ = decoder(*step(decoder, scale=1e3))
    assert cells.abs().max() == 50
    h, _ = decoder._step(
        torch.zeros(1, 8).double(), torch.zeros(1, 4).double(), torch.full((1, 4), 80.0).double(), decoder.W_tgt_1
    )
    assert torch.allclose(h, torch.full((1, 4), 0.5).double())


def test_matlab_names_of_the_decoder_load() -> None:
    decoder = LuongDecoder(4, layers=2)
    published = {
        f"W_tgt{{{key[-1]}}}" if key.startswith("W_tgt") else key: value for key, value in decoder.state_dict().items()
    }
    assert "W_tgt{1}" in published
    report = load_checkpoint(decoder, published, key_map=BLOCKS.get("luong-decoder").variant("official").key_map)
    assert not report.missing
    assert not report.unexpected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 4, "reach": 0}, "reach=0"),
        ({"size": 4, "position_size": 0}, "position_size=0"),
        ({"size": 4, "score": "bilinear"}, "score='bilinear'.*general"),
        ({"size": 4, "window": "local"}, "window='local'.*predictive"),
        ({"size": 4, "gaussian_first": True}, "window='predictive'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LuongAttention(**arguments)


def test_a_decoder_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers=0"):
        LuongDecoder(4, layers=0)


def test_positions_belong_to_the_monotonic_window() -> None:
    with pytest.raises(ValueError, match="local-m needs"):
        LuongAttention(4, window="monotonic").double()(*inputs())
    with pytest.raises(ValueError, match="take none"):
        LuongAttention(4).double()(*inputs(), None, torch.ones(2, 3))
