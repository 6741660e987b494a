"""Attention written in many ways: torch modules and ONNX graphs that `rewrite` must or must not replace."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import onnx
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, HEIGHT, WIDTH = 16, 5, 7


class CrissCross(nn.Module):
    """Projections, gamma and residual of criss-cross attention; subclasses write the core."""

    def __init__(self, *, gamma_shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(CHANNELS, CHANNELS // 8, 1)
        self.key_conv = nn.Conv2d(CHANNELS, CHANNELS // 8, 1)
        self.value_conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.gamma = nn.Parameter(torch.full(gamma_shape, 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.core(self.query_conv(x), self.key_conv(x), self.value_conv(x)), x)

    def finish(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * attended + x


class BatchedMatmul(CrissCross):
    """Three-dimensional batched products and an additive infinite diagonal, as in the authors' code."""

    def core(self, q, k, v):
        b, _, h, w = q.shape
        q_h = q.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h).permute(0, 2, 1)
        q_w = q.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w).permute(0, 2, 1)
        k_h = k.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h)
        k_w = k.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w)
        v_h = v.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h)
        v_w = v.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w)
        infinite = -torch.diag(torch.tensor(float("inf")).repeat(h), 0).unsqueeze(0).repeat(b * w, 1, 1)
        e_h = (torch.bmm(q_h, k_h) + infinite).view(b, w, h, h).permute(0, 2, 1, 3)
        e_w = torch.bmm(q_w, k_w).view(b, h, w, w)
        both = F.softmax(torch.cat([e_h, e_w], 3), dim=3)
        a_h = both[:, :, :, 0:h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        a_w = both[:, :, :, h : h + w].contiguous().view(b * h, w, w)
        out_h = torch.bmm(v_h, a_h.permute(0, 2, 1)).view(b, w, -1, h).permute(0, 2, 3, 1)
        out_w = torch.bmm(v_w, a_w.permute(0, 2, 1)).view(b, h, -1, w).permute(0, 2, 1, 3)
        return out_h + out_w


class Einsum(CrissCross):
    """Four einsums, as in mmcv; the mask is a finite diagonal."""

    def core(self, q, k, v):
        h = q.shape[2]
        mask = torch.eye(h, dtype=q.dtype) * -1e9
        e_h = (torch.einsum("bchw,bciw->bwhi", q, k) + mask).transpose(1, 2)
        e_w = torch.einsum("bchw,bchj->bhwj", q, k)
        both = F.softmax(torch.cat([e_h, e_w], dim=-1), dim=-1)
        out = torch.einsum("bciw,bhwi->bchw", v, both[..., :h])
        return out + torch.einsum("bchj,bhwj->bchw", v, both[..., h:])


class FourD(CrissCross):
    """Four-dimensional products and `masked_fill`."""

    def mask(self, energy, h):
        return energy.masked_fill(torch.eye(h, dtype=torch.bool), float("-inf"))

    def core(self, q, k, v):
        h, w = q.shape[2:]
        e_h = torch.matmul(q.permute(0, 3, 2, 1), k.permute(0, 3, 1, 2))
        e_h = self.mask(e_h, h).permute(0, 2, 1, 3)
        e_w = torch.matmul(q.permute(0, 2, 3, 1), k.permute(0, 2, 1, 3))
        a_h, a_w = torch.softmax(torch.cat([e_h, e_w], dim=3), dim=3).split([h, w], dim=3)
        out_h = torch.matmul(a_h.permute(0, 2, 1, 3), v.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        out_w = torch.matmul(a_w, v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out_h + out_w


class WhereArange(FourD):
    """Where-mask from compared indices, rows first, gamma on each branch."""

    def core(self, q, k, v):
        h, w = q.shape[2:]
        rows = torch.arange(h)
        e_h = torch.matmul(q.permute(0, 3, 2, 1), k.permute(0, 3, 1, 2))
        e_h = torch.where(rows[:, None] == rows[None, :], torch.tensor(-65504.0), e_h).permute(0, 2, 1, 3)
        e_w = torch.matmul(q.permute(0, 2, 3, 1), k.permute(0, 2, 1, 3))
        both = torch.softmax(torch.cat([e_w, e_h], dim=3), dim=3)
        out_w = torch.matmul(both[..., :w], v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out_h = torch.matmul(both[..., w:].permute(0, 2, 1, 3), v.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        return self.gamma * out_h + self.gamma * out_w

    def finish(self, attended, x):
        return x + attended


class ScaledAxisOne(CrissCross):
    """Scaled energies, joined and normalised along axis 1, no gamma, no residual."""

    def core(self, q, k, v):
        c, h = q.shape[1:3]
        e_h = torch.einsum("bchw,bciw->bihw", q, k) * c**-0.5
        e_h = e_h.masked_fill(torch.eye(h, dtype=torch.bool)[None, :, :, None], -1e9)
        e_w = torch.einsum("bchw,bchj->bjhw", q, k) * c**-0.5
        both = torch.cat([e_h, e_w], dim=1).softmax(dim=1)
        out_h = torch.einsum("bihw,bciw->bchw", both[:, :h], v)
        return out_h + torch.einsum("bjhw,bchj->bchw", both[:, h:], v)

    def finish(self, attended, x):
        return attended


class FusedProjection(FourD):
    """One convolution for query, key and value."""

    def __init__(self) -> None:
        super().__init__(gamma_shape=())
        self.projection = nn.Conv2d(CHANNELS, CHANNELS + 2 * (CHANNELS // 8), 1)

    def forward(self, x):
        small = CHANNELS // 8
        q, k, v = self.projection(x).split([small, small, CHANNELS], dim=1)
        return self.finish(self.core(q, k, v), x)


class ChannelsLast(CrissCross):
    """Linear projections on (batch, height, width, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_query, self.to_key, self.to_value = (
            nn.Linear(CHANNELS, size) for size in (CHANNELS // 8, CHANNELS // 8, CHANNELS)
        )

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1)
        q, k, v = self.to_query(rows), self.to_key(rows), self.to_value(rows)
        h = q.shape[1]
        mask = torch.eye(h, dtype=torch.bool)
        e_h = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).masked_fill(mask, float("-inf")).transpose(1, 2)
        e_w = q @ k.transpose(2, 3)
        both = torch.cat([e_h, e_w], -1).softmax(-1)
        out = (both[..., :h].transpose(1, 2) @ v.transpose(1, 2)).transpose(1, 2) + both[..., h:] @ v
        return self.gamma * out.permute(0, 3, 1, 2) + x


class Network(nn.Module):
    """Two recurrences of one block behind a strided stem."""

    def __init__(self, block: nn.Module, *, stride: int = 1, recurrences: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1, stride=stride)
        self.cca = block
        self.head = nn.Conv2d(CHANNELS, 4, 1)
        self.recurrences = recurrences

    def forward(self, image):
        x = F.relu(self.stem(image))
        for _ in range(self.recurrences):
            x = self.cca(x)
        return self.head(x)


class CoAttention(nn.Module):
    """Two frames through one encoder, attention in both directions, gates and heads, as COSNet lays them out."""

    def __init__(self, *, gate: bool = True, form: str = "bmm") -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.linear_e = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.projection = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.gate = nn.Conv2d(CHANNELS, 1, 1, bias=False) if gate else None
        self.conv1 = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1)
        self.form = form

    def forward(self, target, reference):
        a, b = self.encoder(target), self.encoder(reference)
        attended = getattr(self, self.form)(a, b)
        if self.gate is not None:
            attended = [item * torch.sigmoid(self.gate(item)) for item in attended]
        heads = zip(attended, (a, b), (self.conv1, self.conv2), strict=False)
        return tuple(head(torch.cat([item, own], 1)) for item, own, head in heads)

    def bmm(self, a, b):
        c, h, w = a.shape[1:]
        a_flat, b_flat = a.view(-1, c, h * w), b.view(-1, c, h * w)
        corr = self.linear_e(torch.transpose(a_flat, 1, 2).contiguous())
        affinity = torch.bmm(corr, b_flat)
        over_a = F.softmax(affinity.clone(), dim=1)
        over_b = F.softmax(torch.transpose(affinity, 1, 2), dim=1)
        from_a = torch.bmm(a_flat, over_a).contiguous()
        from_b = torch.bmm(b_flat, over_b).contiguous()
        return [from_b.view(-1, c, h, w), from_a.view(-1, c, h, w)]

    def einsum(self, a, b):
        a_flat, b_flat = a.flatten(2), b.flatten(2)
        affinity = torch.einsum("bcm,bcn->bmn", self.projection(a).flatten(2), b_flat)
        from_b = torch.einsum("bmn,bcn->bcm", affinity.softmax(2), b_flat)
        from_a = torch.einsum("bmn,bcm->bcn", affinity.softmax(1), a_flat)
        return [from_b.unflatten(2, a.shape[2:]), from_a.unflatten(2, b.shape[2:])]

    def bilinear(self, a, b):
        a_flat, b_flat = a.flatten(2), b.flatten(2)
        affinity = torch.einsum("bci,cd,bdj->bij", a_flat, self.linear_e.weight, b_flat)
        from_b = torch.einsum("bdj,bij->bdi", b_flat, affinity.softmax(2)).reshape(a.shape)
        return [from_b, torch.einsum("bci,bij->bcj", a_flat, affinity.softmax(1)).reshape(b.shape)]

    def group(self, a, b):
        """Two references, side by side along the height."""
        both = torch.cat([b, self.projection(b)], 2)
        affinity = self.projection(a).flatten(2).transpose(1, 2) @ both.flatten(2)
        return [(both.flatten(2) @ affinity.softmax(2).transpose(1, 2)).view_as(a)]

    def one_way(self, a, b):
        affinity = self.projection(a).flatten(2).transpose(1, 2) @ b.flatten(2)
        return [(b.flatten(2) @ affinity.softmax(dim=-1).transpose(1, 2)).view_as(a)]

    def one_way_tokens(self, a, b):
        query, key = self.linear_e(a.flatten(2).transpose(1, 2)), b.flatten(2).transpose(1, 2)
        weights = torch.softmax(query @ key.transpose(1, 2), dim=-1)
        return [(weights @ key).transpose(1, 2).reshape(a.shape)]


def export(model: nn.Module, *, dynamic: bool = False, legacy: bool = False, optimize: bool = True, size=None):
    """Export with torch, quietly."""
    height, width = size or (HEIGHT, WIDTH)
    torch.manual_seed(0)
    names = ["target", "reference"] if isinstance(model, CoAttention) else ["image"]
    example = tuple(torch.randn(2 if dynamic else 1, 3, height, width) for _ in names)
    axes = {0: "batch", 2: "height", 3: "width"}
    options: dict[str, object] = {"input_names": names, "opset_version": 18}
    if legacy:
        buffer = io.BytesIO()
        options.update(dynamo=False, dynamic_axes=dict.fromkeys(names, axes) if dynamic else None)
        with _quiet():
            torch.onnx.export(model.eval(), example, buffer, **options)
        return onnx.load_from_string(buffer.getvalue())
    shapes = tuple(dict(axes) for _ in names) if dynamic else None
    with _quiet():
        program = torch.onnx.export(
            model.eval(), example, dynamo=True, optimize=optimize, dynamic_shapes=shapes, verbose=False, **options
        )
    return program.model_proto


@contextlib.contextmanager
def _quiet():
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


class AlmostCrissCross(CrissCross):
    """Four-dimensional criss-cross attention with one thing changed.

    Args:
        fault: what is changed; an empty string changes nothing.
    """

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.second = nn.Conv2d(CHANNELS, CHANNELS if "value" in fault else CHANNELS // 8, 1)

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        other = self.second(x)
        fault = self.fault
        q_w = other if fault == "two queries" else q
        k_w = other if fault == "two keys" else k
        v_w = other if fault == "two values" else v
        q_h, k_h = (k, q) if fault == "column swapped" else (q, k)
        q_w, k_w = (k_w, q_w) if fault == "row swapped" else (q_w, k_w)
        e_h = torch.matmul(q_h.permute(0, 3, 2, 1), k_h.permute(0, 3, 1, 2))
        e_w = torch.matmul(q_w.permute(0, 2, 3, 1), k_w.permute(0, 2, 1, 3))
        e_h, e_w = self.masked(e_h, e_w)
        if fault == "scaled row":
            e_w = e_w * 0.5
        out_h, out_w = self.outputs(*self.weights(e_h.permute(0, 2, 1, 3), e_w), v, v_w)
        if fault == "one branch":
            return self.gamma * out_w + x
        if fault == "difference":
            return self.gamma * (out_h - out_w) + x
        if fault == "unequal branches":
            return self.gamma * (out_h * 0.5 + out_w) + x
        return self.gamma * (out_h + out_w) + x

    def masked(self, e_h, e_w):
        """Apply the mask, or what the fault makes of it."""
        rows, columns = torch.arange(e_h.shape[-1]), torch.arange(e_w.shape[-1])
        own_row, own_column = rows[:, None] == rows[None, :], columns[:, None] == columns[None, :]
        lowest = torch.tensor(-1.0 if self.fault == "weak mask" else -1e9)
        if self.fault == "shifted mask":
            own_row = rows[:, None] == (rows[None, :] + 1) % len(rows)
        if self.fault == "other diagonal":
            own_row = rows[:, None] == len(rows) - 1 - rows[None, :]
        if self.fault == "wide mask":
            own_row = own_row | (rows[:, None] == rows[None, :] + 1)
        if self.fault not in ("no mask", "row mask"):
            e_h = torch.where(own_row, lowest, e_h)
        if self.fault in ("row mask", "both masks"):
            e_w = torch.where(own_column, lowest, e_w)
        return e_h, e_w

    def weights(self, e_h, e_w):
        """Normalise."""
        if self.fault == "separate softmaxes":
            return e_h.softmax(3), e_w.softmax(3)
        axis = {"softmax over rows": 1, "softmax over columns": 2}.get(self.fault, 3)
        return torch.cat([e_h, e_w], 3).softmax(axis).split([e_h.shape[3], e_w.shape[3]], 3)

    def outputs(self, a_h, a_w, v_h, v_w):
        """Sum the values."""
        a_h = a_h.permute(0, 2, 1, 3)
        if self.fault == "column transposed":
            a_h = a_h.transpose(2, 3)
        if self.fault == "row transposed":
            a_w = a_w.transpose(2, 3)
        if self.fault == "branches exchanged":
            a_h, a_w = a_w.permute(0, 2, 1, 3), a_h.permute(0, 2, 1, 3)
        out_h = torch.matmul(a_h, v_h.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        return out_h, torch.matmul(a_w, v_w.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AlmostCoAttention(CoAttention):
    """Co-attention with one thing changed.

    Args:
        fault: what is changed; an empty string changes nothing.
    """

    def __init__(self, fault: str) -> None:
        super().__init__(form="faulty")
        self.fault = fault

    def faulty(self, a, b):
        fault = self.fault
        a_flat, b_flat = a.flatten(2), b.flatten(2)
        key = self.projection(a).flatten(2) if fault == "one map" else b_flat
        affinity = self.linear_e(a_flat.transpose(1, 2)) @ key
        over_b = affinity.softmax(1 if fault == "softmax over a" else 2)
        over_a = affinity.softmax(2 if fault == "softmax over b" else 1)
        value_a = b_flat if fault == "values of the other frame" else a_flat
        from_b = b_flat @ (over_b if fault == "not transposed" else over_b.transpose(1, 2))
        from_a = value_a @ (over_a.transpose(1, 2) if fault == "transposed" else over_a)
        if fault == "sharpened":
            from_b = b_flat @ (over_b * over_b).transpose(1, 2)
        return [from_b.view_as(a), from_a.view_as(b)]


NEAR_CRISS_CROSS = {
    "no mask": "counted twice",
    "row mask": "row branch",
    "both masks": "both branches are masked",
    "weak mask": "too weak",
    "shifted mask": "off the diagonal",
    "other diagonal": "other diagonal",
    "wide mask": "1.8 positions",
    "two queries": "different maps",
    "two keys": "different maps",
    "two values": "different values",
    "column swapped": "query and key change places",
    "row swapped": "query and key change places",
    "scaled row": "scaled differently",
    "one branch": "one column and one row",
    "difference": "not added",
    "unequal branches": "different factors",
    "separate softmaxes": "one softmax over both",
    "softmax over rows": "softmax runs over axis 1",
    "softmax over columns": "softmax runs over axis 2",
    "column transposed": "column branch is applied transposed",
    "row transposed": "row branch is applied transposed",
    "branches exchanged": "the other way round",
}
"""Faults of `AlmostCrissCross`, and words that the refusal's reason holds."""

NEAR_CO_ATTENTION = {
    "one map": "self-attention",
    "softmax over a": "one softmax serves both directions",
    "softmax over b": "one softmax serves both directions",
    "values of the other frame": "query's own map",
    "not transposed": "applied transposed",
    "transposed": "sum over those of the other",
    "sharpened": "also read by",
}
"""Faults of `AlmostCoAttention`, and words that the refusal's reason holds."""

TEXT_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
criss_cross (float[batch, 6, height, width] query, float[batch, 6, height, width] key,
             float[batch, 9, height, width] value) => (float[batch, 9, height, width] out)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, int64[1] last = {3},
 int64[1] start = {0}, int64[1] far = {100000}, float lowest = {-1e30}>
{
    height_1 = Shape <start = 2, end = 3> (key)
    height_0 = Squeeze (height_1, first)
    rows = Range (zero, height_0, one)
    down = Unsqueeze (rows, second)
    same = Equal (rows, down)
    zeros = ConstantOfShape <value = float[1] {0}> (height_1)
    penalty = Where (same, lowest, zeros)
    q_h = Transpose <perm = [0, 3, 2, 1]> (query)
    k_h = Transpose <perm = [0, 3, 1, 2]> (key)
    e_h_free = MatMul (q_h, k_h)
    e_h_masked = Add (penalty, e_h_free)
    e_h = Transpose <perm = [0, 2, 1, 3]> (e_h_masked)
    k_w = Transpose <perm = [0, 2, 3, 1]> (key)
    q_w = Transpose <perm = [0, 2, 1, 3]> (query)
    e_w_turned = MatMul (k_w, q_w)
    e_w = Transpose <perm = [0, 1, 3, 2]> (e_w_turned)
    energy = Concat <axis = -1> (e_h, e_w)
    attention = Softmax (energy)
    a_h = Slice (attention, start, height_1, last)
    a_w = Slice (attention, height_1, far, last)
    a_h_t = Transpose <perm = [0, 2, 1, 3]> (a_h)
    v_h = Transpose <perm = [0, 3, 2, 1]> (value)
    out_h_t = MatMul (a_h_t, v_h)
    out_h = Transpose <perm = [0, 3, 2, 1]> (out_h_t)
    v_w = Transpose <perm = [0, 2, 3, 1]> (value)
    out_w_t = MatMul (a_w, v_w)
    out_w = Transpose <perm = [0, 3, 1, 2]> (out_w_t)
    with_residual = Add (out_h, value)
    out = Add (with_residual, out_w)
}
"""
"""Criss-cross attention by hand: key times query in the rows, and the residual added before the branches meet."""
