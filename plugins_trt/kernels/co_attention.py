"""Co-attention: the keys are split over programs, whose results a second launch merges and gates."""

import triton
import triton.language as tl

from edgeattn.plugins_trt.kernels.online_softmax import LOWEST, attend, log_sum_exp, normalise


@triton.jit
def _attend_split(
    query,
    key,
    value,
    partial,
    partial_lse,
    program,
    queries_total,
    keys_total,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend from one tile of queries to one share of the keys and store the normalised result with its log-sum-exp."""
    tiles = tl.cdiv(queries_total, QUERY_BLOCK)
    split = program // tiles
    queries = (program % tiles) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    first_channel = tl.program_id(1) * CHANNEL_BLOCK
    batch = tl.program_id(2).to(tl.int64)
    share = tl.cdiv(tl.cdiv(keys_total, SPLITS), KEY_BLOCK) * KEY_BLOCK
    first_key = split * share
    query_base = batch * (HEAD * queries_total)
    key_base = batch * (HEAD * keys_total)
    value_base = batch * (CHANNELS * keys_total)
    query_channel_stride = 1 if CHANNELS_LAST else queries_total
    key_channel_stride = 1 if CHANNELS_LAST else keys_total
    head_stride = HEAD if CHANNELS_LAST else 1
    stride = CHANNELS if CHANNELS_LAST else 1
    attended, total, maximum = attend(
        query + query_base, key + key_base, value + value_base, query_channel_stride, head_stride,
        key_channel_stride, head_stride, key_channel_stride, stride, queries, queries_total,
        first_key, tl.minimum(first_key + share, keys_total), first_channel,
        HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, False,
    )  # fmt: skip
    places = (split * tl.num_programs(2) + batch) * queries_total + queries
    present = queries < queries_total
    if first_channel == 0:
        tl.store(partial_lse + places, log_sum_exp(total, maximum), mask=present)
    channels = first_channel + tl.arange(0, CHANNEL_BLOCK)
    tl.store(
        partial + places[:, None] * CHANNELS + channels[None, :],
        normalise(attended, total).to(partial.dtype.element_ty),
        mask=present[:, None] & (channels < CHANNELS)[None, :],
    )


@triton.jit
def attend_one_way(
    query_a,
    key_b,
    value_b,
    positions_a,
    positions_b,
    partial_a,
    partial_a_lse,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend from a to b.

    Programs: x over tiles of queries and shares of the keys, y over blocks of channels, z over the batch.

    Args:
        query_a: (batch, HEAD, positions_a) in the layout.
        key_b, value_b: (batch, HEAD or CHANNELS, positions_b) in the layout.
        partial_a: (SPLITS, batch, positions_a, CHANNELS), the normalised result of each share.
        partial_a_lse: (SPLITS, batch, positions_a) FP32, base-2 log-sum-exp of each share's scores.
    """
    _attend_split(
        query_a, key_b, value_b, partial_a, partial_a_lse, tl.program_id(0), positions_a, positions_b,
        HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, SPLITS, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def attend_both_ways(
    query_a,
    key_b,
    value_a,
    value_b,
    positions_a,
    positions_b,
    partial_a,
    partial_b,
    partial_a_lse,
    partial_b_lse,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Attend from a to b in the first programs and from b to a in the others; arguments as in `attend_one_way`."""
    # One copy of the inner loop: two would need shared memory for both.
    programs_a = tl.cdiv(positions_a, QUERY_BLOCK) * SPLITS
    program = tl.program_id(0)
    if program < programs_a:
        query, key, value, partial, partial_lse = query_a, key_b, value_b, partial_a, partial_a_lse
        queries_total, keys_total = positions_a, positions_b
    else:
        query, key, value, partial, partial_lse = key_b, query_a, value_a, partial_b, partial_b_lse
        queries_total, keys_total = positions_b, positions_a
        program -= programs_a
    _attend_split(
        query, key, value, partial, partial_lse, program, queries_total, keys_total,
        HEAD, HEAD_BLOCK, CHANNELS, QUERY_BLOCK, KEY_BLOCK, CHANNEL_BLOCK, SPLITS, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def _merge(
    partial,
    partial_lse,
    output,
    gate_weight,
    gate_bias,
    program,
    positions,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Merge the shares of a tile of positions by their log-sum-exp, gate the result where asked, and store it."""
    batch = tl.program_id(1).to(tl.int64)
    places = program * MERGE_BLOCK + tl.arange(0, MERGE_BLOCK)
    present = places < positions
    channels = tl.arange(0, CHANNELS_PADDED)
    inside = present[:, None] & (channels < CHANNELS)[None, :]
    maximum = tl.full([MERGE_BLOCK], LOWEST, tl.float32)
    for split in tl.static_range(SPLITS):
        row = (split * tl.num_programs(1) + batch) * positions + places
        maximum = tl.maximum(maximum, tl.load(partial_lse + row, mask=present, other=0.0))
    total = tl.zeros([MERGE_BLOCK], tl.float32)
    attended = tl.zeros([MERGE_BLOCK, CHANNELS_PADDED], tl.float32)
    for split in tl.static_range(SPLITS):
        row = (split * tl.num_programs(1) + batch) * positions + places
        weight = tl.exp2(tl.load(partial_lse + row, mask=present, other=0.0) - maximum)
        share = tl.load(partial + row[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
        total += weight
        attended += share.to(tl.float32) * weight[:, None]
    attended = attended / total[:, None]
    if GATED:
        weights = tl.load(gate_weight + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)
        logit = tl.sum(attended * weights[None, :], 1) + tl.load(gate_bias).to(tl.float32)
        attended = attended * tl.sigmoid(logit)[:, None]
    channel_stride = 1 if CHANNELS_LAST else positions
    stride = CHANNELS if CHANNELS_LAST else 1
    offsets = batch * (CHANNELS * positions) + places[:, None] * stride + channels[None, :] * channel_stride
    tl.store(output + offsets, attended.to(output.dtype.element_ty), mask=inside)


@triton.jit
def merge_one_way(
    partial_a,
    partial_a_lse,
    positions_a,
    attended_a,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Merge what `attend_one_way` wrote. Programs: x over tiles of positions, y over the batch."""
    _merge(
        partial_a, partial_a_lse, attended_a, partial_a, partial_a, tl.program_id(0), positions_a,
        CHANNELS, CHANNELS_PADDED, MERGE_BLOCK, SPLITS, False, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def merge_one_way_gated(
    gate_weight,
    gate_bias,
    partial_a,
    partial_a_lse,
    positions_a,
    attended_a,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Merge what `attend_one_way` wrote and multiply it by its gate. Programs as in `merge_one_way`."""
    _merge(
        partial_a, partial_a_lse, attended_a, gate_weight, gate_bias, tl.program_id(0), positions_a,
        CHANNELS, CHANNELS_PADDED, MERGE_BLOCK, SPLITS, True, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def merge_both_ways(
    partial_a,
    partial_b,
    partial_a_lse,
    partial_b_lse,
    positions_a,
    positions_b,
    attended_a,
    attended_b,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Merge what `attend_both_ways` wrote: side a in the first programs, side b in the others."""
    programs_a = tl.cdiv(positions_a, MERGE_BLOCK)
    program = tl.program_id(0)
    if program < programs_a:
        partial, partial_lse, attended, positions = partial_a, partial_a_lse, attended_a, positions_a
    else:
        partial, partial_lse, attended, positions = partial_b, partial_b_lse, attended_b, positions_b
        program -= programs_a
    _merge(
        partial, partial_lse, attended, partial, partial, program, positions,
        CHANNELS, CHANNELS_PADDED, MERGE_BLOCK, SPLITS, False, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def merge_both_ways_gated(
    gate_weight,
    gate_bias,
    partial_a,
    partial_b,
    partial_a_lse,
    partial_b_lse,
    positions_a,
    positions_b,
    attended_a,
    attended_b,
    CHANNELS: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    MERGE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Merge what `attend_both_ways` wrote and multiply each side by its gate."""
    programs_a = tl.cdiv(positions_a, MERGE_BLOCK)
    program = tl.program_id(0)
    if program < programs_a:
        partial, partial_lse, attended, positions = partial_a, partial_a_lse, attended_a, positions_a
    else:
        partial, partial_lse, attended, positions = partial_b, partial_b_lse, attended_b, positions_b
        program -= programs_a
    _merge(
        partial, partial_lse, attended, gate_weight, gate_bias, program, positions,
        CHANNELS, CHANNELS_PADDED, MERGE_BLOCK, SPLITS, True, CHANNELS_LAST,
    )  # fmt: skip
