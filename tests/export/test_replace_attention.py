"""Anyone's attention modules become blocks only where nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.criss_cross import CrissCrossAttention
from edgeattn.blocks.dual_attention import PAM
from edgeattn.blocks.recognition import matches
from edgeattn.blocks.squeeze_excitation import SqueezeExcitation
from edgeattn.export.replace_attention import ROUNDING, TOLERANCE, Replacement, replace_attention
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError


class Gate(nn.Module):
    """Squeeze-and-excitation under timm's names, with any activation and gate."""

    def __init__(self, channels: int, hidden: int, act=F.relu, gate=torch.sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.act, self.gate = act, gate

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Eca(nn.Module):
    """timm's EcaModule."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


class ChannelAttention(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x):
        pools = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        return x * sum(self.fc2(F.relu(self.fc1(pool))) for pool in pools).sigmoid()


class ConvNorm(nn.Module):
    """A convolution `conv` without bias and batch normalisation `bn`, as in timm."""

    def __init__(self, *args, act: bool = True, eps: float = 1e-5, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, bias=False, **options)
        self.bn = nn.BatchNorm2d(self.conv.out_channels, eps=eps)
        self.act = act

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class SpatialAttention(nn.Module):
    def __init__(self, mean_first: bool) -> None:
        super().__init__()
        self.conv = ConvNorm(2, 1, 7, padding=3, act=False)
        self.mean_first = mean_first

    def forward(self, x):
        pools = [x.mean(1, keepdim=True), x.amax(1, keepdim=True)]
        return x * self.conv(torch.cat(pools if self.mean_first else pools[::-1], 1)).sigmoid()


class Cbam(nn.Module):
    """timm's CbamModule; with the maximum first it is nobody's published form, but still a CBAM."""

    def __init__(self, channels: int, hidden: int, mean_first: bool = True) -> None:
        super().__init__()
        self.channel, self.spatial = ChannelAttention(channels, hidden), SpatialAttention(mean_first)

    def forward(self, x):
        return self.spatial(self.channel(x))


class KernelAttention(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc_reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc_select = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, x):
        z = self.fc_select(F.relu(self.bn(self.fc_reduce(x.sum(1).mean((2, 3), keepdim=True)))))
        return z.view(len(z), 2, -1, 1, 1).softmax(1)


class SelectiveKernel(nn.Module):
    """timm's SelectiveKernel of two split paths."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            ConvNorm(channels // 2, out, 3, stride=stride, padding=d, dilation=d, eps=1e-3) for d in (1, 2)
        )
        self.attn = KernelAttention(out, 8)

    def forward(self, x):
        parts = torch.stack([path(part) for path, part in zip(self.paths, x.chunk(2, 1), strict=True)], 1)
        return (parts * self.attn(parts)).sum(1)


class SplitAttn(nn.Module):
    """timm's SplitAttn of radix 2."""

    def __init__(self, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride, 1, groups=2 * groups, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1, self.bn1 = nn.Conv2d(channels, 32, 1, groups=groups), nn.BatchNorm2d(32)
        self.fc2 = nn.Conv2d(32, 2 * channels, 1, groups=groups)
        self.groups = groups

    def forward(self, x):
        x = F.relu(self.bn0(self.conv(x)))
        b, c, h, w = x.shape
        x = x.reshape(b, 2, c // 2, h, w)
        z = self.fc2(F.relu(self.bn1(self.fc1(x.sum(1).mean((2, 3), keepdim=True)))))
        z = z.view(b, self.groups, 2, -1).transpose(1, 2).softmax(1).reshape(b, 2, c // 2, 1, 1)
        return (x * z).sum(1)


class NonLocalAttn(nn.Module):
    """timm's NonLocalAttn, which scales by the input's channels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.t, self.p, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.z, self.norm = nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        t, p, g = (layer(x).flatten(2).transpose(1, 2) for layer in (self.t, self.p, self.g))
        y = ((t @ p.transpose(1, 2)) * self.scale).softmax(-1) @ g
        return self.norm(self.z(y.transpose(1, 2).unflatten(2, x.shape[2:]))) + x


class ConvMlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Conv2d(channels, hidden, 1), nn.LayerNorm(hidden, eps=1e-6)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return self.fc2(F.relu(self.norm(self.fc1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class GlobalContext(nn.Module):
    """timm's GlobalContext."""

    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.conv_attn = nn.Conv2d(channels, 1, 1)
        self.mlp_add = ConvMlp(channels, 3) if add else None
        self.mlp_scale = None if add else ConvMlp(channels, 3)

    def forward(self, x):
        weights = self.conv_attn(x).flatten(2).softmax(-1)
        context = (x.flatten(2) * weights).sum(-1)[..., None, None]
        return x * self.mlp_scale(context).sigmoid() if self.mlp_add is None else x + self.mlp_add(context)


class Positions(nn.Module):
    """The state of criss-cross and of position attention; `cross` chooses."""

    def __init__(self, channels: int, cross: bool, factor: float = 1.0) -> None:
        super().__init__()
        self.query_conv, self.key_conv = (nn.Conv2d(channels, channels // 8, 1) for _ in range(2))
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.cross, self.factor = cross, factor

    def forward(self, x):
        height, width = x.shape[2:]
        q, k, v = (layer(x).flatten(2) for layer in (self.query_conv, self.key_conv, self.value_conv))
        energy = self.factor * q.transpose(1, 2) @ k
        if self.cross:
            rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
            seen = (rows[:, None] == rows) | (columns[:, None] == columns)
            energy = energy.masked_fill(~seen, -torch.inf)
        return self.gamma * (v @ energy.softmax(-1).transpose(1, 2)).unflatten(2, (height, width)) + x


class Channels(nn.Module):
    """DANet's CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        flat = x.flatten(2)
        energy = flat @ flat.transpose(1, 2)
        weights = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        return self.gamma * (weights @ flat).view_as(x) + x


class Net(nn.Module):
    """A module between two convolutions, twice with the same weights if asked."""

    def __init__(self, attention: nn.Module, channels: int = 16, times: int = 1) -> None:
        super().__init__()
        self.stem = ConvNorm(3, channels, 3, padding=1)
        self.attention = attention
        self.head = nn.LazyConv2d(4, 1)
        self.times = times

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.times):
            x = self.attention(x)
        return self.head(x)


def random_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)


def replaced(model: nn.Module, *inputs: torch.Tensor, fresh: bool = True) -> Replacement:
    """Replace, and check what always has to hold: the model is equal on other inputs, and the given one untouched."""
    if fresh:
        with torch.no_grad():
            model.eval()(*inputs)
        random_norms(model)
    model.train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    result = replace_attention(model, inputs)
    assert [type(module) for module in model.modules()] == kinds
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in [*model.modules(), *result.model.modules()])
    assert not any(module.training for module in result.model.modules())
    assert result.error <= TOLERANCE
    return result


IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("attention", "block", "variant"),
    [
        (lambda: Gate(16, 8), "squeeze-excitation", "timm"),
        (lambda: Eca(5), "efficient-channel-attention", "official"),
        (lambda: Cbam(16, 4), "cbam", "timm"),
        (lambda: Cbam(16, 4, mean_first=False), "cbam", "timm"),
        (lambda: SelectiveKernel(16, 24, 2), "selective-kernel", "timm"),
        (lambda: SplitAttn(16, 2, 2), "split-attention", "official"),
        (lambda: NonLocalAttn(16, 4), "non-local", "timm"),
        (lambda: GlobalContext(16, add=False), "global-context", "timm"),
        (lambda: GlobalContext(16, add=True), "global-context", "timm"),
        (lambda: Positions(16, cross=True), "criss-cross", "official"),
        (lambda: Positions(16, cross=False), "danet-pam", "official"),
        (lambda: Channels(), "danet-cam", "official"),
    ],
)
def test_published_modules_are_replaced(attention, block, variant):
    torch.manual_seed(0)
    model = Net(attention())
    result = replaced(model, IMAGE)
    (decision,) = result.decisions
    assert (decision.path, decision.replaced, decision.block) == ("attention", True, block), decision
    assert decision.variant == variant or block == "selective-kernel"
    assert decision.error is not None
    assert decision.error < 1e-12
    other = torch.randn(3, 3, 12, 7)
    with torch.no_grad():
        torch.testing.assert_close(result.model(other), model.eval()(other))
        for parameter in (model.attention.get_parameter("gamma"),) if hasattr(model.attention, "gamma") else ():
            assert parameter == 0  # as at initialisation: values alone could not have told the blocks apart


@pytest.mark.parametrize(
    "attention",
    [
        lambda: Gate(16, 8, act=F.silu),
        lambda: Gate(16, 8, act=F.relu6),  # differs from 6 on, which the recorded activations never reach
        lambda: Gate(16, 8, gate=F.hardsigmoid),
        lambda: Positions(16, cross=True, factor=0.9),  # its gamma is zero: on these weights it is the identity
        lambda: Positions(16, cross=False, factor=1.00001),
    ],
)
def test_what_only_looks_alike_is_left_with_the_reason(attention):
    torch.manual_seed(0)
    model = Net(attention())
    result = replaced(model, IMAGE)
    (decision,) = result.decisions
    assert not decision.replaced
    assert "differs on" in decision.reason
    assert decision.error is not None
    assert decision.error > ROUNDING
    assert type(result.model.attention) is type(model.attention)


def test_a_recurrence_and_shared_modules_become_one_block():
    model = Net(Positions(16, cross=True), times=2)
    nn.init.ones_(model.attention.gamma)
    model.again = model.attention
    result = replaced(model, IMAGE)
    assert isinstance(result.model.attention, CrissCrossAttention)
    assert result.model.again is result.model.attention
    again = replace_attention(result.model, IMAGE)
    assert again.decisions == ()  # a block is not replaced by itself


def test_the_replaced_model_exports_with_its_plugin_node():
    torch.manual_seed(0)
    model = Net(Positions(16, cross=True))
    result = replaced(model, IMAGE)
    proto = to_onnx(result.model, [IMAGE], input_names=["image"], output_names=["logits"])
    assert "CrissCrossAttention" in {node.op_type for node in proto.graph.node}


class Sequences(nn.Module):
    def __init__(self, batch_first: bool, use_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.use_weights = use_weights

    def forward(self, x, mask):
        out, weights = self.attention(x, x.flip(0), x, attn_mask=mask)
        return out + weights.sum() if self.use_weights else out


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_of_torch(batch_first):
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    model = Sequences(batch_first)
    nn.init.normal_(model.attention.in_proj_bias)
    result = replaced(model, torch.randn(5, 5, 16), mask)
    assert [(d.block, d.replaced) for d in result.decisions] == [("multi-head", True)]


def test_attention_weights_that_the_model_uses_keep_the_module():
    result = replaced(Sequences(True, use_weights=True), torch.randn(2, 5, 16), torch.zeros(5, 5))
    (decision,) = result.decisions
    assert not decision.replaced
    assert "the model fails with the block in its place" in decision.reason


@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-4}]
)
def test_transformer_encoders_of_torch(options):
    layer = nn.TransformerEncoderLayer(16, 4, 24, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    result = replaced(model, torch.randn(3, 6, 16))
    assert result.replaced == ("layers.0", "layers.1")
    assert {decision.block for decision in result.decisions} == {"transformer-encoder-layer"}


def test_a_model_that_is_attention_itself():
    result = replaced(Gate(3, 2), IMAGE)
    (decision,) = result.decisions
    assert decision.path == ""
    assert decision.replaced
    assert isinstance(result.model, SqueezeExcitation)


def test_what_cannot_be_measured_is_left():
    model = Net(Gate(16, 8))
    model.auxiliary = Gate(16, 8)  # never run
    model(IMAGE)
    model.attention.register_forward_hook(lambda module, inputs, output: None)
    result = replace_attention(model, IMAGE)
    reasons = {decision.path: decision.reason for decision in result.decisions}
    assert not result.replaced
    assert "hooks" in reasons["attention"]
    assert "did not run" in reasons["auxiliary"]
    assert len(model.attention._forward_hooks) == 1


def test_ordinary_layers_are_not_mentioned():
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4))
    result = replaced(nn.Sequential(*layers), IMAGE)
    assert result.decisions == ()
    assert result.error == 0


def test_the_users_random_numbers_and_inputs_stay():
    image = IMAGE.clone()
    model = Net(Gate(16, 8))
    model(image)
    state = torch.get_rng_state()
    replace_attention(model, {"x": image})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, IMAGE)


def test_bad_input_is_refused_with_the_next_step():
    model = Net(Gate(16, 8))
    model(IMAGE)
    with pytest.raises(UserError, match=r"fails on the example inputs"):
        replace_attention(model, torch.randn(2, 5, 4, 4))
    with pytest.raises(UserError, match=r"model\.float\(\)"):
        replace_attention(copy.deepcopy(model).half(), IMAGE.half())
    model.cache = model.head.weight * 2
    with pytest.raises(UserError, match=r"cannot be copied"):
        replace_attention(model, IMAGE)


def test_shapes_give_the_constructor_arguments():
    state = PAM(32).state_dict()
    found = {
        match.layout.block.name: match.arguments for match in matches({n: tuple(t.shape) for n, t in state.items()})
    }
    assert found["danet-pam"] == {"in_dim": 32}
    assert found["criss-cross"] == {"in_dim": 32}


@pytest.mark.parametrize("name", ["seresnet18", "ecaresnet26t", "gcresnext26ts"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    random_norms(model)
    image = torch.randn(1, 3, 64, 64)
    result = replace_attention(model, image)
    assert len(result.replaced) == 8 == len(result.decisions)
    with torch.no_grad():
        expected = model(image)
        assert (result.model(image) - expected).norm() / expected.norm() <= TOLERANCE
