"""Non-local block beyond the common contract."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.non_local import MODES, NonLocal
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.randomise import randomise

SPEC = BLOCKS.get("non-local")


def test_caffe2_blobs_load_by_their_names() -> None:
    block = randomise(NonLocal(8, pool_before=True, scale="inner"))
    blobs = {
        "theta_w": "theta.weight",
        "theta_b": "theta.bias",
        "phi_w": "phi.weight",
        "phi_b": "phi.bias",
        "g_w": "g.weight",
        "g_b": "g.bias",
        "out_w": "W.0.weight",
        "out_b": "W.0.bias",
        "bn_s": "W.1.weight",
        "bn_b": "W.1.bias",
        "bn_rm": "W.1.running_mean",
        "bn_riv": "W.1.running_var",
    }
    published = {f"nonlocal_conv4_3_{blob}": block.state_dict()[key].clone() for blob, key in blobs.items()}
    other = NonLocal(8, pool_before=True, scale="inner").eval()
    load_checkpoint(other, published, key_map=SPEC.variant("official").key_map)
    x = torch.randn(1, 8, 2, 4, 5)
    assert torch.equal(other(x), block(x))


def test_affine_of_caffe2_is_normalisation_with_neutral_statistics() -> None:
    block = randomise(NonLocal(8, dimension=1))
    _, norm = block.W
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - 1e-5)
    x = torch.randn(2, 8, 5)
    assert torch.allclose(norm(x), norm.weight[:, None] * x + norm.bias[:, None], atol=1e-6)


def test_nl_block_of_a_whole_mmseg_checkpoint_loads() -> None:
    arguments = SPEC.variant("mmseg").arguments
    model = nn.ModuleDict({"decode_head": nn.ModuleDict({"nl_block": NonLocal(**arguments)})})
    names = {"W.0.": "conv_out.conv.", "W.1.": "conv_out.bn.", "theta.": "theta.conv.", "phi.": "phi.conv."}
    names["g."] = "g.conv."
    published = {}
    for key, value in randomise(model).state_dict().items():
        own = key.removeprefix("decode_head.nl_block.")
        start = next(start for start in names if own.startswith(start))
        published[f"decode_head.nl_block.{names[start]}{own.removeprefix(start)}"] = value
    report = load_checkpoint(model, published, key_map=SPEC.variant("mmseg").key_map)
    assert not report.missing
    assert not report.unexpected


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_concatenation_pairs_the_first_half_with_queries(dimension: int) -> None:
    """The projection is a Conv2d in every dimension; its first d weights meet theta, the others phi."""
    block = randomise(NonLocal(4, dimension=dimension, sub_sample=False, bn_layer=False, mode="concatenation"))
    assert block.concat_project[0].weight.shape == (1, 4, 1, 1)
    x = torch.randn(1, 4, *(3,) * dimension)
    query, key, value = (layer(x).flatten(2)[0] for layer in (block.theta, block.phi, block.g))
    weight = block.concat_project[0].weight.flatten()
    positions = query.shape[1]
    gathered = torch.zeros_like(value)
    for i in range(positions):
        for j in range(positions):
            pair = torch.cat([query[:, i], key[:, j]])
            gathered[:, i] += torch.relu(weight @ pair) * value[:, j] / positions
    expected = block.W(gathered.reshape(1, 2, *x.shape[2:])) + x
    assert torch.allclose(block(x), expected, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_published_implementations_differ_where_they_pool(mode: str) -> None:
    after = randomise(NonLocal(8, dimension=2, mode=mode))
    before = NonLocal(8, dimension=2, mode=mode, pool_before=True).eval()
    before.load_state_dict(
        {key.replace("g.0", "g").replace("phi.0", "phi"): v for key, v in after.state_dict().items()}
    )
    x = torch.randn(1, 8, 4, 6)
    assert (after(x) - before(x)).abs().max() > 1e-2
    flat = torch.ones(1, 8, 4, 6)  # pooling a constant changes nothing
    assert torch.allclose(after(flat), before(flat), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "at least 1 channel"),
        ({"in_channels": 8, "dimension": 4}, "dimension=4"),
        ({"in_channels": 8, "mode": "dot"}, "mode='dot'.*dot_product"),
        ({"in_channels": 8, "scale": "sqrt"}, "scale='sqrt'.*inverted"),
        ({"in_channels": 8, "mode": "gaussian", "scale": "inner"}, "only embedded_gaussian"),
        ({"in_channels": 8, "pool_frames": True, "dimension": 2}, "dimension=3"),
        ({"in_channels": 8, "pool_frames": True, "sub_sample": False}, "sub_sample"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonLocal(**arguments)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 8, 1, 6), (1, 8, 3, 4, 1)])
def test_a_size_that_cannot_be_halved_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="at least 2"):
        NonLocal(8, dimension=len(shape) - 2)(torch.zeros(shape))


def test_frames_are_halved_only_on_request() -> None:
    x = torch.randn(1, 8, 1, 2, 2)
    assert NonLocal(8).eval()(x).shape == x.shape
    with pytest.raises(UserError, match="at least 2"):
        NonLocal(8, pool_frames=True)(x)
