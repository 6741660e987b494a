"""From a prepared graph to a serialised engine, with TensorRT 10 and 11 alike.

Polygraphy makes network, configuration, profiles and runtime. Done here is what it does not do on these versions:
plugin libraries that export creators (it only loads libraries that register themselves), the parser's errors with their
nodes, a build that can be cancelled and still keeps its timing cache, and reading back what was built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygraphy.backend.trt import CreateConfig, EngineFromBytes, create_network, get_trt_logger
from polygraphy.backend.trt import Profile as TrtProfile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from edgeattn.export.engine.configuration import COMPATIBILITIES, Configuration
from edgeattn.export.engine.machine import import_tensorrt
from edgeattn.export.engine.monitor import PhaseLog, make_monitor, run_cancellable
from edgeattn.export.engine.profiles import Profile
from edgeattn.export.engine.timing_cache import save_cache
from edgeattn.foundation import UserError
from edgeattn.plugins_trt.qdp import register_plugins

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine and what its network held.

    Attributes:
        data: the engine.
        network_types: TensorRT's name of the type of each tensor of the parsed network.
    """

    data: bytes
    network_types: Mapping[str, str]


@dataclass(frozen=True)
class EngineFacts:
    """What a built engine says about itself.

    Attributes:
        bindings: TensorRT's name of the type of each input and output.
        information: the engine inspector's JSON.
    """

    bindings: Mapping[str, str]
    information: str


def build_serialized(
    graph: Path, plugin_nodes: int, configuration: Configuration, timing_cache: Path, log: PhaseLog
) -> BuiltEngine:
    """Build an engine on this machine.

    Args:
        graph: ONNX file whose types are the engine's.
        plugin_nodes: how many of its nodes have to become plugin layers.
        configuration: how to build.
        timing_cache: file of measurements, read and added to.
        log: gets the phases; see `run_cancellable`.

    Raises:
        UserError: TensorRT cannot build here, or refuses the graph.
        BuildCancelled: the user cancelled; the measurements so far are kept.
    """
    load_plugins(configuration.plugins)
    builder, network = _create_network()
    _parse(network, graph)
    _require_plugin_layers(network, plugin_nodes)
    types = dict(_network_types(network))
    try:
        config = _create_config(builder, network, configuration, timing_cache, log)
    except PolygraphyException as error:
        raise UserError(
            f"TensorRT {import_tensorrt().__version__} refused the configuration: {error}. Its messages are above; "
            "leave the choice out."
        ) from error
    try:
        data = run_cancellable(lambda: _build(builder, network, config), log)
    except Exception:  # not KeyboardInterrupt, with which TensorRT is still at work
        save_cache(config, timing_cache)
        raise
    save_cache(config, timing_cache)
    if data is None:
        raise UserError(
            f"TensorRT could not build an engine from {graph}; its messages are above. `edgeattn check` names nodes "
            "that a version does not take; a smaller --workspace or smaller largest shapes help where memory is short."
        )
    return BuiltEngine(bytes(data), types)


def _build(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig) -> Any:
    return builder.build_serialized_network(network, config)


def _create_network() -> tuple[Any, Any]:
    """Return a builder and an empty, strongly typed network."""
    try:
        builder, network = create_network(strongly_typed=True)
    except (TypeError, PolygraphyException) as error:  # TypeError is what the bindings make of a null builder
        raise UserError(
            f"TensorRT {import_tensorrt().__version__} is installed, but it cannot create a builder here ({error}). It "
            "needs an NVIDIA GPU and a driver that its CUDA version works with: check `nvidia-smi`, or build on the "
            "device."
        ) from error
    return builder, network


def load_plugins(libraries: Sequence[Path]) -> None:
    """Load plugin libraries into TensorRT's registry, and NVIDIA's own plugins.

    Args:
        libraries: C++ plugin libraries, and folders of compiled kernels that run as Python plugins.

    Raises:
        UserError: TensorRT has no registry here, which means that it does not work; or it has no Python plugins.
    """
    trt = import_tensorrt()
    trt.init_libnvinfer_plugins(get_trt_logger(), "")
    if not libraries:
        return
    registry = trt.get_plugin_registry()
    if registry is None:
        raise UserError(
            f"TensorRT {trt.__version__} is installed, but has no plugin registry, so {libraries[0]} cannot be loaded. "
            "Install TensorRT again."
        )
    _load_into(registry, libraries)


def _load_into(registry: trt.IPluginRegistry, libraries: Sequence[Path]) -> None:
    for library in libraries:
        if library.is_dir():  # compiled kernels, which run as Python plugins
            register_plugins(library)
            continue
        # The handle is None where the plugins are registered already; what is missing the parser notices.
        registry.load_library(str(library.resolve()))


def _parse(network: trt.INetworkDefinition, graph: Path) -> None:
    trt = import_tensorrt()
    parser = trt.OnnxParser(network, get_trt_logger())
    if not _parsed(parser, graph):
        raise UserError(
            f"TensorRT {trt.__version__} does not take {graph}: "
            f"{'; '.join(_parser_errors(parser)) or 'no reason given'}. `edgeattn check` names the remedy."
        )
    for tensor in _inputs(network):
        _refuse_shape(tensor)


def _parsed(parser: trt.OnnxParser, graph: Path) -> bool:
    return bool(parser.parse_from_file(str(graph))) and parser.num_errors == 0


def _parser_errors(parser: trt.OnnxParser) -> Iterator[str]:
    for index in range(parser.num_errors):
        yield _describe(parser.get_error(index))


def _describe(error: trt.ParserError) -> str:
    return f"node {error.node_name()!r} ({error.node_operator()}): {error.desc().strip()}"


def _refuse_shape(tensor: trt.ITensor) -> None:
    if tensor.is_shape_tensor:
        raise UserError(
            f"the input {tensor.name!r} is read as a shape, and its values would be frozen in the engine. Export the "
            "model so that sizes come from the shapes of its other inputs."
        )


def _inputs(network: trt.INetworkDefinition) -> Iterator[Any]:
    for index in range(network.num_inputs):
        yield network.get_input(index)


def _layers(network: trt.INetworkDefinition) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _require_plugin_layers(network: trt.INetworkDefinition, wanted: int) -> None:
    """Raise when plugin nodes became something else: a parser that finds a function body may run it instead."""
    if not wanted:
        return
    found = sum(_is_plugin(layer) for layer in _layers(network))
    if found < wanted:
        raise UserError(
            f"plugin nodes in the graph: {wanted}, plugin layers that TensorRT {import_tensorrt().__version__} made of "
            f"them: {found}. Check that the libraries given with --plugin hold their operations for this TensorRT."
        )


def _is_plugin(layer: trt.ILayer) -> bool:
    trt = import_tensorrt()
    return layer.type in (trt.LayerType.PLUGIN, trt.LayerType.PLUGIN_V2, trt.LayerType.PLUGIN_V3)


def _network_types(network: trt.INetworkDefinition) -> Iterator[tuple[str, str]]:
    for tensor in _inputs(network):
        yield _typed(tensor)
    for layer in _layers(network):
        yield from _output_types(layer)


def _output_types(layer: trt.ILayer) -> Iterator[tuple[str, str]]:
    for index in range(layer.num_outputs):
        tensor = layer.get_output(index)
        if tensor is not None:
            yield _typed(tensor)


def _typed(tensor: trt.ITensor) -> tuple[str, str]:
    return tensor.name, tensor.dtype.name


def _create_config(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    configuration: Configuration,
    timing_cache: Path,
    log: PhaseLog,
) -> trt.IBuilderConfig:
    """Return the builder configuration. No precision flag is ever set."""
    trt = import_tensorrt()
    workspace, level = configuration.workspace_mib, configuration.hardware_compatible
    with G_LOGGER.verbosity(G_LOGGER.WARNING):  # it would print what the record says
        config = CreateConfig(
            profiles=[_trt_profile(profile) for profile in configuration.profiles] or None,
            load_timing_cache=str(timing_cache) if timing_cache.exists() else None,
            memory_pool_limits={trt.MemoryPoolType.WORKSPACE: workspace << 20} if workspace else None,
            builder_optimization_level=configuration.builder_level,
            hardware_compatibility_level=COMPATIBILITIES[level].level(trt) if level else None,
            version_compatible=configuration.version_compatible,
            refittable=configuration.refit,
            tf32=configuration.tf32,
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
            progress_monitor=make_monitor(log),
        )(builder, network)
    libraries = [library for library in configuration.plugins if library.is_file()]
    if configuration.version_compatible and libraries:
        _serialize_plugins(config, libraries)
    return config


def _serialize_plugins(config: trt.IBuilderConfig, libraries: Sequence[Path]) -> None:
    config.plugins_to_serialize = [str(library.resolve()) for library in libraries]


def _trt_profile(profile: Profile) -> TrtProfile:
    made = TrtProfile()
    for entry in profile:
        made.add(entry.name, min=entry.minimum, opt=entry.optimum, max=entry.maximum)
    return made


def read_engine(data: bytes) -> EngineFacts:
    """Deserialise an engine and ask it for the types of its inputs, outputs and layers.

    Raises:
        UserError: TensorRT cannot load what it built.
    """
    trt = import_tensorrt()
    try:
        engine = EngineFromBytes(data)()
    except PolygraphyException as error:
        raise UserError(
            f"TensorRT {trt.__version__} cannot load the engine it built: {error}. Build it again."
        ) from error
    return EngineFacts(dict(_binding_types(engine)), _inspect(engine))


def _binding_types(engine: trt.ICudaEngine) -> Iterator[tuple[str, str]]:
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        yield name, engine.get_tensor_dtype(name).name


def _inspect(engine: trt.ICudaEngine) -> str:
    return _information(engine.create_engine_inspector())


def _information(inspector: trt.EngineInspector) -> str:
    trt = import_tensorrt()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
