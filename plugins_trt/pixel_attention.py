"""`PixelAttention`: softmax(query^T key) value over positions (non-local, PAM, OCNet, SAGAN and their kin)."""

from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import Launch, PluginSpec, TensorSpec, Tiling

_BODY = """
    query_wide = Widen (query)
    key_wide = Widen (key)
    query_rows = Transpose <perm = [0, 2, 1]> (query_wide)
    energy = MatMul (query_rows, key_wide)
    attention_wide = Softmax <axis = 2> (energy)
    attention = Narrow (attention_wide, value)
    attention_t = Transpose <perm = [0, 2, 1]> (attention)
    output = MatMul (value, attention_t)
"""

PIXEL_ATTENTION = PLUGINS.add(
    PluginSpec(
        name="PixelAttention",
        op_type="PixelAttention",
        inputs=(
            TensorSpec("query", ("batch", "head_channels", "queries")),
            TensorSpec("key", ("batch", "head_channels", "keys")),
            TensorSpec("value", ("batch", "channels", "keys")),
        ),
        outputs=(TensorSpec("output", ("batch", "channels", "queries")),),
        body=_BODY,
        summary="output = value times softmax over keys of query^T key, transposed.",
        static=("head_channels", "channels"),
        presets=({"head_channels": 64, "channels": 512}, {"head_channels": 256, "channels": 256}),
        launches=(
            Launch(
                name="attend",
                kernel="edgeattn.plugins_trt.kernels.pixel_attention:pixel_attention",
                reads=("query", "key", "value"),
                scalars=("queries", "keys"),
                writes=("output",),
                grid=("cdiv(queries, QUERY_BLOCK)", "cdiv(channels, CHANNEL_BLOCK)", "batch"),
                constants={
                    "HEAD": "head_channels",
                    "HEAD_BLOCK": "min(HEAD_TILE, max(16, pow2(head_channels)))",
                    "CHANNELS": "channels",
                    "QUERY_BLOCK": "QUERY_BLOCK",
                    "KEY_BLOCK": "KEY_BLOCK",
                    "CHANNEL_BLOCK": "min(CHANNEL_TILE, max(16, pow2(channels)))",
                },
            ),
        ),
        tilings=(
            Tiling(
                constants={"QUERY_BLOCK": 64, "KEY_BLOCK": 32, "HEAD_TILE": 64, "CHANNEL_TILE": 128},
                warps={"attend": 8},
                stages={"attend": 2},
                elements=("float16", "bfloat16"),
            ),
            Tiling(
                constants={"QUERY_BLOCK": 32, "KEY_BLOCK": 32, "HEAD_TILE": 32, "CHANNEL_TILE": 128},
                warps={"attend": 8},
                stages={"attend": 2},
            ),
        ),
        flops="2 * batch * queries * keys * (head_channels + channels)",
    )
)
