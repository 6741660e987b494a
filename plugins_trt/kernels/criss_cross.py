"""Criss-cross attention in two launches: along the columns without the own position, then along the rows and merged."""

import triton
import triton.language as tl

from edgeattn.plugins_trt.kernels.online_softmax import attend, log_sum_exp, normalise


@triton.jit
def column_attention(
    query,
    key,
    value,
    height,
    width,
    partial,
    partial_lse,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend along columns, own position excluded.

    Programs: x over columns and tiles of their rows, y over blocks of channels, z over the batch.

    Args:
        query, key: (batch, HEAD, height, width) in the layout.
        value: (batch, CHANNELS, height, width) in the layout.
        partial: (batch, height, width, CHANNELS), the normalised result of the column.
        partial_lse: (batch, height, width) FP32, base-2 log-sum-exp of the column's scores.
    """
    tiles = tl.cdiv(height, QUERY_BLOCK)
    column = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    first_channel = tl.program_id(1) * CHANNEL_BLOCK
    batch = tl.program_id(2).to(tl.int64)
    positions = height * width
    head_channel_stride = 1 if CHANNELS_LAST else positions
    head_stride = HEAD if CHANNELS_LAST else 1
    channel_stride = 1 if CHANNELS_LAST else positions
    stride = CHANNELS if CHANNELS_LAST else 1
    head_base = batch * (HEAD * positions) + column * head_stride
    base = batch * (CHANNELS * positions) + column * stride
    attended, total, maximum = attend(
        query + head_base, key + head_base, value + base, head_channel_stride, width * head_stride,
        head_channel_stride, width * head_stride, channel_stride, width * stride, rows, height, 0, height,
        first_channel, HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, True,
    )  # fmt: skip
    places = batch * positions + rows * width + column
    if first_channel == 0:
        tl.store(partial_lse + places, log_sum_exp(total, maximum), mask=rows < height)
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    tl.store(
        partial + places[:, None] * CHANNELS + channels[None, :],
        normalise(attended, total).to(partial.dtype.element_ty),
        mask=(rows < height)[:, None] & (channels < CHANNELS)[None, :],
    )


@triton.jit
def row_attention(
    query,
    key,
    value,
    residual,
    partial,
    partial_lse,
    height,
    width,
    output,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend along rows, merge the column's result by its log-sum-exp and add the residual.

    Programs: x over rows and tiles of their columns, y over blocks of channels, z over the batch.

    Args:
        query, key: (batch, HEAD, height, width) in the layout.
        value, residual, output: (batch, CHANNELS, height, width) in the layout.
        partial, partial_lse: as `column_attention` wrote them.
    """
    tiles = tl.cdiv(width, QUERY_BLOCK)
    row = tl.program_id(0) // tiles
    columns = (tl.program_id(0) % tiles) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    first_channel = tl.program_id(1) * CHANNEL_BLOCK
    batch = tl.program_id(2).to(tl.int64)
    positions = height * width
    head_channel_stride = 1 if CHANNELS_LAST else positions
    head_stride = HEAD if CHANNELS_LAST else 1
    channel_stride = 1 if CHANNELS_LAST else positions
    stride = CHANNELS if CHANNELS_LAST else 1
    head_base = batch * (HEAD * positions) + row * width * head_stride
    base = batch * (CHANNELS * positions) + row * width * stride
    attended, total, maximum = attend(
        query + head_base, key + head_base, value + base, head_channel_stride, head_stride,
        head_channel_stride, head_stride, channel_stride, stride, columns, width, 0, width,
        first_channel, HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, False,
    )  # fmt: skip
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    inside = (columns < width)[:, None] & (channels < CHANNELS)[None, :]
    places = batch * positions + row * width + columns
    column_lse = tl.load(partial_lse + places, mask=columns < width, other=0.0)
    column_result = tl.load(partial + places[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
    # The column's result is one more value, whose score is the column's log-sum-exp.
    higher = tl.maximum(maximum, column_lse)
    row_weight = tl.exp2(maximum - higher)
    column_weight = tl.exp2(column_lse - higher)
    merged = attended * row_weight[:, None] + column_result.to(tl.float32) * column_weight[:, None]
    merged = merged / (total * row_weight + column_weight)[:, None]
    offsets = columns[:, None] * stride + channels[None, :] * channel_stride
    added = tl.load(residual + base + offsets, mask=inside, other=0.0)
    tl.store(output + base + offsets, (merged + added.to(tl.float32)).to(output.dtype.element_ty), mask=inside)
