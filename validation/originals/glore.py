"""Graph-based global reasoning unit, original.

Paper: Chen et al., "Graph-Based Global Reasoning Networks", CVPR 2019, section 3 and figure 3.
Behaviour: facebookresearch/GloRe, `network/global_reasoning_unit.py`.
"""

from __future__ import annotations

import torch
from torch import nn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class GraphConvolution(nn.Module):
    """Mix nodes (with bias, and what came in added), rectify, mix states.

    Args:
        states: features of a node.
        nodes: number of nodes.
    """

    def __init__(self, states: int, nodes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(nodes, nodes, 1)
        self.conv2 = nn.Conv1d(states, states, 1, bias=False)

    def forward(self, graph: torch.Tensor) -> torch.Tensor:
        """Map (B, states, nodes) to the same shape."""
        mixed = self.conv1(graph.permute(0, 2, 1).contiguous()).permute(0, 2, 1)
        out: torch.Tensor = self.conv2(torch.relu(mixed + graph))
        return out


class GloReUnit(nn.Module):
    """Project positions to graph nodes, reason on the graph, project back with the same weights, add the input.

    Args:
        num_in: channels of the input.
        num_mid: number of nodes; a node has twice as many states.
        dimensions: 1, 2 or 3 position axes.
        normalize: divide the node features by the number of positions.
    """

    def __init__(self, num_in: int, num_mid: int, dimensions: int = 2, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        conv, norm = _CONV[dimensions], _NORM[dimensions]
        self.conv_state = conv(num_in, 2 * num_mid, 1)
        self.conv_proj = conv(num_in, num_mid, 1)
        self.gcn = GraphConvolution(2 * num_mid, num_mid)
        self.conv_extend = conv(2 * num_mid, num_in, 1, bias=False)
        self.blocker = norm(num_in, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, num_in, *positions) to the same shape."""
        state = self.conv_state(x).flatten(2)
        assignment = self.conv_proj(x).flatten(2)
        graph = torch.matmul(state, assignment.permute(0, 2, 1))
        if self.normalize:
            graph = graph * (1.0 / state.shape[2])
        features = torch.matmul(self.gcn(graph), assignment).view(x.shape[0], -1, *x.shape[2:])
        out: torch.Tensor = x + self.blocker(self.conv_extend(features))
        return out
