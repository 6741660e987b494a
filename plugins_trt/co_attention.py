"""`CoAttention`: two feature maps attend to each other (COSNet, CVPR 2019), in both directions or one."""

from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import Launch, PluginSpec, TensorSpec, Tiling, Workspace

_QUERY_A = TensorSpec("query_a", ("batch", "head_channels", "height_a", "width_a"))
_KEY_B = TensorSpec("key_b", ("batch", "head_channels", "height_b", "width_b"))
_VALUE_A = TensorSpec("value_a", ("batch", "channels", "height_a", "width_a"))
_VALUE_B = TensorSpec("value_b", ("batch", "channels", "height_b", "width_b"))
_GATE = (TensorSpec("gate_weight", ("1", "channels")), TensorSpec("gate_bias", ("1",)))
_ATTENDED_A = TensorSpec("attended_a", _VALUE_A.shape)
_ATTENDED_B = TensorSpec("attended_b", _VALUE_B.shape)

_AFFINITY = """
    query_a_wide = Widen (query_a)
    key_b_wide = Widen (key_b)
    flat = Constant <value = int64[3] {0, 0, -1}> ()
    query_a_flat = Reshape (query_a_wide, flat)
    key_b_flat = Reshape (key_b_wide, flat)
    query_a_rows = Transpose <perm = [0, 2, 1]> (query_a_flat)
    affinity = MatMul (query_a_rows, key_b_flat)
    value_b_flat = Reshape (value_b, flat)
    over_b_wide = Softmax <axis = 2> (affinity)
    over_b = Narrow (over_b_wide, value_b)
    over_b_t = Transpose <perm = [0, 2, 1]> (over_b)
    from_b = MatMul (value_b_flat, over_b_t)
"""
_OTHER_DIRECTION = """
    value_a_flat = Reshape (value_a, flat)
    over_a_wide = Softmax <axis = 1> (affinity)
    over_a = Narrow (over_a_wide, value_a)
    from_a = MatMul (value_a_flat, over_a)
"""
_SHAPE_A_FROM_VALUE = "    shape_a = Shape (value_a)\n"
_SHAPE_A_FROM_QUERY = """
    value_b_head = Shape <start = 0, end = 2> (value_b)
    query_a_tail = Shape <start = 2, end = 4> (query_a)
    shape_a = Concat <axis = 0> (value_b_head, query_a_tail)
"""


def _finish(side: str, source: str, *, gated: bool, shape: str) -> str:
    """Gate the flat result `source` where asked and bring it to the map's shape as `attended_<side>`."""
    if not gated:
        return f"    attended_{side} = Reshape ({source}, {shape})\n"
    return f"""
    gate_logit_{side} = MatMul (gate_weight, {source})
    gate_shifted_{side} = Add (gate_logit_{side}, gate_bias)
    gate_{side} = Sigmoid (gate_shifted_{side})
    gated_{side} = Mul ({source}, gate_{side})
    attended_{side} = Reshape (gated_{side}, {shape})
"""


_KERNELS = "edgeattn.plugins_trt.kernels.co_attention"
_STATIC = ("head_channels", "channels")
_PRESETS = ({"head_channels": 256, "channels": 256},)
_POSITIONS_A, _POSITIONS_B = "height_a * width_a", "height_b * width_b"
_ATTEND = {
    "HEAD": "head_channels",
    "HEAD_BLOCK": "min(HEAD_TILE, max(16, pow2(head_channels)))",
    "CHANNELS": "channels",
    "QUERY_BLOCK": "QUERY_BLOCK",
    "KEY_BLOCK": "KEY_BLOCK",
    "CHANNEL_BLOCK": "min(CHANNEL_TILE, max(16, pow2(channels)))",
    "SPLITS": "SPLITS",
}
_MERGE = {
    "CHANNELS": "channels",
    "CHANNELS_PADDED": "pow2(channels)",
    "MERGE_BLOCK": "MERGE_BLOCK",
    "SPLITS": "SPLITS",
}
_WARPS = {"attend": 8, "merge": 4}
_TILINGS = (
    # Four warps, so that two programs fit an SM: their registers, and shared memory of 96 KiB each.
    Tiling(
        constants={
            "QUERY_BLOCK": 64, "KEY_BLOCK": 32, "HEAD_TILE": 256, "CHANNEL_TILE": 256, "SPLITS": 2, "MERGE_BLOCK": 16,
        },
        warps={"attend": 4, "merge": 4},
        stages={"attend": 2, "merge": 1},
        elements=("float16", "bfloat16"),
        layouts=("channels-last",),
        sms=(90, 100, 110),
    ),
    Tiling(
        constants={
            "QUERY_BLOCK": 64, "KEY_BLOCK": 32, "HEAD_TILE": 256, "CHANNEL_TILE": 256, "SPLITS": 2, "MERGE_BLOCK": 16,
        },
        warps=_WARPS,
        stages={"attend": 2, "merge": 1},
        elements=("float16", "bfloat16"),
        layouts=("channels-last",),
    ),
    # Neighbouring channels are far apart here: each element is loaded on its own, and pointers take registers.
    Tiling(
        constants={
            "QUERY_BLOCK": 32, "KEY_BLOCK": 16, "HEAD_TILE": 256, "CHANNEL_TILE": 256, "SPLITS": 2, "MERGE_BLOCK": 16,
        },
        warps=_WARPS,
        stages={"attend": 2, "merge": 1},
        elements=("float16", "bfloat16"),
    ),
    # Products of FP32 take three of TF32.
    Tiling(
        constants={
            "QUERY_BLOCK": 32, "KEY_BLOCK": 32, "HEAD_TILE": 32, "CHANNEL_TILE": 128, "SPLITS": 2, "MERGE_BLOCK": 16,
        },
        warps=_WARPS,
        stages={"attend": 2, "merge": 1},
    ),
)  # fmt: skip


def _partial(side: str) -> tuple[Workspace, Workspace]:
    """Return what the shares of the keys give for one side: normalised results and their log-sum-exps."""
    positions = f"height_{side} * width_{side}"
    return (
        Workspace(f"partial_{side}", ("SPLITS", "batch", positions, "channels"), "data"),
        Workspace(f"partial_{side}_lse", ("SPLITS", "batch", positions), "float32"),
    )


def _both_ways(*, gated: bool) -> PluginSpec:
    body = (
        _AFFINITY
        + _OTHER_DIRECTION
        + _SHAPE_A_FROM_VALUE
        + "    shape_b = Shape (value_b)\n"
        + _finish("a", "from_b", gated=gated, shape="shape_a")
        + _finish("b", "from_a", gated=gated, shape="shape_b")
    )
    return PluginSpec(
        name="CoAttentionGated" if gated else "CoAttention",
        op_type="CoAttention",
        inputs=(_QUERY_A, _KEY_B, _VALUE_A, _VALUE_B, *(_GATE if gated else ())),
        outputs=(_ATTENDED_A, _ATTENDED_B),
        body=body,
        summary=(
            "affinity = query_a^T key_b; attended_a = softmax over b of affinity times value_b, "
            "attended_b = softmax over a times value_a" + _GATE_SUMMARY[gated]
        ),
        static=_STATIC,
        presets=_PRESETS,
        workspaces=(*_partial("a"), *_partial("b")),
        launches=(
            Launch(
                name="attend",
                kernel=f"{_KERNELS}:attend_both_ways",
                reads=("query_a", "key_b", "value_a", "value_b"),
                scalars=(_POSITIONS_A, _POSITIONS_B),
                writes=("partial_a", "partial_b", "partial_a_lse", "partial_b_lse"),
                grid=(
                    f"cdiv({_POSITIONS_A}, QUERY_BLOCK) * SPLITS + cdiv({_POSITIONS_B}, QUERY_BLOCK) * SPLITS",
                    "cdiv(channels, CHANNEL_BLOCK)",
                    "batch",
                ),
                constants=_ATTEND,
            ),
            Launch(
                name="merge",
                kernel=f"{_KERNELS}:merge_both_ways{'_gated' if gated else ''}",
                reads=(
                    *(tensor.name for tensor in _GATE[: 2 * gated]),
                    *("partial_a", "partial_b", "partial_a_lse", "partial_b_lse"),
                ),
                scalars=(_POSITIONS_A, _POSITIONS_B),
                writes=("attended_a", "attended_b"),
                grid=(f"cdiv({_POSITIONS_A}, MERGE_BLOCK) + cdiv({_POSITIONS_B}, MERGE_BLOCK)", "batch", "1"),
                constants=_MERGE,
            ),
        ),
        tilings=_TILINGS,
        flops="4 * batch * height_a * width_a * height_b * width_b * (head_channels + channels)",
    )


def _one_way(*, gated: bool) -> PluginSpec:
    return PluginSpec(
        name="CoAttentionOneWayGated" if gated else "CoAttentionOneWay",
        op_type="CoAttentionOneWay",
        inputs=(_QUERY_A, _KEY_B, _VALUE_B, *(_GATE if gated else ())),
        outputs=(_ATTENDED_A,),
        body=_AFFINITY + _SHAPE_A_FROM_QUERY + _finish("a", "from_b", gated=gated, shape="shape_a"),
        summary="attended_a = softmax over b of query_a^T key_b times value_b" + _GATE_SUMMARY[gated],
        static=_STATIC,
        presets=_PRESETS,
        workspaces=_partial("a"),
        launches=(
            Launch(
                name="attend",
                kernel=f"{_KERNELS}:attend_one_way",
                reads=("query_a", "key_b", "value_b"),
                scalars=(_POSITIONS_A, _POSITIONS_B),
                writes=("partial_a", "partial_a_lse"),
                grid=(f"cdiv({_POSITIONS_A}, QUERY_BLOCK) * SPLITS", "cdiv(channels, CHANNEL_BLOCK)", "batch"),
                constants=_ATTEND,
            ),
            Launch(
                name="merge",
                kernel=f"{_KERNELS}:merge_one_way{'_gated' if gated else ''}",
                reads=(*(tensor.name for tensor in _GATE[: 2 * gated]), "partial_a", "partial_a_lse"),
                scalars=(_POSITIONS_A,),
                writes=("attended_a",),
                grid=(f"cdiv({_POSITIONS_A}, MERGE_BLOCK)", "batch", "1"),
                constants=_MERGE,
            ),
        ),
        tilings=_TILINGS,
        flops="2 * batch * height_a * width_a * height_b * width_b * (head_channels + channels)",
    )


_GATE_SUMMARY = {False: ".", True: ", each multiplied by sigmoid(gate_weight . attended + gate_bias)."}

CO_ATTENTION = PLUGINS.add(_both_ways(gated=False))
CO_ATTENTION_GATED = PLUGINS.add(_both_ways(gated=True))
CO_ATTENTION_ONE_WAY = PLUGINS.add(_one_way(gated=False))
CO_ATTENTION_ONE_WAY_GATED = PLUGINS.add(_one_way(gated=True))
