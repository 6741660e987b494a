"""Polygraphy runners for the PyTorch original and for every ONNX form, on the CPU, with the arithmetic as written."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.exception import PolygraphyException
from torch import nn

from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.model_file import load_model
from edgeattn.plugins_trt import DOMAIN

MEASURED_ON = f"CPU, ONNX Runtime {onnxruntime.__version__}"
"""Where every number of an ONNX form comes from; a form adds how its arithmetic was run."""

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    PolygraphyException,
    *(
        member
        for member in vars(onnxruntime_pybind11_state).values()
        if isinstance(member, type) and issubclass(member, Exception)
    ),
)
"""What loading or running a defective form raises; ONNX Runtime's errors have no common base of their own."""

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class FormFacts:
    """What an ONNX file holds.

    Attributes:
        nodes: number of nodes of the main graph; a node with a local function counts once.
        plugin_nodes: how many of them belong to domain `edgeattn`.
        bytes: size of the file.
        fp16: some tensor has type FP16.
        qdq: the graph quantises.
        half_inputs: names of the graph inputs of type FP16.
        bf16: some tensor has type BF16.
    """

    nodes: int
    plugin_nodes: int
    bytes: int
    fp16: bool
    qdq: bool
    half_inputs: tuple[str, ...] = ()
    bf16: bool = False

    @property
    def measured(self) -> str:
        """Where and how the form's outputs are computed, for the record."""
        parts = [MEASURED_ON]
        parts += [
            f"{label} emulated with rounding after each operation"
            for label, held in (("FP16", self.fp16), ("BF16", self.bf16))
            if held
        ]
        if self.qdq:
            parts.append("Q/DQ computed as written")
        return ", ".join(parts)


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """Runs a PyTorch module on the CPU in evaluation mode, without gradients.

    The module's training flags and torch's number of threads are restored when the runner is deactivated.

    Args:
        module: the network; its forward returns a tensor or a tuple of tensors.
        inputs: names of forward's arguments, in order.
        outputs: names of what forward returns, in order.
        threads: torch's threads within an operation.
        name: name of the runner in Polygraphy's messages.
        input_type: element type of the images.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        input_type: np.dtype | type = np.float32,
        threads: int = 1,
        name: str = "PyTorch",
    ) -> None:
        super().__init__(name=name)
        self.input_type = input_type
        self.threads = threads
        self._threads_before = threads
        self.module = module
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._training: list[nn.Module] = []

    def activate_impl(self) -> None:
        """Put the module into evaluation mode and remember which parts were not."""
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._training = [part for part in self.module.modules() if part.training]
        self.module.eval()

    def deactivate_impl(self) -> None:
        """Give the parts that were training their flag back, and torch its threads."""
        torch.set_num_threads(self._threads_before)
        for part in self._training:
            part.training = True
        self._training = []

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the input names; a module does not say which types and shapes it takes beyond float images."""
        metadata = TensorMetadata()
        for name in self.inputs:
            metadata.add(name, dtype=np.dtype(self.input_type), shape=(None, None, None, None))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Run the module.

        Args:
            feed_dict: images by input name.

        Returns:
            Outputs by name.

        Raises:
            ValueError: forward returned another number of tensors than there are output names.
        """
        arguments = [torch.from_numpy(np.ascontiguousarray(feed_dict[name])) for name in self.inputs]
        start = time.perf_counter()
        with torch.no_grad():
            result = self.module(*arguments)
        self.inference_time = time.perf_counter() - start
        tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        if len(tensors) != len(self.outputs):
            raise ValueError(f"the network returned {len(tensors)} tensors, but its outputs are named {self.outputs}")
        return OrderedDict((name, tensor.numpy()) for name, tensor in zip(self.outputs, tensors, strict=True))


def facts_of(model: onnx.ModelProto, path: str | Path) -> FormFacts:
    """Describe a loaded form; `path` is where it was read from."""
    return FormFacts(
        nodes=len(model.graph.node),
        plugin_nodes=sum(node.domain == DOMAIN for node in model.graph.node),
        bytes=Path(path).stat().st_size,
        fp16=_holds(model, TensorProto.FLOAT16),
        bf16=_holds(model, TensorProto.BFLOAT16),
        qdq=any(node.op_type in _QDQ for node in _all_nodes(model)),
        half_inputs=tuple(
            value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT16
        ),
    )


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _holds(model: onnx.ModelProto, half: int) -> bool:
    """Say whether some tensor of a model has an element type."""
    graph = model.graph
    declared = (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info))
    constants = (
        attribute.i if attribute.name == "to" else attribute.t.data_type
        for node in _all_nodes(model)
        for attribute in node.attribute
        if attribute.name in ("to", "value")
    )
    return half in (*declared, *constants, *(tensor.data_type for tensor in graph.initializer))


def _session(
    source: str | bytes, *, threads: int, entries: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Many sessions live at the same time; idle ones must not spin on the cores that the active one needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnx_runner(
    path: str | Path, facts: FormFacts, *, threads: int = 1, name: str = "ONNX", accumulation: int | None = None
) -> OnnxrtRunner:
    """Return a runner that computes a form's arithmetic as the graph states it, on ONNX Runtime's CPU provider.

    ONNX Runtime's CPU provider does not round between FP16 operations, and has hardly any BF16 operation, so a graph
    with such tensors is replaced by its emulation. Its fusion of Q/DQ into integer kernels is switched off: with FP16
    scales it drifts from what the nodes say.

    Args:
        path: the ONNX file.
        facts: of the same file.
        threads: ONNX Runtime's threads within an operation.
        name: name of the runner in Polygraphy's messages.
        accumulation: terms after which the emulation of FP16 rounds running totals to FP16; None for FP32 sums.
    """
    entries = {"session.disable_quant_qdq": "1"} if facts.qdq else {}

    def load() -> onnxruntime.InferenceSession:
        if not (facts.fp16 or facts.bf16):
            return _session(str(path), threads=threads, entries=entries)
        options = {} if accumulation is None else {"accumulation": accumulation}
        return _session(emulate_fp16(load_model(path), **options).SerializeToString(), threads=threads, entries=entries)

    return OnnxrtRunner(load, name=name)


def feed_for(runner: BaseRunner, facts: FormFacts, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return those arrays that an active runner takes, in the types that it declares.

    What the form itself takes as FP16 is rounded to it, although its emulation takes FP32.
    """
    metadata = runner.get_input_metadata(use_numpy_dtypes=False)
    rounded = {
        name: arrays[name].astype(np.float16) if name in facts.half_inputs else arrays[name] for name in metadata
    }
    return {name: rounded[name].astype(entry.dtype.numpy(), copy=False) for name, entry in metadata.items()}


def accepts(runner: BaseRunner, arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether an active runner's declared input shapes admit these arrays."""
    metadata = runner.get_input_metadata(use_numpy_dtypes=False)
    return all(
        not isinstance(declared, int) or declared < 0 or declared == given
        for name, entry in metadata.items()
        for declared, given in zip(entry.shape, arrays[name].shape, strict=True)
    )


LATENCY_SECONDS = 2.0
"""After this much timing no further run of a form is begun."""


@dataclass(frozen=True)
class Latency:
    """Latency of one call; a CPU's is no proxy for a GPU's.

    Attributes:
        median_ms: median of the runs, milliseconds.
        runs: number of timed runs, after one that was not; the only run is timed where it took long.
        threads: threads within an operation.
    """

    median_ms: float
    runs: int
    threads: int


def measure_latency(run: Callable[[], object], *, runs: int, threads: int) -> Latency:
    """Time a call up to `runs` times after one that is not counted; `threads` is only recorded.

    A call that takes seconds is timed fewer times, at least once: its spread is small beside its length, and so is what
    the first run has to set up.
    """

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    first = timed()
    times = [first] if first > LATENCY_SECONDS else [timed()]
    while len(times) < runs and sum(times) < LATENCY_SECONDS:
        times.append(timed())
    return Latency(statistics.median(times) * 1e3, len(times), threads)


def native_latency(path: str | Path, feed: Mapping[str, np.ndarray], *, runs: int, threads: int) -> Latency:
    """Time a form as ONNX Runtime runs the file itself: FP16 not emulated, Q/DQ fused.

    Args:
        path: the ONNX file.
        feed: inputs by name, in any floating-point type.
        runs: number of timed runs at most.
        threads: ONNX Runtime's threads within an operation.
    """
    session = _session(str(path), threads=threads)
    types = {value.name: value.type for value in session.get_inputs()}
    typed = {name: array.astype(_NUMPY_TYPES[types[name]]) for name, array in feed.items() if name in types}
    return measure_latency(lambda: session.run(None, typed), runs=runs, threads=threads)


_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(float16)": np.float16}
