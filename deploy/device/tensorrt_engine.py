"""TensorRT 10 and 11: engines in exactly the types of the graph, run by Polygraphy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
from polygraphy.backend.trt import CreateConfig, EngineFromBytes, Profile, TrtRunner, create_network, get_trt_logger
from polygraphy.exception import PolygraphyException

from .engines import Arrays, Backend, BuildRequest, Built, Session, Tell
from .errors import DeviceError
from .system import first_gpu


class TensorRtSession:
    """A loaded engine with one context, in optimisation profile 0."""

    def __init__(self, engine: Path, library: Path | None) -> None:
        _load_plugins(library)
        self._runner = TrtRunner(EngineFromBytes(engine.read_bytes()), optimization_profile=0)
        try:
            self._runner.activate()
        except PolygraphyException as error:
            raise DeviceError(
                f"TensorRT {trt.__version__} does not load {engine}: {error}. Build it again with the command build."
            ) from error
        loaded = self._runner.engine
        names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        self.inputs: Mapping[str, np.dtype[Any]] = {
            name: np.dtype(trt.nptype(loaded.get_tensor_dtype(name)))
            for name in names
            if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        }

    def run(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs by name; the copies to and from the device are part of the call."""
        outputs = self._runner.infer(dict(feed))
        return {name: np.array(array) for name, array in outputs.items()}  # the runner reuses its buffers

    def memory(self) -> dict[str, int]:
        """Return the scratch memory of a context."""
        engine = self._runner.engine
        size = getattr(engine, "device_memory_size_v2", None) or getattr(engine, "device_memory_size", None)
        return {"context": int(size)} if size else {}

    def close(self) -> None:
        """Free context and engine."""
        self._runner.deactivate()


class TensorRtBackend:
    """Builds and runs engines on the GPU of this machine."""

    name = "tensorrt"
    needs_library = True

    def measured(self) -> str:
        """Return where results come from."""
        gpu = first_gpu()
        return f"TensorRT {trt.__version__} on {gpu.name} (sm_{gpu.sm})" if gpu else f"TensorRT {trt.__version__}"

    def identity(self) -> dict[str, str]:
        """Return version and GPU.

        Raises:
            DeviceError: there is no GPU.
        """
        gpu = first_gpu()
        if gpu is None:
            raise DeviceError("the NVIDIA driver finds no GPU here. Check the driver; engines are built on the device.")
        return {"TensorRT": str(trt.__version__), "GPU": gpu.name, "SM": str(gpu.sm), "CUDA": "{}.{}".format(*gpu.cuda)}

    def build(self, request: BuildRequest, tell: Tell) -> Built:
        """Parse and build; no precision flag is ever set, and TF32 is off.

        Raises:
            DeviceError: TensorRT cannot build here, or refuses the graph.
        """
        _load_plugins(request.library)
        try:
            builder, network = create_network(strongly_typed=True)
        except (TypeError, PolygraphyException) as error:  # TypeError is what the bindings make of a null builder
            raise DeviceError(
                f"TensorRT {trt.__version__} cannot create a builder here ({error}). Check the GPU."
            ) from error
        parser = trt.OnnxParser(network, get_trt_logger())
        if not parser.parse_from_file(str(request.model)) or parser.num_errors:
            raise DeviceError(
                f"TensorRT {trt.__version__} does not take {request.model}: {'; '.join(_errors(parser))}. The command "
                "doctor compares the device with what the bundle is for."
            )
        found = sum(_is_plugin(network.get_layer(index)) for index in range(network.num_layers))
        if found < request.plugin_nodes:
            raise DeviceError(
                f"{request.plugin_nodes} nodes have to become plugin layers, and TensorRT {trt.__version__} made "
                f"{found}. Build the plugin library again: remove the folder work/plugins."
            )
        cache = request.timing_cache
        try:
            config = CreateConfig(
                profiles=[_profile(entry) for entry in request.profiles] or None,
                tf32=False,
                load_timing_cache=str(cache) if cache.is_file() else None,
                progress_monitor=_monitor(tell),
            )(builder, network)
        except PolygraphyException as error:
            raise DeviceError(f"TensorRT {trt.__version__} refused the configuration: {error}.") from error
        notes = _require_cache(config, cache)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise DeviceError(
                f"TensorRT {trt.__version__} could not build an engine from {request.model}; its messages are above. "
                "The command doctor shows free memory."
            )
        measured = config.get_timing_cache()
        return Built(bytes(data), bytes(measured.serialize()) if measured is not None else None, notes)

    def load(self, engine: Path, library: Path | None) -> Session:
        """Load an engine."""
        return TensorRtSession(engine, library)


def _load_plugins(library: Path | None) -> None:
    trt.init_libnvinfer_plugins(get_trt_logger(), "")
    if library is not None:
        # The handle is None where the plugins are registered already; what is missing the parser notices.
        trt.get_plugin_registry().load_library(str(library.resolve()))


def _errors(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}"


def _is_plugin(layer: Any) -> bool:
    return layer.type in (trt.LayerType.PLUGIN, trt.LayerType.PLUGIN_V2, trt.LayerType.PLUGIN_V3)


def _profile(ranges: Mapping[str, list[list[int]]]) -> Profile:
    profile = Profile()
    for name, (low, usual, high) in ranges.items():
        profile.add(name, min=tuple(low), opt=tuple(usual), max=tuple(high))
    return profile


def _require_cache(config: Any, path: Path) -> tuple[str, ...]:
    """Give a build an empty timing cache where TensorRT refused the one it was given: of another device or version."""
    if config.get_timing_cache() is not None:
        return ()
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return (f"the timing cache {path.name} is of another device or version, and was not used",)


def _monitor(tell: Tell) -> Any:
    """Return a progress monitor that names each phase as it begins."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands TensorRT's calls on; no exception may reach TensorRT."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            tell(f"{phase_name}: {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done."""
            return True

        def phase_finish(self, phase_name: str) -> None:
            """A phase ends."""

    return Monitor()


def backend() -> Backend:
    """Return the backend."""
    return TensorRtBackend()
