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
    key_channel_stride,
    key_stride,
    value_channel_stride,
    value_stride,
    first_key,
    end_key,
    own_key,
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

    Args:
        query: (QUERY_BLOCK, HEAD_BLOCK) values, zero beyond the HEAD channels.
        key, value: pointers to channel 0 of key 0.
        key_channel_stride, key_stride, value_channel_stride, value_stride: in elements.
        own_key: (QUERY_BLOCK) index of the key that each query must not attend to, when SKIP_OWN.
        first_channel: first value channel of the tile.

    Returns:
        Sum of weighted values (QUERY_BLOCK, CHANNEL_BLOCK), sum of weights (QUERY_BLOCK) and the maximum score
        (QUERY_BLOCK) that both are relative to, in FP32.
    """
    heads = tl.arange(0, HEAD_BLOCK)
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    maximum = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    attended = tl.zeros([QUERY_BLOCK, CHANNEL_BLOCK], tl.float32)
    for start in tl.range(first_key, end_key, KEY_BLOCK):
        keys = start + tl.arange(0, KEY_BLOCK)
        present = keys < end_key
        key_pointers = key + heads[:, None] * key_channel_stride + keys[None, :] * key_stride
        if HEAD == HEAD_BLOCK:
            key_tile = tl.load(key_pointers, mask=present[None, :], other=0.0)
        else:
            key_tile = tl.load(key_pointers, mask=(heads < HEAD)[:, None] & present[None, :], other=0.0)
        scores = tl.dot(query, key_tile, input_precision="tf32x3") * LOG2_E
        if SKIP_OWN:
            taking_part = present[None, :] & (keys[None, :] != own_key[:, None])
            scores = tl.where(taking_part, scores, EXCLUDED)
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
def load_queries(query, channel_stride, stride, queries, end_query, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    """Load a tile of queries (queries, HEAD_BLOCK), zero beyond `end_query` and beyond the HEAD channels."""
    heads = tl.arange(0, HEAD_BLOCK)
    pointers = query + queries[:, None] * stride + heads[None, :] * channel_stride
    return tl.load(pointers, mask=(queries < end_query)[:, None] & (heads < HEAD)[None, :], other=0.0)


@triton.jit
def log_sum_exp(total, maximum):
    """Return the base-2 log-sum-exp, and `LOWEST` where no key was seen."""
    return tl.where(total > 0, maximum + tl.log2(tl.maximum(total, 1e-30)), LOWEST)


@triton.jit
def normalise(attended, total):
    """Divide by the sum of weights; 0 where no key was seen."""
    return attended / tl.where(total > 0, total, 1.0)[:, None]
