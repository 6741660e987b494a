"""Non-local block, original.

Paper: Wang et al., "Non-local Neural Networks", CVPR 2018, equations 1 to 8.
Behaviour: AlexHex7/Non-local_pytorch, `lib/non_local_*.py`; facebookresearch/SlowFast,
`slowfast/models/nonlocal_helper.py` (pool before the embeddings); mmcv, `mmcv/cnn/bricks/non_local.py`; mmdet v1 in
xvjiarui/GCNet, `mmdet/models/plugins/non_local.py`; timm, `timm/layers/non_local_attn.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class NonLocal(nn.Module):
    """y = f(x) g(x) with a normalised matrix f of queries by keys; z = W y + x.

    Args:
        in_channels: channels C.
        inter_channels: channels d of the embeddings; C // 2, at least 1, when None.
        dimension: number of axes that hold positions.
        sub_sample: max-pool for the keys and values, 2 along the last two (or the only) axes.
        bn_layer: batch normalisation behind W.
        mode: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        scale: what multiplies the embedded Gaussian's products: "none", "inner" d^-1/2, "input" C^-1/2, "inverted"
            d^1/2.
        pool_before: pool x, and not what the embeddings give.
        pool_frames: the pool has stride 2 in time as well.
        out_bias: whether W's convolution has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        dimension: int = 3,
        sub_sample: bool = True,
        bn_layer: bool = True,
        *,
        mode: str = "embedded_gaussian",
        scale: str = "none",
        pool_before: bool = False,
        pool_frames: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.d = inter_channels or in_channels // 2 or 1
        self.mode, self.pool_before = mode, pool_before
        self.divisor = {"none": 1.0, "inner": self.d**0.5, "input": in_channels**0.5, "inverted": self.d**-0.5}[scale]
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimension]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimension]
        pool: nn.Module = nn.Identity()
        if sub_sample:
            pool = (nn.MaxPool1d(2), nn.MaxPool2d((2, 2)), nn.MaxPool3d((1 + pool_frames, 2, 2)))[dimension - 1]
        self.pool = pool
        self.g: nn.Module = conv(in_channels, self.d, 1)
        if mode != "gaussian":
            self.theta = conv(in_channels, self.d, 1)
            self.phi: nn.Module = conv(in_channels, self.d, 1)
        if sub_sample and not pool_before:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)
        self.W: nn.Module = conv(self.d, in_channels, 1, bias=out_bias)
        if bn_layer:
            self.W = nn.Sequential(self.W, norm(in_channels))
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * self.d, 1, 1, bias=False), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, positions...) to the same shape."""
        batch = x.size(0)
        source = self.pool(x) if self.pool_before else x
        values = self.g(source).view(batch, self.d, -1).permute(0, 2, 1)
        weights = self.pairwise(x, source)
        if self.pool_before:  # SlowFast writes its products as sums over named axes
            gathered = torch.einsum("bqk,bkc->bcq", weights, values)
        else:
            gathered = torch.matmul(weights, values).permute(0, 2, 1).contiguous()
        out: torch.Tensor = self.W(gathered.view(batch, self.d, *x.size()[2:]))
        return out + x

    def pairwise(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Return the normalised weights (B, queries, keys) between x and the source of the keys."""
        batch, channels = x.shape[:2]
        if self.mode == "gaussian":
            keys = self.phi(source) if hasattr(self, "phi") else source
            products = torch.matmul(x.view(batch, channels, -1).permute(0, 2, 1), keys.view(batch, channels, -1))
            return torch.softmax(products, dim=-1)
        if self.mode == "concatenation":
            column: torch.Tensor = self.theta(x).view(batch, self.d, -1, 1)
            row: torch.Tensor = self.phi(source).view(batch, self.d, 1, -1)
            n, m = column.size(2), row.size(3)
            pairs = torch.cat([column.repeat(1, 1, 1, m), row.repeat(1, 1, n, 1)], dim=1)
            rectified: torch.Tensor = self.concat_project(pairs).view(batch, n, m)
            return rectified / m
        queries = self.theta(x).view(batch, self.d, -1)
        keys = self.phi(source).view(batch, self.d, -1)
        if self.pool_before:
            products = torch.einsum("bcq,bck->bqk", queries, keys)
        else:
            products = torch.matmul(queries.permute(0, 2, 1), keys)
        if self.mode == "dot_product":
            return products / products.size(-1)
        if self.divisor != 1:
            products = products / self.divisor
        return torch.softmax(products, dim=-1)
