"""DANet's attention modules and head beyond the common contract."""

from __future__ import annotations

import pytest
import torch

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.dual_attention import CAM, PAM, DANetHead
from edgeattn.models.checkpoint import load_checkpoint
from edgeattn.validation.originals import dual_attention as originals
from edgeattn.validation.randomise import randomise


def test_channels_attend_to_those_least_like_them() -> None:
    block = CAM(3)
    with torch.no_grad():
        block.gamma.fill_(1)
    # The first two channels are alike, the third is their opposite: it has the lowest energy with both.
    x = torch.tensor([[2.0, 1.0], [2.0, 1.0], [-2.0, -1.0]]).reshape(1, 3, 1, 2)
    with torch.no_grad():
        attended = (block(x) - x)[0, :, 0, 0]
    opposite = torch.tensor(10.0).exp()  # energies are 5 and -5
    assert attended[0] == pytest.approx(float((2 + 2 - 2 * opposite) / (2 + opposite)))
    assert attended[2] == pytest.approx(float((opposite * 4 - 2) / (2 * opposite + 1)))


def test_channel_attention_is_nearer_to_fp64_than_the_official_form() -> None:
    block = randomise(CAM(16), seed=3)
    original = originals.CAM(16)
    original.load_state_dict(block.state_dict())
    x = torch.randn(6, 16, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, official, exact = block(x), original(x), original.double()(x.double())
    assert (actual - exact).norm() < 0.5 * (official - exact).norm()


def test_energies_between_channels_may_exceed_the_range_of_exp() -> None:
    block = randomise(CAM(4))
    x = 100 * torch.randn(1, 4, 20, 30)
    with torch.no_grad():
        y = block(x)
        energy = torch.einsum("bcn,bdn->bcd", x.flatten(2), x.flatten(2))
        least = energy.argmin(dim=2)[0]  # energies this far apart leave one channel with all the weight
    torch.testing.assert_close(y, block.gamma * x[:, least] + x)


def test_energies_between_positions_are_not_scaled() -> None:
    block = randomise(PAM(16))
    x = torch.randn(1, 16, 2, 3)
    with torch.no_grad():
        query, key, value = (part(x).flatten(2)[0] for part in (block.query_conv, block.key_conv, block.value_conv))
        weights = torch.stack([(query[:, i, None] * key).sum(dim=0).softmax(dim=0) for i in range(6)])
        expected = block.gamma * (weights[:, None] * value).sum(dim=2).T.reshape(1, 16, 2, 3) + x
        torch.testing.assert_close(block(x), expected)


def test_main_output_is_the_first_of_three() -> None:
    head = randomise(DANetHead(32, 3))
    x = torch.randn(2, 32, 4, 5)
    with torch.no_grad():
        outputs = head(x)
        assert torch.equal(head.forward_main(x), outputs[0])
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 4, 5)] * 3


def test_mmseg_head_state_loads_as_part_of_a_model_too() -> None:
    key_map = BLOCKS.get("danet-head").variant("mmseg").key_map
    head = randomise(DANetHead(32, 3))
    names = {"conv5a": "pam_in_conv", "conv5c": "cam_in_conv", "conv51": "pam_out_conv", "conv52": "cam_out_conv"}
    layers = {".0.": ".conv.", ".1.": ".bn."}
    published = {}
    for name, value in head.state_dict().items():
        module, _, rest = name.partition(".")
        if module in names:
            other = f"{names[module]}{layers[f'.{rest[:2]}']}{rest[2:]}"
        elif module in ("sa", "sc"):
            part = rest.replace("gamma", "gamma.scale").replace("_conv.", "_project.")
            other = f"{'pam' if module == 'sa' else 'cam'}.{part}"
        else:
            prefix = {"conv6": "pam_conv_seg", "conv7": "cam_conv_seg", "conv8": "conv_seg"}[module]
            other = f"{prefix}.{rest.partition('.')[2]}"
        published[f"decode_head.{other}"] = value.reshape(()) if name.endswith("gamma") else value
    loaded = DANetHead(32, 3)
    load_checkpoint(loaded, published, key_map=key_map)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in head.state_dict().items())


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="in_dim=7"):
        PAM(7)
    with pytest.raises(ValueError, match="in_channels=31"):
        DANetHead(31, 3)
