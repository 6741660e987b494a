"""ONNX Runtime in the place of TensorRT, for tests of bundles on machines without a GPU. Its times say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .engines import Arrays, Backend, BuildRequest, Built, Session, Tell
from .errors import DeviceError

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxRuntimeSession:
    """A model in ONNX Runtime on the CPU, Q/DQ computed as written."""

    def __init__(self, data: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base
            if type(error).__name__ == "NotImplemented":
                raise DeviceError(
                    "ONNX Runtime's CPU provider lacks an operator of the model in its type, as it lacks convolutions "
                    f"in BF16, which TensorRT has: {error}. Use --engine tensorrt, or another --precision."
                ) from error
            raise DeviceError(f"ONNX Runtime does not load the model: {error}. Use --engine tensorrt.") from error
        self.inputs: Mapping[str, np.dtype[Any]] = {
            value.name: np.dtype(_TYPES[value.type]) for value in self._session.get_inputs()
        }
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        return dict(zip(self._outputs, self._session.run(None, dict(feed)), strict=True))

    def memory(self) -> dict[str, int]:
        """Return nothing: ONNX Runtime does not say."""
        return {}

    def close(self) -> None:
        """Nothing is held that Python does not free."""


class OnnxRuntimeBackend:
    """Takes the ONNX file itself for the engine."""

    name = "onnxruntime"
    needs_library = False

    def measured(self) -> str:
        """Return where results come from."""
        return f"ONNX Runtime {onnxruntime.__version__} on the CPU, not TensorRT"

    def identity(self) -> dict[str, str]:
        """Return the version."""
        return {"ONNX Runtime": str(onnxruntime.__version__)}

    def build(self, request: BuildRequest, tell: Tell) -> Built:
        """Return the model's bytes after loading them once."""
        tell("loading the model")
        data = request.model.read_bytes()
        OnnxRuntimeSession(data)
        return Built(data, notes=("this engine is the ONNX file itself, for ONNX Runtime",))

    def load(self, engine: Path, library: Path | None) -> Session:
        """Load the model."""
        return OnnxRuntimeSession(engine.read_bytes())


def backend() -> Backend:
    """Return the backend."""
    return OnnxRuntimeBackend()
