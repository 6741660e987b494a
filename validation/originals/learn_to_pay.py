"""Learn to pay attention, original.

Paper: Jetley et al., "Learn To Pay Attention", ICLR 2018.
Behaviour: SaoYan/LearnToPayAttention, `blocks.py`, `model1.py`, `model2.py`; KennCoder7/LearnToPayAttention-pytorch,
`attention.py`; for the Torch7 options, saumya-jetley/cd_ICLR18_LearnToPayAttention, `VGGNet/models`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _weighted(c: torch.Tensor, local: torch.Tensor, normalise: bool) -> torch.Tensor:
    """Return (B, C): the sum under a softmax, or the mean under sigmoids."""
    batch, channels, height, width = local.shape
    if normalise:
        a = F.softmax(c.reshape(batch, 1, -1), dim=2).reshape(batch, 1, height, width)
        return (a.expand_as(local) * local).reshape(batch, channels, -1).sum(dim=2)
    return F.adaptive_avg_pool2d(torch.sigmoid(c).expand_as(local) * local, (1, 1)).reshape(batch, channels)


class LinearAttentionBlock(nn.Module):
    """Compatibility of l and g, and the attended feature.

    Args:
        in_features: channels.
        normalize_attn: softmax or sigmoid.
        compatibility: "parametrised" or "dot".
    """

    def __init__(self, in_features: int, normalize_attn: bool = True, compatibility: str = "parametrised") -> None:
        super().__init__()
        self.normalize_attn = normalize_attn
        self.dot = compatibility == "dot"
        if not self.dot:
            self.op = nn.Conv2d(in_features, 1, 1, bias=False)

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, 1, H, W) and (B, C)."""
        c = (local * g).sum(dim=1, keepdim=True) if self.dot else self.op(local + g)
        return c, _weighted(c, local, self.normalize_attn)


class ProjectedAttentionBlock(nn.Module):
    """Attended feature and attention, with g projected where its channels differ.

    Args:
        local_channels: C.
        global_channels: G.
        method: "pc" or "dp".
    """

    def __init__(self, local_channels: int, global_channels: int = 512, method: str = "pc") -> None:
        super().__init__()
        self.method = method
        self.project = nn.Linear(global_channels, local_channels, bias=False)
        self.pc = nn.Linear(local_channels, 1, bias=False)

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, C) and (B, H, W)."""
        height, width = local.shape[2:]
        positions = local.flatten(2).transpose(1, 2)
        if self.project.in_features != self.project.out_features:
            g = self.project(g)
        if self.method == "dp":
            c = (positions * g[:, None, :]).sum(dim=2)
        else:
            c = self.pc(positions + g[:, None, :])[:, :, 0]
        a = F.softmax(c, dim=1)
        return (a[:, :, None] * positions).sum(dim=1), a.reshape(-1, height, width)


class GridAttentionBlock(nn.Module):
    """Compatibility of l and an upsampled g.

    Args:
        in_features_l: channels of l.
        in_features_g: channels of g.
        attn_features: channels of the comparison.
        up_factor: size of l over that of g.
        normalize_attn: softmax or sigmoid.
    """

    def __init__(
        self, in_features_l: int, in_features_g: int, attn_features: int, up_factor: int, normalize_attn: bool = False
    ) -> None:
        super().__init__()
        self.up_factor, self.normalize_attn = up_factor, normalize_attn
        self.W_l = nn.Conv2d(in_features_l, attn_features, 1, bias=False)
        self.W_g = nn.Conv2d(in_features_g, attn_features, 1, bias=False)
        self.phi = nn.Conv2d(attn_features, 1, 1, bias=True)

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, 1, H, W) and (B, C)."""
        projected = self.W_g(g)
        if self.up_factor > 1:
            projected = F.interpolate(projected, scale_factor=self.up_factor, mode="bilinear", align_corners=False)
        c = self.phi(F.relu(self.W_l(local) + projected))
        return c, _weighted(c, local, self.normalize_attn)


class _Named(nn.Module):
    """Holds one module under the name `op`."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.op(x)
        return y


class _Reducer(nn.Module):
    """BN, ReLU, Linear of g."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inputs)
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, g: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(F.relu(self.bn(g[:, :, 0, 0])))
        return y[:, :, None, None]


class AttentionHead(nn.Module):
    """Attention of three levels and classification.

    Args:
        local_channels: channels of level 1.
        channels: channels of the others and of g.
        num_classes: classes.
        compatibility: "parametrised" or "dot".
        normalize_attn: softmax or sigmoid.
        classifier: "concat" or "independent".
        project: "local" (l1 up) or "global" (g down).
        head_norm: BN and ReLU before the classifier.
        return_maps: return c as well.
    """

    def __init__(
        self,
        local_channels: int = 256,
        channels: int = 512,
        num_classes: int = 100,
        compatibility: str = "parametrised",
        normalize_attn: bool = True,
        classifier: str = "concat",
        project: str = "local",
        head_norm: bool = False,
        return_maps: bool = True,
    ) -> None:
        super().__init__()
        self.normalize_attn, self.return_maps, self.head_norm = normalize_attn, return_maps, head_norm
        self.dot, self.project, self.classifier = compatibility == "dot", project, classifier
        first = channels if project == "local" else local_channels
        if project == "local":
            self.projector = _Named(nn.Conv2d(local_channels, channels, 1, bias=False))
        else:
            self.reducer = _Reducer(channels, local_channels)
        if not self.dot:
            self.attn1 = LinearAttentionBlock(first, normalize_attn)
            self.attn2 = LinearAttentionBlock(channels, normalize_attn)
            self.attn3 = LinearAttentionBlock(channels, normalize_attn)
        if head_norm:
            self.bn1, self.bn2, self.bn3 = (nn.BatchNorm1d(c) for c in (first, channels, channels))
        if classifier == "concat":
            self.classify = nn.Linear(first + 2 * channels, num_classes)
        else:
            self.classify1 = nn.Linear(first, num_classes)
            self.classify2 = nn.Linear(channels, num_classes)
            self.classify3 = nn.Linear(channels, num_classes)

    def forward(
        self, l1: torch.Tensor, l2: torch.Tensor, l3: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return scores and, if asked for, the three maps of c."""
        g1 = g
        if self.project == "local":
            l1 = self.projector(l1)
        else:
            g1 = self.reducer(g)
        if self.dot:
            block = LinearAttentionBlock(1, self.normalize_attn, "dot")
            pairs = [block(l1, g1), block(l2, g), block(l3, g)]
        else:
            pairs = [self.attn1(l1, g1), self.attn2(l2, g), self.attn3(l3, g)]
        maps, features = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if self.head_norm:
            norms = (self.bn1, self.bn2, self.bn3)
            features = [F.relu(norm(x)) for norm, x in zip(norms, features, strict=True)]
        if self.classifier == "concat":
            scores = self.classify(torch.cat(features, dim=1))
        else:
            heads = (self.classify1, self.classify2, self.classify3)
            logs = [F.log_softmax(head(x), dim=1) for head, x in zip(heads, features, strict=True)]
            scores = torch.softmax(torch.stack(logs).sum(dim=0), dim=1)
        return (scores, *maps) if self.return_maps else scores


def _convs(inputs: int, outputs: int, number: int, pool: bool = False) -> _Named:
    """Return convolutions with BN and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(number):
        layers.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()])
        inputs = outputs
        if pool:
            layers.append(nn.MaxPool2d(2, 2))
    return _Named(nn.Sequential(*layers))


class AttnVGG(AttentionHead):
    """VGG with attention.

    Args:
        im_size: side of the image.
        num_classes: classes.
        normalize_attn: softmax or sigmoid.
        before: attention before or after pooling.
        base_channels: channels of block 1.
        return_maps: return c as well.
    """

    def __init__(
        self,
        im_size: int = 32,
        num_classes: int = 100,
        normalize_attn: bool = True,
        before: bool = True,
        base_channels: int = 64,
        return_maps: bool = True,
    ) -> None:
        super().__init__(
            base_channels * 4, base_channels * 8, num_classes, normalize_attn=normalize_attn, return_maps=return_maps
        )
        self.before = before
        self.conv_block1 = _convs(3, base_channels, 2)
        self.conv_block2 = _convs(base_channels, base_channels * 2, 2)
        self.conv_block3 = _convs(base_channels * 2, base_channels * 4, 3)
        self.conv_block4 = _convs(base_channels * 4, base_channels * 8, 3)
        self.conv_block5 = _convs(base_channels * 8, base_channels * 8, 3)
        self.conv_block6 = _convs(base_channels * 8, base_channels * 8, 2, pool=True)
        self.dense = nn.Conv2d(base_channels * 8, base_channels * 8, im_size // 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Return scores and, if asked for, the three maps of c, from images (B, 3, im_size, im_size)."""
        third = self.conv_block3(self.conv_block2(self.conv_block1(x)))
        third_pooled = F.max_pool2d(third, 2, 2)
        fourth = self.conv_block4(third_pooled)
        fourth_pooled = F.max_pool2d(fourth, 2, 2)
        fifth = self.conv_block5(fourth_pooled)
        fifth_pooled = F.max_pool2d(fifth, 2, 2)
        g = self.dense(self.conv_block6(fifth_pooled))
        if self.before:
            return super().forward(third, fourth, fifth, g)
        return super().forward(third_pooled, fourth_pooled, fifth_pooled, g)
