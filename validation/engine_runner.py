"""Runner for built engines, for comparisons beside the PyTorch original and the ONNX forms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.trt import EngineFromBytes, TrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException

from edgeattn.export.engine.builder import load_plugins
from edgeattn.export.engine.machine import Machine, import_tensorrt, local_machine
from edgeattn.export.engine.record import read_record
from edgeattn.foundation import UserError, sha256_of

if TYPE_CHECKING:
    import tensorrt as trt

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EngineDescription:
    """What a record says about an engine, checked against the file and this machine.

    Attributes:
        path: the engine.
        tensorrt: version that built it and runs it.
        gpu: device that built it.
        tf32: FP32 convolutions and matrix products may round their inputs to TF32.
        verdict: whether the engine's types are those of its graph, see `edgeattn.export.engine.precisions`.
        graph: ONNX file that it was built from, from which a comparison reads the arithmetic.
    """

    path: Path
    tensorrt: str
    gpu: str
    tf32: bool
    verdict: str
    graph: Path

    @property
    def measured(self) -> str:
        """Where and how the engine's outputs are computed, for the record."""
        return f"TensorRT {self.tensorrt} on {self.gpu}, TF32 {'on' if self.tf32 else 'off'}"


def describe_engine(path: Path, machine: Machine) -> EngineDescription:
    """Read the record of an engine.

    Args:
        path: the engine.
        machine: where it is to run.

    Raises:
        UserError: there is no engine, record or graph, one of them is not the recorded one, or the engine was built for
            another TensorRT, GPU architecture or driver.
    """
    if not path.is_file():
        raise UserError(f"the engine {path} does not exist. Build it with `edgeattn build`.")
    record = read_record(path)
    if record is None or record.get("engine_sha256") != sha256_of(path):
        raise UserError(
            f"nothing says what the engine {path} was built from: its record is missing or of another engine. Build it "
            "with `edgeattn build`."
        )
    key = record["key"]
    here = {"TensorRT": machine.tensorrt, "SM": machine.gpu.sm, "driver": machine.gpu.driver}
    for name, value in here.items():
        if key[name] != value:
            raise UserError(
                f"the engine {path} was built with {name} {key[name]}, and this machine has {value}. Build it again "
                "here with `edgeattn build`."
            )
    graph = path.parent / record["graph"]["file"]
    if not graph.is_file() or sha256_of(graph) != record["graph"]["sha256"]:
        raise UserError(
            f"the graph {graph} that the engine {path} was built from is gone or another one, and nothing else says "
            "which arithmetic to expect. Put it back, or build the engine again."
        )
    verdict = record["precision"]["verdict"]
    return EngineDescription(path, machine.tensorrt, record["gpu"], record["tf32"], verdict, graph)


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs an engine with Polygraphy's TensorRT runner, in the optimisation profile that takes the inputs.

    It takes and gives what the runners of `edgeattn.validation.runners` do, so `feed_for`, `accepts` and Polygraphy's
    `Comparator` work on it.

    Args:
        path: an engine that `edgeattn build` made on this machine.
        plugins: plugin libraries it needs.
        name: name of the runner in Polygraphy's messages.
        machine: tells what this machine is.
    """

    def __init__(
        self,
        path: Path,
        *,
        plugins: Sequence[Path] = (),
        name: str = "TensorRT",
        machine: Callable[[], Machine] = local_machine,
    ) -> None:
        super().__init__(name=name)
        self.path = path
        self.plugins = tuple(plugins)
        self.description: EngineDescription | None = None
        self._machine = machine
        self._runner: TrtRunner | None = None
        self._profile = 0

    def activate_impl(self) -> None:
        """Check the engine's record, load plugins and engine, and create a context.

        Raises:
            UserError: see `describe_engine`, or TensorRT does not load the engine.
        """
        self.description = describe_engine(self.path, self._machine())
        load_plugins(self.plugins)
        runner = TrtRunner(EngineFromBytes(self.path.read_bytes()), name=self.name, optimization_profile=0)
        try:
            runner.activate()
        except PolygraphyException as error:
            raise UserError(
                f"TensorRT {self.description.tensorrt} does not load the engine {self.path}: {error}. Its messages are "
                "above; plugin operations need their libraries."
            ) from error
        self._runner, self._profile = runner, 0

    def deactivate_impl(self) -> None:
        """Free context and engine."""
        if self._runner is not None:
            self._runner.deactivate()
        self._runner = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return names, types and shapes of the inputs; None where the size varies."""
        assert self._runner is not None
        metadata = TensorMetadata()
        for name, kind, shape in _inputs(self._runner.engine):
            metadata.add(name, DataType.from_dtype(kind), tuple(None if size < 0 else size for size in shape))
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        """Run the engine.

        Args:
            feed_dict: arrays by input name, of the engine's types.

        Returns:
            Outputs by name.

        Raises:
            UserError: no optimisation profile takes inputs of these shapes.
        """
        assert self._runner is not None
        profile = _profile_for(self._runner.engine, {name: array.shape for name, array in feed_dict.items()})
        if profile != self._profile:
            self._runner.set_profile(profile)
            self._profile = profile
        outputs = self._runner.infer(feed_dict)
        self.inference_time = self._runner.last_inference_time()
        # The runner reuses its buffers.
        return OrderedDict((name, np.array(array)) for name, array in outputs.items())


def _inputs(engine: trt.ICudaEngine) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Return name, type and shape of each input."""
    trt = import_tensorrt()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [
        (name, engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
        for name in names
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    ]


def _profile_for(engine: trt.ICudaEngine, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the first optimisation profile that takes these shapes."""
    ranges = []
    for profile in range(engine.num_optimization_profiles):
        limits = {name: engine.get_tensor_profile_shape(name, profile) for name in shapes}
        if all(_within(shape, limits[name]) for name, shape in shapes.items()):
            return profile
        ranges.append("; ".join(f"{name} {tuple(low)} to {tuple(high)}" for name, (low, _, high) in limits.items()))
    given = "; ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise UserError(
        f"no optimisation profile of the engine takes {given}. It was built for {', or '.join(ranges)}. Build it with "
        "wider shapes."
    )


def _within(shape: tuple[int, ...], limits: Sequence[Sequence[int]]) -> bool:
    low, _, high = (tuple(limit) for limit in limits)
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
