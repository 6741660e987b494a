"""The originals have the official names and shapes, and the public implementations' outputs."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeattn.validation.originals import ABN, CCNet, CoAttention, COSNet, CrissCrossAttention, RCCAModule

DATA = Path(__file__).parents[1] / "data"
# Both sides ran in FP64 (rounding unit 1.1e-16); the longest sums have about 2e4 terms, the networks about 10 layers.
FP64_TOLERANCE = 1e-11


def rule(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Parameter values of `data/reference/provenance.json`."""
    draw = np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)  # a frozen stream
    if key.endswith(("running_var", "gamma")):
        return 0.5 + draw
    return (2 * draw - 1) * (np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 1)


def filled(module: nn.Module) -> nn.Module:
    """Fill parameters and buffers by the rule (as FP32 values), and turn the module to FP64."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(np.asarray(rule(key, tuple(tensor.shape)))))
    return module.eval().double()


def loaded(module: nn.Module, arrays: dict[str, np.ndarray]) -> nn.Module:
    """Load the `state.*` arrays strictly, but for the counters, and turn the module to FP64."""
    state = {key.removeprefix("state."): torch.from_numpy(array) for key, array in arrays.items() if "state." in key}
    wrong = module.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in wrong.missing_keys)
    return module.eval().double()


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / "reference" / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual.detach().numpy() - expected) / np.linalg.norm(expected)
    assert error <= FP64_TOLERANCE, f"relative L2 {error:.2e}"


def fp64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()


@pytest.mark.parametrize(
    ("listing", "build"),
    [
        ("ccnet_cca", lambda: CrissCrossAttention(512)),
        ("ccnet_rcca", lambda: RCCAModule(2048, 512, 19)),
    ],
)
def test_state_dict_is_the_official_one(listing, build):
    official = json.loads((DATA / "state_dicts" / f"{listing}.json").read_text())["keys"]
    with torch.device("meta"):
        module = build()
    assert {key: list(tensor.shape) for key, tensor in module.state_dict().items()} == official


def test_co_attention_keys_lie_in_the_official_ones():
    official = json.loads((DATA / "state_dicts" / "cosnet_coattention.json").read_text())["keys"]
    ours = {key: list(tensor.shape) for key, tensor in CoAttention(256).state_dict().items()}
    assert ours == {key: official[key] for key in ("linear_e.weight", "gate.weight")}


@pytest.mark.parametrize(
    ("affinity", "parameters"),
    [
        ("vanilla", {"linear_e.weight": (8, 8)}),
        ("symmetric", {"P": (8, 8), "D": (8,)}),
        ("channelwise", {"D": (8,)}),
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_co_attention_parameters(affinity, parameters, gate):
    expected = parameters | ({"gate.weight": (1, 8, 1, 1)} if gate else {})
    state = CoAttention(8, affinity, gate).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


def test_criss_cross_equals_the_public_code():
    arrays = reference("ccnet_criss_cross")
    attention = loaded(CrissCrossAttention(16), arrays)
    sizes = [key.removeprefix("input.") for key in arrays if key.startswith("input.")]
    assert {"2x16x5x7", "1x16x1x6", "1x16x6x1", "1x16x1x1"} <= set(sizes)
    for size in sizes:
        assert_same(attention(fp64(arrays[f"input.{size}"])), arrays[f"output.{size}"])


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_rcca_equals_the_public_code(recurrence):
    arrays = reference("ccnet_rcca")
    head = loaded(RCCAModule(32, 8, 3, recurrence), arrays)
    assert_same(head(fp64(arrays["input"])), arrays[f"output.recurrence{recurrence}"])


def test_co_attention_equals_the_public_code():
    arrays = reference("cosnet_co_attention")
    used = {key: value for key, value in arrays.items() if key.startswith(("state.linear_e", "state.gate"))}
    attention = loaded(CoAttention(8), used)
    exemplar_att, query_att = attention(fp64(arrays["exemplar"]), fp64(arrays["query"]))
    assert_same(exemplar_att, arrays["exemplar_att"])
    assert_same(query_att, arrays["query_att"])


def test_ccnet_equals_the_public_code():
    arrays = reference("ccnet_shallow")
    logits, dsn_logits = filled(CCNet(5, recurrence=2, blocks=(1, 2, 1, 1)))(fp64(arrays["image"]))
    assert_same(logits, arrays["logits"])
    assert_same(dsn_logits, arrays["dsn_logits"])


def test_cosnet_equals_the_public_code():
    arrays = reference("cosnet_shallow")
    outputs = filled(COSNet(blocks=(1, 2, 1, 1)))(fp64(arrays["target"]), fp64(arrays["reference"]))
    for actual, name in zip(outputs, ("mask_a", "mask_b", "saliency_b"), strict=True):
        assert_same(actual, arrays[name])


def test_every_reference_file_has_its_provenance_and_is_small():
    provenance = json.loads((DATA / "reference" / "provenance.json").read_text())["files"]
    files = {path.name: path.stat().st_size for path in (DATA / "reference").glob("*.npz")}
    assert set(files) == set(provenance)
    assert max(files.values()) < 100 * 1024
    origin = re.compile(r"[0-9a-f]{40}|(version|release) \d")
    assert all(origin.match(entry["commit"]) for entry in provenance.values())


@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
def test_abn_by_hand(activation):
    abn = ABN(2, activation).double()
    state = {"weight": [-2.0, 0.0], "bias": [0.5, -0.25], "running_mean": [1.0, 0.0], "running_var": [4.0, 1.0]}
    abn.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    y = abn(torch.tensor([[[[3.0, -7.0]], [[100.0, 0.0]]]], dtype=torch.float64)).detach()
    first = 2.00001 * torch.tensor([2.0, -8.0], dtype=torch.float64) / np.sqrt(4.00001) + 0.5
    second = 1e-5 * torch.tensor([100.0, 0.0], dtype=torch.float64) / np.sqrt(1.00001) - 0.25
    slope = 0.01 if activation == "leaky_relu" else 1.0
    expected = torch.stack([torch.stack([first[0], slope * first[1]]), slope * second])
    torch.testing.assert_close(y[0, :, 0], expected, rtol=1e-6, atol=0)


@given(height=st.integers(1, 4), width=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_criss_cross_sees_its_own_cross_and_nothing_else(height, width):
    attention = filled(CrissCrossAttention(8))
    generator = torch.Generator().manual_seed(height * 10 + width)
    x = torch.randn(1, 8, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    row, column = height // 2, width // 2
    (gradient,) = torch.autograd.grad(attention(x)[0, :, row, column].sum(), x)
    seen = gradient[0].abs().sum(dim=0) > 0
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[row, :] = True
    expected[:, column] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (4, 1), (1, 1)])
def test_criss_cross_by_explicit_sums(height, width):
    attention = filled(CrissCrossAttention(16))
    x = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    query, key, value = attention.query_conv(x), attention.key_conv(x), attention.value_conv(x)
    expected = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            cross = [(other, column) for other in range(height) if other != row]
            cross += [(row, other) for other in range(width)]
            weights = [(query[:, :, row, column] * key[:, :, i, j]).sum(dim=1, keepdim=True).exp() for i, j in cross]
            attended = sum(weight * value[:, :, i, j] for weight, (i, j) in zip(weights, cross, strict=True))
            expected[:, :, row, column] = attention.gamma * attended / sum(weights) + x[:, :, row, column]
    assert_same(attention(x), expected.detach().numpy())


@pytest.mark.parametrize("affinity", ["vanilla", "symmetric", "channelwise"])
@pytest.mark.parametrize("gate", [True, False])
def test_co_attention_by_explicit_sums(affinity, gate):
    attention = filled(CoAttention(4, affinity, gate))
    state = attention.state_dict()
    generator = torch.Generator().manual_seed(0)
    exemplar, query = torch.randn(2, 1, 4, 2, 3, generator=generator, dtype=torch.float64)
    e, q = exemplar.reshape(4, 6), query.reshape(4, 6)
    energy = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            if affinity == "vanilla":
                energy[i, j] = torch.dot(state["linear_e.weight"] @ e[:, i], q[:, j])
            elif affinity == "symmetric":
                energy[i, j] = ((state["P"] @ e[:, i]) * state["D"] * (state["P"] @ q[:, j])).sum()
            else:
                energy[i, j] = (e[:, i] * state["D"] * q[:, j]).sum()
    weights = energy.exp()
    expected_exemplar = torch.stack([(q * (weights[i] / weights[i].sum())).sum(1) for i in range(6)], dim=1)
    expected_query = torch.stack([(e * (weights[:, j] / weights[:, j].sum())).sum(1) for j in range(6)], dim=1)
    for actual, expected in zip(attention(exemplar, query), (expected_exemplar, expected_query), strict=True):
        if gate:
            expected = expected * torch.sigmoid(state["gate.weight"].flatten() @ expected)
        assert_same(actual.reshape(4, 6), expected.numpy())


@pytest.mark.parametrize("affinity", ["vanilla", "symmetric", "channelwise"])
def test_group_attention_equals_one_tall_reference(affinity):
    attention = filled(CoAttention(4, affinity))
    generator = torch.Generator().manual_seed(1)
    exemplar = torch.randn(2, 4, 6, 3, generator=generator, dtype=torch.float64)
    references = torch.randn(2, 3, 4, 2, 3, generator=generator, dtype=torch.float64)
    tall = torch.cat(list(references.unbind(dim=1)), dim=2)  # (B, C, N * H, W)
    assert_same(attention.forward_group(exemplar, references), attention(exemplar, tall)[0].detach().numpy())
    assert_same(attention.forward_group(exemplar, references.flip(1)), attention(exemplar, tall)[0].detach().numpy())


@pytest.mark.parametrize(
    ("build", "inputs", "outputs"),
    [
        (lambda: CCNet(4, blocks=(1, 1, 1, 1), stem_width=4, base_width=4), 1, [(1, 4, 5, 6)] * 2),
        (lambda: COSNet((1, 1, 1, 1), 4, 6, 8, (1, 2, 3)), 2, [(1, 1, 33, 41)] * 3),
    ],
)
def test_small_networks_run_and_start_in_evaluation_mode(build, inputs, outputs):
    network = build()
    assert not network.training
    image = torch.zeros(1, 3, 33, 41)
    with torch.no_grad():
        assert [tuple(output.shape) for output in network(*[image] * inputs)] == outputs


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="'relu'"):
        ABN(3, "relu")
    with pytest.raises(ValueError, match="'bilinear'"):
        CoAttention(3, "bilinear")
