"""TensorRT engines: strongly typed, from the graph's own types, on the machine that has TensorRT."""

from edgeattn.export.engine.build import BuildRequest, BuildResult, build_engine, print_line, profiles_of
from edgeattn.export.engine.configuration import Configuration
from edgeattn.export.engine.graph import PrecisionOptions
from edgeattn.export.engine.monitor import BuildCancelled
from edgeattn.export.engine.precisions import AGREES
from edgeattn.export.engine.profiles import ProfileOptions

__all__ = [
    "AGREES",
    "BuildCancelled",
    "BuildRequest",
    "BuildResult",
    "Configuration",
    "PrecisionOptions",
    "ProfileOptions",
    "build_engine",
    "print_line",
    "profiles_of",
]
