"""Local relation against its operator's definition, position by position."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from edgeattn.blocks.local_relation import SIMILARITIES, LocalRelation, LocalRelationLayer
from edgeattn.validation.originals import local_relation as original
from edgeattn.validation.randomise import randomise


def similarity(method: int, query: float, key: float) -> float:
    apart = abs(query - key)
    return (
        query * key,
        key,
        -apart,
        -apart / (abs(query) + abs(key) + 1),
        -(apart**2) / (abs(query * key) + 1),
        -(apart**2),
    )[method]


def brute_force(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prior: torch.Tensor,
    stride: int,
    dilation: int,
    scale: float,
    method: int,
) -> torch.Tensor:
    groups, kernel, _ = prior.shape
    height, width = key.shape[2:]
    per_group, values_per_group = query.shape[1] // groups, value.shape[1] // groups
    extra = key.shape[1] - query.shape[1]
    result = torch.zeros(query.shape[0], value.shape[1], *query.shape[2:], dtype=query.dtype)
    for b, g, y, x in itertools.product(range(query.shape[0]), range(groups), *map(range, query.shape[2:])):
        logits, places = [], []
        for row, column in itertools.product(range(kernel), repeat=2):
            at = (y * stride + dilation * (row - kernel // 2), x * stride + dilation * (column - kernel // 2))
            inside = 0 <= at[0] < height and 0 <= at[1] < width
            logit = 0.0 if inside else -100.0
            if inside:
                for channel in range(g * per_group, (g + 1) * per_group):
                    logit += scale * similarity(method, float(query[b, channel, y, x]), float(key[(b, channel, *at)]))
                    if extra:
                        logit += float(key[(b, query.shape[1] + g * extra // groups, *at)])
            logits.append(logit + float(prior[g, row, column]))
            places.append(at if inside else None)
        for weight, at in zip(torch.tensor(logits, dtype=query.dtype).softmax(0), places, strict=True):
            if at is not None:
                channels = slice(g * values_per_group, (g + 1) * values_per_group)
                result[b, channels, y, x] += weight * value[(b, channels, *at)]
    return result


@pytest.mark.parametrize("method", SIMILARITIES)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 2), (3, 2, 1), (2, 1, 1)])
def test_block_and_original_equal_the_definition(method: int, kernel: int, stride: int, dilation: int) -> None:
    generator = torch.Generator().manual_seed(method)
    shapes = ((1, 4, -(-4 // stride), -(-3 // stride)), (1, 6, 4, 3), (1, 4, 4, 3), (2, kernel, kernel))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = brute_force(*inputs, stride, dilation, 0.7, method)
    arguments = {"stride": stride, "dilation": dilation, "scale": 0.7, "sim_method": method}
    for module in (LocalRelation(kernel, 2, **arguments), original.LocalRelation(kernel, 2, **arguments)):
        torch.testing.assert_close(module(*inputs), expected, rtol=1e-10, atol=1e-10)


def test_weight_outside_the_image_is_lost_when_the_inside_scores_below_it() -> None:
    query, key, value = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -100.0), torch.ones(1, 1, 1, 1)
    result = LocalRelation(3)(query, key, value, torch.zeros(1, 3, 3))
    torch.testing.assert_close(result, torch.full_like(result, 1 / 9))


def test_prior_becomes_a_constant_for_export() -> None:
    layer = randomise(LocalRelationLayer(8, kernel_size=3, group_channels=4))
    prepared = layer.prepare_for_export()
    assert prepared.prior is None
    assert prepared.position.shape == (2, 3, 3)
    assert layer.prior is not None


def test_prior_reads_x_before_y() -> None:
    layer = LocalRelationLayer(8, kernel_size=3)
    assert layer.position[0, 0].tolist() == [[-1, 0, 1]] * 3
    assert layer.position[0, 1].tolist() == [[-1] * 3, [0] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LocalRelation(sim_method=6), "sim_method.*6"),
        (lambda: LocalRelationLayer(12, group_channels=8), "group_channels"),
        (lambda: LocalRelationLayer(16, kernel_size=4), "kernel_size.*4"),
    ],
)
def test_bad_arguments_are_refused(build: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
