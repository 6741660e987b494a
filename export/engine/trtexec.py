"""The trtexec line that builds the same engine, right for one version of TensorRT."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeattn.export.engine.configuration import COMPATIBILITIES, Configuration
from edgeattn.export.engine.profiles import shapes_text
from edgeattn.foundation import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Release = tuple[int, int]


@functools.cache
def option_table() -> Mapping[str, tuple[Release, Release | None]]:
    """Return the first version that takes an option, and the first that no longer does or needs it, by option name."""
    rows = tomllib.loads(Path(__file__).with_name("trtexec.toml").read_text(encoding="utf-8"))["options"]
    return {name: (tuple(row["since"]), tuple(row["until"]) if "until" in row else None) for name, row in rows.items()}


def trtexec_line(graph: Path, engine: Path, layers: Path, configuration: Configuration, release: Release) -> str:
    """Return a line for a shell that builds an engine with trtexec.

    Args:
        graph: ONNX model, already in the precision that is wanted: types come from the graph.
        engine: the file to write.
        layers: JSON file for the layer information.
        configuration: how to build.
        release: TensorRT version (major, minor) whose trtexec runs the line.

    Raises:
        UserError: the version lacks something that was chosen, or trtexec cannot do it at all.
    """
    configuration.require(release)
    for library in configuration.plugins:
        if library.is_dir():
            raise UserError(
                f"trtexec runs no Python plugins, which the kernels in {library} would be. Build the engine with "
                "`edgeattn build` on the device, or give the C++ library with --plugin."
            )
    words = ["trtexec"]
    for name, value in _wanted(graph, engine, layers, configuration):
        since, until = option_table()[name]
        if release < since:
            raise UserError(f"trtexec of TensorRT {release[0]}.{release[1]} has no --{name}. Leave out what needs it.")
        if until is None or release < until:
            words.append(f"--{name}" if value is None else f"--{name}={value}")
    return shlex.join(words)


def _wanted(
    graph: Path, engine: Path, layers: Path, configuration: Configuration
) -> Iterator[tuple[str, str | int | None]]:
    """Yield the options that say the same as a configuration."""
    yield "onnx", str(graph)
    yield "saveEngine", str(engine)
    yield "stronglyTyped", None
    for library in configuration.plugins:
        yield "dynamicPlugins", str(library)
        if configuration.version_compatible:
            yield "setPluginsToSerialize", str(library)
    several = len(configuration.profiles) > 1
    for index, profile in enumerate(configuration.profiles):
        if several:
            yield "profile", index
        for end, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            yield name, shapes_text(profile, end)
    if configuration.workspace_mib is not None:
        yield "memPoolSize", f"workspace:{configuration.workspace_mib}M"
    if configuration.builder_level is not None:
        yield "builderOptimizationLevel", configuration.builder_level
    if configuration.hardware_compatible is not None:
        yield "hardwareCompatibilityLevel", COMPATIBILITIES[configuration.hardware_compatible].trtexec
    for name, chosen in (
        ("versionCompatible", configuration.version_compatible),
        ("refit", configuration.refit),
        ("noTF32", not configuration.tf32),
    ):
        if chosen:
            yield name, None
    yield "profilingVerbosity", "detailed"
    yield "exportLayerInfo", str(layers)
    yield "timingCacheFile", f"{engine}.timing"
    yield "skipInference", None
