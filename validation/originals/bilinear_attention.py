"""Bilinear attention networks, original.

Paper: Kim et al., "Bilinear Attention Networks", NeurIPS 2018; Zhang et al., "Learning to Count Objects in Natural
Images for Visual Question Answering", ICLR 2018.
Behaviour: jnhwkim/ban-vqa, `bc.py`, `attention.py`, `base_model.py`, `counting.py`, with the mask as an argument.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _Normed(nn.Module):
    """Linear layer with one norm for its whole matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(()))
        self.weight_v = nn.Parameter(torch.ones(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_g * self.weight_v / torch.linalg.vector_norm(self.weight_v), self.bias)


class _FC(nn.Module):
    """Fully connected layer; `position` is its place in `main`."""

    def __init__(self, inputs: int, outputs: int, position: int, relu: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(*[nn.Identity()] * position, _Normed(inputs, outputs))
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.main(x)
        return F.relu(y) if self.relu else y


class BCNet(nn.Module):
    """Bilinear form of all pairs.

    Args:
        v_dim: features of v.
        q_dim: features of q.
        h_dim: rank.
        h_out: outputs per pair, or None.
        k: factor of the rank.
        norm_h_mat: whether h_mat has a norm of its own.
    """

    def __init__(
        self, v_dim: int, q_dim: int, h_dim: int, h_out: int | None, k: int = 3, norm_h_mat: bool = False
    ) -> None:
        super().__init__()
        self.k, self.h_out, self.norm_h_mat = k, h_out, norm_h_mat
        self.v_net = _FC(v_dim, h_dim * k, 1, True)
        self.q_net = _FC(q_dim, h_dim * k, 1, True)
        if h_out is not None and h_out <= 32:
            self.h_bias = nn.Parameter(torch.zeros(1, h_out, 1, 1))
            if norm_h_mat:
                self.h_mat_g = nn.Parameter(torch.ones(()))
                self.h_mat_v = nn.Parameter(torch.ones(1, h_out, 1, h_dim * k))
            else:
                self.h_mat = nn.Parameter(torch.ones(1, h_out, 1, h_dim * k))
        elif h_out is not None:
            self.h_net = _Normed(h_dim * k, h_out)

    def forward(self, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return (B, h_out, n, t), or (B, n, t, K) without h_out, from (B, n, v_dim) and (B, t, q_dim)."""
        left, right = self.v_net(v), self.q_net(q)
        if self.h_out is None:
            return torch.einsum("bvk,bqk->bvqk", left, right)
        if self.h_out <= 32:
            matrix = self.h_mat_g * self.h_mat_v / self.h_mat_v.norm() if self.norm_h_mat else self.h_mat
            return torch.einsum("hk,bvk,bqk->bhvq", matrix[0, :, 0], left, right) + self.h_bias
        outer = torch.matmul(left.transpose(1, 2).unsqueeze(3), right.transpose(1, 2).unsqueeze(2))
        scores: torch.Tensor = self.h_net(outer.transpose(1, 2).transpose(2, 3))
        return scores.transpose(2, 3).transpose(1, 2)

    def forward_with_weights(self, v: torch.Tensor, q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return (B, h_dim), weighted by w (B, n, t)."""
        pooled = torch.einsum("bvk,bvq,bqk->bk", self.v_net(v), w, self.q_net(q))
        if self.k > 1:
            pooled = F.avg_pool1d(pooled.unsqueeze(1), self.k, stride=self.k).squeeze(1) * self.k
        return pooled


class BiAttention(nn.Module):
    """Attention over all pairs.

    Args:
        x_dim: features of v.
        y_dim: features of q.
        z_dim: rank / 3.
        glimpse: maps.
    """

    def __init__(self, x_dim: int, y_dim: int, z_dim: int, glimpse: int) -> None:
        super().__init__()
        self.glimpse = glimpse
        self.logits = BCNet(x_dim, y_dim, z_dim, glimpse, k=3, norm_h_mat=True)

    def forward(self, v: torch.Tensor, q: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention and logits (B, G, n, t); the mask (B, n) is true for padding."""
        logits = self.logits(v, q)
        logits = torch.where(mask.bool()[:, None, :, None].expand(logits.shape), -65504.0, logits)
        n, t = v.shape[1], q.shape[1]
        attention = F.softmax(logits.reshape(-1, self.glimpse, n * t), 2)
        return attention.reshape(-1, self.glimpse, n, t), logits


class _Piecewise(nn.Module):
    """Monotonous function with 16 pieces, by its cumulative sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(17))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.weight.abs() / self.weight.abs().sum()
        total = shares.cumsum(0)
        place = 16 * x
        piece = place.long()
        fraction = place - piece
        return total[piece.clamp(0, 16)] + fraction * shares[(piece + 1).clamp(0, 16)]


class Counter(nn.Module):
    """Soft count of boxes.

    Args:
        objects: boxes that count.
        already_sigmoided: attention is a probability.
    """

    def __init__(self, objects: int = 10, already_sigmoided: bool = False) -> None:
        super().__init__()
        self.objects, self.already_sigmoided = objects, already_sigmoided
        self.f = nn.ModuleList(_Piecewise() for _ in range(16))

    def forward(self, boxes: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Return (B, objects + 1) from boxes (B, 4, m) and attention (B, m)."""
        attention, index = attention.topk(self.objects, dim=1)
        boxes = boxes.gather(2, index.unsqueeze(1).expand(boxes.shape[0], 4, self.objects))
        if not self.already_sigmoided:
            attention = torch.sigmoid(attention)
        relevancy = attention[:, :, None] * attention[:, None, :]
        distance = 1 - self._iou(boxes)
        score = self.f[0](relevancy) * self.f[1](distance)
        dedup = self.f[3](relevancy) * self.f[4](distance)
        between_rows = self.f[2](1 - (dedup[:, :, :, None] - dedup[:, :, None, :]).abs()).prod(1)
        similarity = between_rows * self.f[2](1 - (attention[:, :, None] - attention[:, None, :]).abs())
        rows = similarity.sum(2)
        score = score / (rows[:, :, None] * rows[:, None, :])
        correction = self.f[0](attention * attention) / rows
        total = (score.sum(2).sum(1, keepdim=True) + correction.sum(1, keepdim=True) + 1e-20).sqrt()
        total = total.clamp(min=0, max=self.objects)
        lower = total.long()
        fraction = total - lower
        left = F.one_hot(lower.clamp(0, self.objects)[:, 0], self.objects + 1).to(total)
        right = F.one_hot((lower + 1).clamp(0, self.objects)[:, 0], self.objects + 1).to(total)
        one_hot = (1 - fraction) * left + fraction * right
        attention_confidence = (self.f[5](attention) - 0.5).abs().mean(1, keepdim=True)
        distance_confidence = (self.f[6](distance) - 0.5).abs().mean(2).mean(1, keepdim=True)
        confidence: torch.Tensor = self.f[7](attention_confidence + distance_confidence)
        return one_hot * confidence

    @staticmethod
    def _iou(boxes: torch.Tensor) -> torch.Tensor:
        """Return intersection over union (B, m, m)."""
        left, top, right, bottom = boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3]
        area = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
        wide = torch.min(right[:, :, None], right[:, None]) - torch.max(left[:, :, None], left[:, None])
        high = torch.min(bottom[:, :, None], bottom[:, None]) - torch.max(top[:, :, None], top[:, None])
        common = wide.clamp(min=0) * high.clamp(min=0)
        return common / (area[:, :, None] + area[:, None] - common + 1e-12)


class _Classifier(nn.Module):
    """Two layers."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(_Normed(inputs, hidden), nn.ReLU(), nn.Identity(), _Normed(hidden, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.main(x)
        return y


class BilinearAttentionNetwork(nn.Module):
    """BAN without its language part.

    Args:
        v_dim: features of v.
        num_hid: hidden features.
        glimpses: maps.
        answers: classes.
        objects: boxes that count.
    """

    def __init__(
        self, v_dim: int = 2048, num_hid: int = 1280, glimpses: int = 8, answers: int = 3129, objects: int = 10
    ) -> None:
        super().__init__()
        self.v_att = BiAttention(v_dim, num_hid, num_hid, glimpses)
        self.b_net = nn.ModuleList(BCNet(v_dim, num_hid, num_hid, None, k=1) for _ in range(glimpses))
        self.q_prj = nn.ModuleList(_FC(num_hid, num_hid, 1, False) for _ in range(glimpses))
        self.c_prj = nn.ModuleList(_FC(objects + 1, num_hid, 0, True) for _ in range(glimpses))
        self.classifier = _Classifier(num_hid, num_hid * 2, answers)
        self.counter = Counter(objects)

    def forward(
        self, v: torch.Tensor, boxes: torch.Tensor, q: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return answers and attention from v (B, n, v_dim), boxes (B, n, 4), q (B, t, num_hid), mask (B, n)."""
        placed = torch.where(mask.bool()[:, :, None], 0.0, boxes).transpose(1, 2)
        attention, logits = self.v_att(v, q, mask)
        for g, (pool, project, project_count) in enumerate(zip(self.b_net, self.q_prj, self.c_prj, strict=True)):
            assert isinstance(pool, BCNet)
            pooled = pool.forward_with_weights(v, q, attention[:, g])
            count = self.counter(placed, logits[:, g].max(2)[0])
            q = project(pooled.unsqueeze(1)) + q
            q = q + project_count(count).unsqueeze(1)
        answers: torch.Tensor = self.classifier(q.sum(1))
        return answers, attention
