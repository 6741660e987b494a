"""`PixelAttention`: softmax(query^T key) value over positions (non-local, PAM, OCNet, SAGAN and their kin)."""

from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import PluginSpec, TensorSpec

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
    )
)
