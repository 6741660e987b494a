"""`AttentionCore`: the parameter-free heart of a block, which one plugin may replace."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class AttentionCore(nn.Module):
    """Base of the modules that leave torch as one opaque ONNX node of domain `edgeattn`.

    A core has no parameters or buffers; its `forward` takes and returns tensors only, in the order of the operation's
    signature (`edgeattn.plugins_trt`), and is the torch definition of that operation.

    Attributes:
        op_type: the operation that may replace the core, such as "CrissCrossAttention".
    """

    op_type: ClassVar[str]
