"""ONNX files."""

from __future__ import annotations

from pathlib import Path

import onnx

from edgeattn.foundation import UserError


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        UserError: it does not exist or is no ONNX model.
    """
    try:
        return onnx.load(str(path))
    except OSError as error:
        raise UserError(f"cannot read the model {path}: {error.strerror or error}. Check the path.") from error
    except Exception as error:  # protobuf's DecodeError has no stable home across protobuf releases
        raise UserError(f"{path} is not an ONNX model: {error}. Export it again.") from error
