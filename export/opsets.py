"""Versions of the ONNX file format and of the standard operators."""

from __future__ import annotations

import onnx

from edgeattn.foundation import UserError

IR_VERSION = 10
"""File format version that is written; newer ones are refused by the runtimes in the field."""

DEFAULT_OPSET = 18
"""Version of the standard operators that every supported TensorRT parses."""


def standard_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that the model imports.

    Raises:
        UserError: it imports none.
    """
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return entry.version
    raise UserError("the ONNX model imports no standard operator set. Export it again with an explicit opset.")
