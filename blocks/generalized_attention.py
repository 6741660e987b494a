"""Generalised attention of the empirical study: four terms of content and relative position, each on or off.

Paper: Zhu et al., "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", ICCV 2019 (arXiv 1904.05873).
Code: https://github.com/open-mmlab/mmcv, `mmcv/cnn/bricks/generalized_attention.py`;
https://github.com/xvjiarui/GCNet, `mmdet/models/plugins/generalized_attention.py`.

    energy[q, k] = a: q_q . k_k + b: q_q . p_qk + c: u . k_k + d: v . p_qk,  out = gamma (P softmax_k(energy) V x) + x
    p_qk = (Wx E(x_q - x_k) + Wy E(y_q - y_k)) / sqrt(2),  E(t) = [sin(t / f_m)]_m ++ [cos(t / f_m)]_m,
    f_m = 1000^(4m / D), m = 0 .. D/4 - 1, per head, without a scale

p is a sum of two parts, so b and d give each query one number per row of keys and one per column, and c gives one per
key; they are small, and added to the energies as they are. Types 1000 and 1010 are plain attention. Type 0010, one
map for all queries, is computed on the C channels in front of the projection to values, which then acts on one vector
per head instead of on all keys.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.precision import LOWEST
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

MAP_SIZES = {256: 84, 512: 42}
"""Side of `local_constraint_map` by channels of the input, as the published code has it."""

WAVELENGTH = 1000.0
_SQUARE = "the published code takes the transposed query for the rows, which needs a square map"


class GeneralizedAttention(nn.Module):
    """Generalised attention.

    State names and shapes are the official ones, with M heads of d = in_channels // M channels (M d may be less than
    in_channels): 1x1 convolutions without bias `query_conv` (types with a or b), `key_conv` (a or c), `value_conv`;
    `appr_geom_fc_x`, `appr_geom_fc_y` (M d, D / 2; b or d); `appr_bias` (c) and `geom_bias` (d), M d numbers each;
    `proj_conv` with bias; `gamma` (1,). With a spatial range there is also `local_constraint_map`, which is loaded and
    saved but not read: it follows from `spatial_range` and `kv_stride`.

    Quirks of the published code that belong to the definition: no 1 / sqrt(d); wavelengths of base 1000; the spatial
    range compares the number of a query, not its place, with the places of keys, so that it is off by `q_stride`.
    GCNet's copy does not resize to the input after `q_stride`, and so only has `q_stride=1`.

    Types with b but not d differ from the paper in the published code, see `transposed_query`. Type 0010 with a spatial
    range is refused: the published code lets the range of the first pixel decide for all.

    Args:
        in_channels: channels C of input and output.
        spatial_range: how far, in pixels, keys may be from a query in either direction; -1 for any distance.
        num_heads: number M of heads.
        position_embedding_dim: D, a multiple of 4; in_channels when it is not positive.
        position_magnitude: factor of the relative positions.
        kv_stride: keys and values are every n-th pixel of both axes.
        q_stride: queries are every n-th pixel; the result is resized bilinearly.
        attention_type: four digits 0 or 1 for a, b, c, d.
        transposed_query: for types with b but not d, and only for these, True takes the query at (x, y) for the row
            term of (y, x), as the published code does on square maps (it fails on others); False computes the paper's
            definition.
        export_size: the largest height or width that an exported block takes; it holds the positional terms of every
            distance below.

    Raises:
        ValueError: a type, number of heads, D, stride or spatial range that the definition does not have, or a
            `transposed_query` that is missing or has no meaning.
    """

    appr_bias: nn.Parameter | None
    geom_bias: nn.Parameter | None
    gamma: nn.Parameter | None
    row_terms: torch.Tensor | None
    column_terms: torch.Tensor | None
    offset: torch.Tensor | None
    zero: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        spatial_range: int = -1,
        num_heads: int = 9,
        position_embedding_dim: int = -1,
        position_magnitude: int = 1,
        kv_stride: int = 2,
        q_stride: int = 1,
        attention_type: str = "1111",
        transposed_query: bool | None = None,
        export_size: int = 256,
    ) -> None:
        super().__init__()
        if len(attention_type) != 4 or set(attention_type) - set("01") or attention_type == "0000":
            raise ValueError(f"attention_type={attention_type!r}: give four digits 0 or 1, not all 0, such as '1111'")
        if not 1 <= num_heads <= in_channels:
            raise ValueError(f"num_heads={num_heads}: give 1 to in_channels={in_channels}")
        if min(kv_stride, q_stride) < 1:
            raise ValueError(f"kv_stride={kv_stride}, q_stride={q_stride}: give at least 1")
        self.pairs, self.by_query, self.by_key, self.by_place = (digit == "1" for digit in attention_type)
        embedding = position_embedding_dim if position_embedding_dim > 0 else in_channels
        if (self.by_query or self.by_place) and embedding % 4:
            raise ValueError(f"position_embedding_dim={embedding}: give a multiple of 4, half sines and half cosines")
        if (transposed_query is not None) != (self.by_query and not self.by_place):
            raise ValueError(
                f"transposed_query={transposed_query} with attention_type={attention_type!r}: types with b but not d "
                "(0100, 0110, 1100, 1110) need True (the published code, square maps only) or False (the paper's "
                "definition); others need None"
            )
        self.everywhere = attention_type == "0010"
        if spatial_range >= 0 and self.everywhere:
            raise ValueError(
                f"spatial_range={spatial_range}: type 0010 has one attention map for all queries; give spatial_range=-1"
            )
        if spatial_range >= 0 and in_channels not in MAP_SIZES:
            raise ValueError(
                f"spatial_range={spatial_range}: the published code has a range only for in_channels of "
                f"{' or '.join(map(str, MAP_SIZES))}, not {in_channels}; give spatial_range=-1"
            )
        self.num_heads = num_heads
        self.head_channels = in_channels // num_heads
        self.embedding = embedding
        self.magnitude = position_magnitude
        self.spatial_range = spatial_range
        self.kv_stride, self.q_stride = kv_stride, q_stride
        self.transposed_query = transposed_query
        self.export_size = export_size
        inner = num_heads * self.head_channels
        if self.pairs or self.by_query:
            self.query_conv = nn.Conv2d(in_channels, inner, 1, bias=False)
        if self.pairs or self.by_key:
            self.key_conv = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.value_conv = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.appr_geom_fc_x: nn.Linear | None = None
        self.appr_geom_fc_y: nn.Linear | None = None
        if self.by_query or self.by_place:
            self.appr_geom_fc_x = nn.Linear(embedding // 2, inner, bias=False)
            self.appr_geom_fc_y = nn.Linear(embedding // 2, inner, bias=False)
        spread = 1 / math.sqrt(2 * self.head_channels)
        for name, present in (("appr_bias", self.by_key), ("geom_bias", self.by_place)):
            self.register_parameter(name, nn.Parameter((1 - 2 * torch.rand(inner)) * spread) if present else None)
        self.proj_conv = nn.Conv2d(inner, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.register_buffer("zero", torch.zeros(1, num_heads, 1, 1, 1), persistent=False)
        if spatial_range >= 0:
            side = MAP_SIZES[in_channels]
            near = self._near(side, (side - 1) // kv_stride + 1)
            constraint = ~(near[:, None, :, None] & near[None, :, None, :])
            self.register_buffer("local_constraint_map", constraint.byte())
        for name in ("row_terms", "column_terms", "offset"):  # what `prepare_for_export` computes in advance
            self.register_buffer(name, None, persistent=False)
        placed = self.by_query or self.by_place or spatial_range >= 0
        self.core = None if placed or self.everywhere else PixelAttentionCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend and add the input.

        Args:
            x: (batch, in_channels, height, width).

        Returns:
            The same shape.

        Raises:
            UserError: a map that is not square or has dynamic axes with `transposed_query`, or a map larger than an
                exported block takes.
        """
        source = x[:, :, :: self.kv_stride, :: self.kv_stride] if self.kv_stride > 1 else x
        out = self.proj_conv(self._shared(source) if self.everywhere else self._attended(x, source))
        if self.q_stride > 1 and not self.everywhere:
            out = F.interpolate(out, size=x.shape[2:], mode="bilinear", align_corners=False)
        return (out if self.gamma is None else out * self.gamma) + x

    def prepare_for_export(self) -> GeneralizedAttention:
        """Return a copy in which projections carry what is linear around them.

        `proj_conv` carries gamma. `query_conv` carries u; what the queries get before they meet the positions is then
        less by u. Without a, `key_conv` gives the one number per head and key that u makes of it. The positional
        projections become tables of every difference of coordinates. All are exact.
        """
        folded = copy.deepcopy(self)
        with torch.no_grad():
            assert folded.gamma is not None
            for parameter in folded.proj_conv.parameters():
                parameter.mul_(folded.gamma)
            folded.gamma = None
            if self.by_key and not self.pairs:
                folded.key_conv = _convolution(self._key_weight())
            elif self.appr_bias is not None:
                folded.query_conv = _convolution(self.query_conv.weight, self.appr_bias)
                if self.by_query:
                    folded.offset = -self.appr_bias if self.geom_bias is None else self.geom_bias - self.appr_bias
            if self.by_query or self.by_place:
                folded.row_terms = self._terms(self.appr_geom_fc_y, self.export_size)
                folded.column_terms = self._terms(self.appr_geom_fc_x, self.export_size)
                if folded.offset is None and self.geom_bias is not None:
                    folded.offset = self.geom_bias.detach().clone()
        folded.appr_geom_fc_x = folded.appr_geom_fc_y = folded.appr_bias = folded.geom_bias = None
        if self.spatial_range >= 0:
            del folded.local_constraint_map
        return folded

    def _per_head(self, values: torch.Tensor) -> torch.Tensor:
        """Return M d numbers as (1, M, 1, d)."""
        return values.view(1, self.num_heads, 1, self.head_channels)

    def _key_weight(self) -> torch.Tensor:
        """Return the weight (M, C, 1, 1) of the convolution u . k, which a folded `key_conv` has."""
        weight = self.key_conv.weight
        if self.appr_bias is None:
            return weight
        per_head = weight.view(self.num_heads, self.head_channels, -1)
        bias = self.appr_bias.view(self.num_heads, 1, self.head_channels)
        return torch.matmul(bias, per_head).view(self.num_heads, -1, 1, 1)

    def _shared(self, source: torch.Tensor) -> torch.Tensor:
        """Return the values (batch, M d, 1, 1) that all queries of type 0010 gather from (batch, C, h, w)."""
        attention = F.conv2d(source, self._key_weight()).flatten(2).softmax(dim=2)
        gathered = torch.matmul(attention, source.flatten(2).transpose(1, 2))
        heads = self.value_conv.weight.view(self.num_heads, self.head_channels, -1)
        return torch.matmul(heads, gathered.unsqueeze(3)).flatten(1, 2).unsqueeze(3)

    def _attended(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Return the gathered values (batch, M d, H, W) of the queries."""
        if self.q_stride > 1:
            x = x[:, :, :: self.q_stride, :: self.q_stride]
        height, width = x.shape[2:]
        heads = (self.num_heads, self.head_channels)
        value = self.value_conv(source).unflatten(1, heads).flatten(3)
        query = None
        if self.pairs or self.by_query:
            query = self.query_conv(x).unflatten(1, heads).flatten(3).transpose(2, 3)
        if self.core is not None:
            content, key = self._content(query, source)
            attended = self.core(content.transpose(2, 3).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
            return attended.view(-1, self.num_heads * self.head_channels, height, width)
        size, key_size = (height, width), (source.shape[2], source.shape[3])
        energy = self._places(query, size, key_size)
        if self.pairs:
            content, key = self._content(query, source)
            energy = torch.matmul(content, key).unflatten(3, key_size).unflatten(2, size) + energy
        elif self.by_key:
            energy = energy + F.conv2d(source, self._key_weight())[:, :, None, None]
        attention = energy.flatten(4).flatten(2, 3).softmax(dim=3)
        attended = torch.matmul(attention, value.transpose(2, 3)).transpose(2, 3)
        return attended.reshape(-1, self.num_heads * self.head_channels, height, width)

    def _content(self, query: torch.Tensor | None, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q + u, without c q, (batch, M, positions, d), and the keys of a source, (batch, M, d, positions)."""
        assert query is not None
        key: torch.Tensor = self.key_conv(source).unflatten(1, (self.num_heads, self.head_channels)).flatten(3)
        return query if self.appr_bias is None else query + self._per_head(self.appr_bias), key

    def _places(self, query: torch.Tensor | None, size: tuple[int, int], keys: tuple[int, int]) -> torch.Tensor:
        """Return the energies b and d of all pairs: one number per row of keys plus one per column.

        Args:
            query: (batch, M, H * W, d), or None where the type has none.
            size: H and W.
            keys: h and w.

        Returns:
            (batch or 1, M or 1, H, W, h, w), `LOWEST` or less where a key is out of range.
        """
        if self.by_query or self.by_place:
            offset = self.geom_bias if self.offset is None else self.offset
            if offset is not None:
                query = self._per_head(offset) if query is None or not self.by_query else query + self._per_head(offset)
            assert query is not None
            query = query.unflatten(2, size if self.by_query else (1, 1))
            row_query = self._transposed(query, size) if self.transposed_query else query
            row_terms = self._relative(self.row_terms, self.appr_geom_fc_y, size[0], keys[0])
            column_terms = self._relative(self.column_terms, self.appr_geom_fc_x, size[1], keys[1])
            by_row = torch.matmul(row_query, row_terms.transpose(2, 3))
            by_column = torch.matmul(query.transpose(2, 3), column_terms.transpose(2, 3)).transpose(2, 3)
        else:
            by_row = by_column = self.zero
        if self.spatial_range >= 0:
            near_row, near_column = (self._near(*pair) for pair in zip(size, keys, strict=True))
            by_row = torch.where(near_row[:, None], by_row, LOWEST)
            by_column = torch.where(near_column, by_column, LOWEST)
        return by_row.unsqueeze(5) + by_column.unsqueeze(4)

    @staticmethod
    def _transposed(query: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the queries with rows and columns exchanged, if the map is square."""
        for axis, length in zip(("height", "width"), size, strict=True):
            require_static("this generalised attention", axis, length, _SQUARE)
        if size[0] != size[1]:
            raise UserError(
                f"generalised attention with transposed_query cannot take {size[0]}x{size[1]} queries: {_SQUARE}. Give "
                "a square map, or transposed_query=False for the paper's definition."
            )
        return query.transpose(2, 3)

    def _relative(self, table: torch.Tensor | None, layer: nn.Linear | None, queries: int, keys: int) -> torch.Tensor:
        """Return p of one axis for all pairs of coordinates, (M, queries, keys, d)."""
        known = isinstance(queries, int) and isinstance(keys, int)
        size = 1 + max((queries - 1) * self.q_stride, (keys - 1) * self.kv_stride) if known else 0
        if table is None:
            table = self._terms(layer, size)
        elif size > self.export_size:
            raise UserError(
                f"this generalised attention was prepared for maps of at most {self.export_size} pixels per side, but "
                f"got {size}. Build it with export_size={size}."
            )
        place = torch.arange(queries, device=table.device) * self.q_stride + table.shape[0] // 2
        difference = place[:, None] - torch.arange(keys, device=table.device) * self.kv_stride
        return F.embedding(difference, table).unflatten(2, (self.num_heads, self.head_channels)).permute(2, 0, 1, 3)

    def _terms(self, layer: nn.Linear | None, size: int) -> torch.Tensor:
        """Return p of one axis for the differences 1 - size to size - 1, (2 size - 1, M d)."""
        assert layer is not None
        weight = layer.weight.double()
        difference = torch.arange(1 - size, size, device=weight.device) * self.magnitude
        wave = torch.arange(self.embedding // 4, device=weight.device).to(weight) * (4 / self.embedding)
        angle = difference[:, None] / WAVELENGTH**wave
        encoding = torch.cat([angle.sin(), angle.cos()], dim=1) / math.sqrt(2)
        return torch.matmul(encoding, weight.transpose(0, 1)).to(layer.weight.dtype)

    def _near(self, queries: int, keys: int) -> torch.Tensor:
        """Return which keys of an axis each query may see, (queries, keys)."""
        query = torch.arange(queries, device=self.zero.device)[:, None]
        key = torch.arange(keys, device=self.zero.device) * self.kv_stride
        return (key + self.kv_stride > query - self.spatial_range) & (key <= query + self.spatial_range + 1)


def _convolution(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Conv2d:
    """Return a 1x1 convolution with the given weight and bias."""
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None).to(weight)
    convolution.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        convolution.bias = nn.Parameter(bias.detach().clone())
    return convolution


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the attention and the positional projections of all pairs of an axis."""
    kv_stride, q_stride = arguments.get("kv_stride", 2), arguments.get("q_stride", 1)
    pairs = [-(-sizes[axis] // q_stride) * -(-sizes[axis] // kv_stride) for axis in ("height", "width")]
    heads: int = arguments["num_heads"]
    return max(sizes["batch"] * heads * math.prod(pairs), arguments["in_channels"] * max(pairs))


_SMALL: Arguments = {"in_channels": 16, "num_heads": 3}

BLOCKS.add(
    BlockSpec(
        name="generalized-attention",
        title="generalised attention of the empirical study",
        paper="An Empirical Study of Spatial Attention Mechanisms in Deep Networks, ICCV 2019",
        year=2019,
        code="https://github.com/open-mmlab/mmcv, https://github.com/xvjiarui/GCNet",
        build=GeneralizedAttention,
        original="edgeattn.validation.originals.generalized_attention:GeneralizedAttention",
        variants=(
            Variant(
                "official",
                _SMALL,
                listings={
                    "mmcv_genattn_1111": {"in_channels": 256, "num_heads": 8},
                    "gcnet_genattn_1111": {"in_channels": 256, "num_heads": 8},
                },
                references={
                    "mmcv_genattn_1111": _SMALL,
                    "gcnet_genattn_1111": _SMALL,
                    "mmcv_genattn_0001": {**_SMALL, "attention_type": "0001"},
                    "mmcv_genattn_1011": {
                        **_SMALL,
                        **{"attention_type": "1011", "kv_stride": 1},
                        **{"position_embedding_dim": 12, "position_magnitude": 3},
                    },
                },
                published=Published(
                    "Faster R-CNN R50-FPN with attention 1111, COCO 800x1333, stage 3",
                    {"in_channels": 256, "num_heads": 8},
                    {"batch": 1, "height": 50, "width": 84},
                ),
                overflow=Overflow(100.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "key-content",
                {**_SMALL, "attention_type": "0010"},
                listings={"gcnet_genattn_0010": {"in_channels": 256, "num_heads": 8, "attention_type": "0010"}},
                references={"gcnet_genattn_0010": {**_SMALL, "attention_type": "0010"}},
                published=Published(
                    "Faster R-CNN R50-FPN with attention 0010, COCO 800x1333, stage 3",
                    {"in_channels": 256, "num_heads": 8, "attention_type": "0010"},
                    {"batch": 1, "height": 50, "width": 84},
                ),
            ),
            Variant(
                "strided",
                {**_SMALL, "attention_type": "0111", "q_stride": 2, "kv_stride": 3},
                references={
                    "mmcv_genattn_0111": {**_SMALL, "attention_type": "0111", "q_stride": 2, "kv_stride": 3},
                    "mmcv_genattn_0100": {
                        **_SMALL,
                        **{"attention_type": "0100", "transposed_query": True, "kv_stride": 1},
                    },
                    "mmcv_genattn_1110": {**_SMALL, "attention_type": "1110", "transposed_query": True},
                },
            ),
        ),
        largest=_largest,
        precision=(
            "energies and softmax stay in FP32: products of queries and keys are not scaled down and reach 65504 at "
            "activations of a few hundred; the positional terms, linear in the query, and the means run in FP16"
        ),
        int8="the projections; the attention products and the positional terms stay in floating point",
        inputs=(TensorInput("x", ("batch", "in_channels", "height", "width")),),
    )
)
