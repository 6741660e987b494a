"""`CrissCrossAttention`: every pixel attends to its own row and column (CCNet, ICCV 2019)."""

from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import Launch, PluginSpec, TensorSpec, Tiling, Workspace

_QUERY = ("batch", "head_channels", "height", "width")
_VALUE = ("batch", "channels", "height", "width")

# Layouts (batch, column, channel, row) and (batch, row, channel, column): a column or row is then one matrix of a
# batched 4-D MatMul, and ONNX Runtime absorbs the transposes of the last two axes into the MatMul. Measured against
# the 3-D batched form of the public code in benchmarks/criss_cross_forms.py: same speed, less memory, no Reshape.
_BODY = """
    query_wide = Widen (query)
    key_wide = Widen (key)
    query_columns = Transpose <perm = [0, 3, 2, 1]> (query_wide)
    key_columns = Transpose <perm = [0, 3, 1, 2]> (key_wide)
    query_rows = Transpose <perm = [0, 2, 3, 1]> (query_wide)
    key_rows = Transpose <perm = [0, 2, 1, 3]> (key_wide)
    height = Shape <start = 2, end = 3> (query)
    height_scalar = Squeeze (height)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    rows = Range (zero, height_scalar, one)
    one_axis = Constant <value = int64[1] {1}> ()
    rows_down = Unsqueeze (rows, one_axis)
    own_row = Equal (rows_down, rows)
    lowest_float = Constant <value = float {-65504.0}> ()
    lowest = CastLike (lowest_float, query_wide)
    energy_columns_all = MatMul (query_columns, key_columns)
    energy_columns_masked = Where (own_row, lowest, energy_columns_all)
    energy_columns = Transpose <perm = [0, 2, 1, 3]> (energy_columns_masked)
    energy_rows = MatMul (query_rows, key_rows)
    energy = Concat <axis = 3> (energy_columns, energy_rows)
    attention_wide = Softmax <axis = 3> (energy)
    attention = Narrow (attention_wide, value)
    zero_axis = Constant <value = int64[1] {0}> ()
    last_axis = Constant <value = int64[1] {3}> ()
    end = Constant <value = int64[1] {2147483647}> ()
    attention_columns = Slice (attention, zero_axis, height, last_axis)
    attention_rows = Slice (attention, height, end, last_axis)
    attention_columns_t = Transpose <perm = [0, 2, 3, 1]> (attention_columns)
    attention_rows_t = Transpose <perm = [0, 1, 3, 2]> (attention_rows)
    value_columns = Transpose <perm = [0, 3, 1, 2]> (value)
    value_rows = Transpose <perm = [0, 2, 1, 3]> (value)
    out_columns = MatMul (value_columns, attention_columns_t)
    out_rows = MatMul (value_rows, attention_rows_t)
    out_columns_nchw = Transpose <perm = [0, 2, 3, 1]> (out_columns)
    out_rows_nchw = Transpose <perm = [0, 2, 1, 3]> (out_rows)
    attended = Add (out_columns_nchw, out_rows_nchw)
    output = Add (attended, residual)
"""

_KERNELS = "edgeattn.plugins_trt.kernels.criss_cross"
_CONSTANTS = {
    "HEAD": "head_channels",
    "HEAD_BLOCK": "min(HEAD_TILE, max(16, pow2(head_channels)))",
    "CHANNELS": "channels",
    "QUERY_BLOCK": "QUERY_BLOCK",
    "KEY_BLOCK": "KEY_BLOCK",
    "CHANNEL_BLOCK": "min(CHANNEL_TILE, max(16, pow2(channels)))",
}

CRISS_CROSS_ATTENTION = PLUGINS.add(
    PluginSpec(
        name="CrissCrossAttention",
        op_type="CrissCrossAttention",
        inputs=(
            TensorSpec("query", _QUERY),
            TensorSpec("key", _QUERY),
            TensorSpec("value", _VALUE),
            TensorSpec("residual", _VALUE),
        ),
        outputs=(TensorSpec("output", _VALUE),),
        body=_BODY,
        summary=(
            "output = residual + sum over the pixel's column (own position excluded) and row of "
            "softmax(query . key) value, one softmax over both lines."
        ),
        static=("head_channels", "channels"),
        presets=({"head_channels": 64, "channels": 512},),
        workspaces=(
            Workspace("partial", ("batch", "height", "width", "channels"), "data"),
            Workspace("partial_lse", ("batch", "height", "width"), "float32"),
        ),
        launches=(
            Launch(
                name="columns",
                kernel=f"{_KERNELS}:column_attention",
                reads=("query", "key", "value"),
                scalars=("height", "width"),
                writes=("partial", "partial_lse"),
                grid=("cdiv(height, QUERY_BLOCK) * width", "cdiv(channels, CHANNEL_BLOCK)", "batch"),
                constants=_CONSTANTS,
            ),
            Launch(
                name="rows",
                kernel=f"{_KERNELS}:row_attention",
                reads=("query", "key", "value", "residual", "partial", "partial_lse"),
                scalars=("height", "width"),
                writes=("output",),
                grid=("cdiv(width, QUERY_BLOCK) * height", "cdiv(channels, CHANNEL_BLOCK)", "batch"),
                constants=_CONSTANTS,
            ),
        ),
        tilings=(
            # 64 rows are what one warp group multiplies at a time; values are read half as often as with 32.
            Tiling(
                constants={"QUERY_BLOCK": 64, "KEY_BLOCK": 32, "HEAD_TILE": 64, "CHANNEL_TILE": 128},
                warps={"columns": 4, "rows": 4},
                stages={"columns": 2, "rows": 2},
                elements=("float16", "bfloat16"),
                layouts=("channels-last",),
                sms=(90, 100, 110),
            ),
            Tiling(
                constants={"QUERY_BLOCK": 32, "KEY_BLOCK": 32, "HEAD_TILE": 64, "CHANNEL_TILE": 128},
                warps={"columns": 4, "rows": 4},
                stages={"columns": 2, "rows": 2},
                layouts=("channels-last",),
            ),
            # Neighbouring channels are far apart here: each element is loaded on its own, and pointers take registers.
            Tiling(
                constants={"QUERY_BLOCK": 32, "KEY_BLOCK": 32, "HEAD_TILE": 64, "CHANNEL_TILE": 64},
                warps={"columns": 4, "rows": 4},
                stages={"columns": 2, "rows": 2},
            ),
        ),
        flops="2 * batch * height * width * (height + width) * (head_channels + channels)",
    )
)
