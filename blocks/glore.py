"""Graph-based global reasoning unit (GloRe): reason on a graph whose nodes are weighted sums over all positions.

Paper: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019 (arXiv 1811.12814).
Code: https://github.com/facebookresearch/GloRe, `network/global_reasoning_unit.py`.

    S = conv_state(x) (2m, N)    P = conv_proj(x) (m, N)    V = S P^T, divided by N if normalised
    R = ReLU(V A^T + b_A + V)    Z = W_g R                  out = x + BN(conv_extend(Z P))
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant

_CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class GloReUnit(nn.Module):
    """Global reasoning unit over 1, 2 or 3 position axes.

    State names and shapes are the official ones: `conv_state` (2 num_mid) and `conv_proj` (num_mid) with bias,
    `gcn.conv1` (one weight and one bias per node), `gcn.conv2` (2 num_mid, no bias), `conv_extend` (no bias),
    `blocker` (batch normalisation with epsilon 1e-4).

    Quirks: the projection has no softmax and serves both ways; the node bias is the same for all states; the ReLU
    stands before `gcn.conv2`, nothing behind it.

    Args:
        num_in: channels of the input.
        num_mid: number of nodes m; a node has 2 m states.
        dimensions: number of position axes, 1 to 3.
        normalize: whether node features are divided by the number of positions; True where the input size varies.

    Raises:
        ValueError: another number of axes.
    """

    def __init__(self, num_in: int, num_mid: int, dimensions: int = 2, normalize: bool = False) -> None:
        super().__init__()
        if dimensions not in _CONV:
            raise ValueError(f"dimensions of a GloRe unit is {dimensions}. Give 1, 2 or 3.")
        conv = _CONV[dimensions]
        self.normalize = normalize
        self.conv_state = conv(num_in, 2 * num_mid, 1)
        self.conv_proj = conv(num_in, num_mid, 1)
        self.gcn = nn.ModuleDict(
            {
                "conv1": nn.Conv1d(num_mid, num_mid, 1),
                "conv2": nn.Conv1d(2 * num_mid, 2 * num_mid, 1, bias=False),
            }
        )
        self.conv_extend = conv(2 * num_mid, num_in, 1, bias=False)
        self.blocker = _NORM[dimensions](num_in, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, num_in, *positions) to the same shape, for any sizes."""
        state = self.conv_state(x).flatten(2)
        projection = self.conv_proj(x).flatten(2)
        nodes = torch.matmul(state, projection.transpose(1, 2))
        if self.normalize:
            nodes = nodes / state.shape[2]
        mixed = self.gcn["conv1"](nodes.transpose(1, 2)).transpose(1, 2) + nodes
        related = self.gcn["conv2"](mixed.relu())
        features = torch.matmul(related, projection).reshape(x.shape[0], -1, *x.shape[2:])
        out: torch.Tensor = x + self.blocker(self.conv_extend(features))
        return out

    def prepare_for_export(self) -> FoldedGloReUnit:
        """Return the form in which all that is linear behind the ReLU is one matrix."""
        return FoldedGloReUnit(self)


def _reason(
    state: torch.Tensor,
    projection: torch.Tensor,
    adjacency: torch.Tensor,
    node_bias: torch.Tensor,
    extend: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """Return what every node adds to the channels of a position, (batch, num_in, nodes)."""
    nodes = torch.matmul(state, projection.transpose(1, 2))
    if normalize:
        nodes = nodes / state.shape[2]
    return torch.matmul(extend, torch.relu(torch.matmul(nodes, adjacency) + node_bias))


def _reproject(x: torch.Tensor, per_node: torch.Tensor, projection: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Add to every position of x what its nodes give it."""
    return x + (torch.matmul(per_node, projection) + shift).reshape(x.shape)


class FoldedGloReUnit(nn.Module):
    """A trained GloRe unit for export: out = x + (W R) P + b with W = BN . conv_extend . gcn.conv2 and b from the BN.

    Exact, because nothing non-linear stands behind the ReLU. The map of 2 m states per position is never made again:
    the channels are extended on the nodes, not on the positions. The identity is part of A, and one convolution
    computes S and P.

    Args:
        unit: the trained unit; not modified.
    """

    adjacency: torch.Tensor
    node_bias: torch.Tensor
    extend: torch.Tensor
    shift: torch.Tensor

    def __init__(self, unit: GloReUnit) -> None:
        super().__init__()
        state = {name: value.double() for name, value in unit.state_dict().items()}
        gain = state["blocker.weight"] / (state["blocker.running_var"] + unit.blocker.eps).sqrt()
        related = state["conv_extend.weight"].flatten(1) @ state["gcn.conv2.weight"].flatten(1)
        mixing = state["gcn.conv1.weight"].flatten(1)
        kind = unit.blocker.weight.dtype
        folded = {
            "adjacency": (mixing + torch.eye(len(mixing)).to(mixing)).t().contiguous(),
            "node_bias": state["gcn.conv1.bias"],
            "extend": gain[:, None] * related,
            "shift": (state["blocker.bias"] - state["blocker.running_mean"] * gain)[:, None],
        }
        for name, value in folded.items():
            self.register_buffer(name, value.to(kind))
        self.states = unit.conv_state.out_channels
        self.project = type(unit.conv_state)(unit.conv_state.in_channels, 3 * len(mixing), 1)
        for name, parameter in self.project.named_parameters():
            both = torch.cat([state[f"conv_state.{name}"], state[f"conv_proj.{name}"]])
            parameter.data = both.to(kind)
        self.reason = Fp32Step(functools.partial(_reason, normalize=unit.normalize))
        self.reproject = _reproject if unit.normalize else Fp32Step(_reproject)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, num_in, *positions) to the same shape."""
        projected = self.project(x).flatten(2)
        state, projection = projected[:, : self.states], projected[:, self.states :]
        per_node = self.reason(state, projection, self.adjacency, self.node_bias, self.extend)
        out: torch.Tensor = self.reproject(x, per_node, projection, self.shift)
        return out


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of states, nodes and extended nodes."""
    axes = {1: ("length",), 2: ("height", "width"), 3: ("frames", "height", "width")}[arguments["dimensions"]]
    positions = functools.reduce(lambda product, axis: product * sizes[axis], axes, 1)
    nodes = arguments["num_mid"]
    return int(sizes["batch"] * max(2 * nodes * positions, 2 * nodes * nodes, arguments["num_in"] * nodes))


BLOCKS.add(
    BlockSpec(
        name="glore",
        title="graph-based global reasoning unit",
        paper="Graph-Based Global Reasoning Networks, CVPR 2019",
        year=2019,
        code="https://github.com/facebookresearch/GloRe",
        build=GloReUnit,
        original="edgeattn.validation.originals.glore:GloReUnit",
        variants=(
            Variant(
                "3d",
                {"num_in": 12, "num_mid": 4, "dimensions": 3},
                listings={"glore_3d": {"num_in": 1024, "num_mid": 256, "dimensions": 3}},
                references={"glore_3d": {"num_in": 12, "num_mid": 4, "dimensions": 3}},
                published=Published(
                    "ResNet-50 3-D, stage 4, Kinetics-400 8x224x224",
                    {"num_in": 1024, "num_mid": 256, "dimensions": 3},
                    {"batch": 1, "frames": 4, "height": 14, "width": 14},
                ),
                overflow=Overflow(60.0, {"batch": 1, "frames": 4, "height": 14, "width": 14}),
            ),
            Variant(
                "2d-normalized",
                {"num_in": 12, "num_mid": 4, "dimensions": 2, "normalize": True},
                listings={"glore_2d": {"num_in": 1024, "num_mid": 256, "dimensions": 2, "normalize": True}},
                references={"glore_2d": {"num_in": 12, "num_mid": 4, "dimensions": 2, "normalize": True}},
                inputs=(TensorInput("x", ("batch", "num_in", "height", "width")),),
            ),
            Variant(
                "1d-normalized",
                {"num_in": 12, "num_mid": 4, "dimensions": 1, "normalize": True},
                listings={"glore_1d": {"num_in": 1024, "num_mid": 256, "dimensions": 1, "normalize": True}},
                references={"glore_1d": {"num_in": 12, "num_mid": 4, "dimensions": 1, "normalize": True}},
                inputs=(TensorInput("x", ("batch", "num_in", "length")),),
            ),
        ),
        largest=_largest,
        precision="the graph stays in FP32, from the sum over positions to the folded extension behind the ReLU; not "
        "normalised, also the re-projection, which grows with the number of positions and the cube of the input",
        int8="the two projections, as one; graph and re-projection stay in floating point",
        inputs=(TensorInput("x", ("batch", "num_in", "frames", "height", "width")),),
    )
)
