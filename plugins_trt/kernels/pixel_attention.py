"""Attention of every query position to every key position, without storing their products."""

import triton
import triton.language as tl

from edgeattn.plugins_trt.kernels.online_softmax import attend, normalise


@triton.jit
def pixel_attention(
    query,
    key,
    value,
    queries,
    keys,
    output,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend. Programs: x over tiles of queries, y over blocks of channels, z over the batch.

    Args:
        query: (batch, HEAD, queries).
        key: (batch, HEAD, keys).
        value: (batch, CHANNELS, keys).
        output: (batch, CHANNELS, queries).
        CHANNELS_LAST: not read, as flat maps have one layout.
    """
    places = tl.program_id(0) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    first_channel = tl.program_id(1) * CHANNEL_BLOCK
    batch = tl.program_id(2).to(tl.int64)
    attended, total, _ = attend(
        query + batch * (HEAD * queries), key + batch * (HEAD * keys), value + batch * (CHANNELS * keys),
        queries, 1, keys, 1, keys, 1, places, queries, 0, keys, first_channel,
        HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, False,
    )  # fmt: skip
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    tl.store(
        output + batch * (CHANNELS * queries) + places[:, None] + channels[None, :] * queries,
        normalise(attended, total).to(output.dtype.element_ty),
        mask=(places < queries)[:, None] & (channels < CHANNELS)[None, :],
    )
