"""Attention of a tile of queries over a run of keys with an online softmax: the inner loop that all kernels share.

Scores are kept in base 2 and accumulated in FP32, whatever the data type. Masks are finite: an excluded key has the
score `EXCLUDED`, and the running maximum starts above it, so its weight is exactly 0 even in a tile that holds no key.
"""

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1.0e30)
"""Score of a key that does not take part, far below any finite score of FP16 data."""

LOWEST = tl.constexpr(-1.0e29)
"""Running maximum, and log-sum-exp, of queries that have seen no key."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    query,
    key,
    value,
    query_channel_stride,
    query_stride,
    key_channel_stride,
    key_stride,
    value_channel_stride,
    value_stride,
    queries,
    end_query,
    first_key,
    end_key,
    first_channel,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SKIP_OWN: tl.constexpr,
):
    """Attend from a tile of queries to the keys `first_key` to `end_key`.

    Queries stay in registers when one block holds all their channels; otherwise the scores are summed over blocks of
    channels, and each block is read again for every tile of keys.

    Args:
        query, key, value: pointers to channel 0 of query, key and value 0.
        query_channel_stride, query_stride, and so on: in elements.
        queries: (QUERY_BLOCK) indices of the queries, below `end_query` where they exist.
        first_channel: first value channel of the tile.
        SKIP_OWN: whether a query does not attend to the key of its own index.

    Returns:
        Sum of weighted values (QUERY_BLOCK, CHANNEL_BLOCK), sum of weights (QUERY_BLOCK) and the maximum score
        (QUERY_BLOCK) that both are relative to, in FP32.
    """
    heads = tl.arange(0, HEAD_BLOCK)
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    maximum = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    attended = tl.zeros([QUERY_BLOCK, CHANNEL_BLOCK], tl.float32)
    query_pointers = query + queries[:, None] * query_stride + heads[None, :] * query_channel_stride
    asked = (queries < end_query)[:, None]
    if HEAD_BLOCK >= HEAD:
        query_tile = tl.load(query_pointers, mask=asked & (heads < HEAD)[None, :], other=0.0)
    for start in tl.range(first_key, end_key, KEY_BLOCK):
        keys = start + tl.arange(0, KEY_BLOCK)
        present = keys < end_key
        key_pointers = key + heads[:, None] * key_channel_stride + keys[None, :] * key_stride
        if HEAD_BLOCK == HEAD:
            key_tile = tl.load(key_pointers, mask=present[None, :], other=0.0)
            scores = tl.dot(query_tile, key_tile, input_precision="tf32x3")
        elif HEAD_BLOCK > HEAD:
            key_tile = tl.load(key_pointers, mask=(heads < HEAD)[:, None] & present[None, :], other=0.0)
            scores = tl.dot(query_tile, key_tile, input_precision="tf32x3")
        else:
            scores = tl.zeros([QUERY_BLOCK, KEY_BLOCK], tl.float32)
            for first_head in tl.range(0, HEAD, HEAD_BLOCK):
                left = first_head + heads < HEAD
                query_part = tl.load(
                    query_pointers + first_head * query_channel_stride, mask=asked & left[None, :], other=0.0
                )
                key_part = tl.load(
                    key_pointers + first_head * key_channel_stride, mask=left[:, None] & present[None, :], other=0.0
                )
                scores = tl.dot(query_part, key_part, scores, input_precision="tf32x3")
        scores = scores * LOG2_E
        if SKIP_OWN:
            scores = tl.where(present[None, :] & (keys[None, :] != queries[:, None]), scores, EXCLUDED)
        else:
            scores = tl.where(present[None, :], scores, EXCLUDED)
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        value_pointers = value + keys[:, None] * value_stride + channels[None, :] * value_channel_stride
        if CHANNELS % CHANNEL_BLOCK == 0:
            value_tile = tl.load(value_pointers, mask=present[:, None], other=0.0)
        else:
            value_tile = tl.load(value_pointers, mask=present[:, None] & (channels < CHANNELS)[None, :], other=0.0)
        attended = tl.dot(weights.to(value_tile.dtype), value_tile, attended, input_precision="tf32x3")
        maximum = higher
    return attended, total, maximum


@triton.jit
def log_sum_exp(total, maximum):
    """Return the base-2 log-sum-exp, and `LOWEST` where no key was seen."""
    return tl.where(total > 0, maximum + tl.log2(tl.maximum(total, 1e-30)), LOWEST)


@triton.jit
def normalise(attended, total):
    """Divide by the sum of weights; 0 where no key was seen."""
    return attended / tl.where(total > 0, total, 1.0)[:, None]
