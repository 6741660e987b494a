"""What a user may choose about an engine; precision is not among it, because the graph's own types decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.export.engine.profiles import Profile
from edgeattn.foundation import UserError

BUILDER_LEVELS = range(6)
"""Builder optimisation levels of TensorRT 10 and 11; 3 is its default."""


@dataclass(frozen=True)
class Compatibility:
    """A hardware compatibility level.

    Attributes:
        level: gets TensorRT's name for it.
        trtexec: what trtexec calls it.
        since: first TensorRT version that has it.
    """

    level: Callable[[Any], Any]
    trtexec: str
    since: tuple[int, int]


COMPATIBILITIES: Mapping[str, Compatibility] = {
    "ampere-plus": Compatibility(lambda trt: trt.HardwareCompatibilityLevel.AMPERE_PLUS, "ampere+", (10, 0)),
    "same-compute-capability": Compatibility(
        lambda trt: trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY, "sameComputeCapability", (10, 9)
    ),
}
"""Other GPUs that an engine may be made for, besides the one it is built on."""


@dataclass(frozen=True)
class Configuration:
    """How an engine is built.

    Attributes:
        profiles: optimisation profiles; none for a model of fixed shapes.
        plugins: C++ plugin libraries (IPluginV3), and folders of compiled kernels that run as Python plugins; loaded
            before the model is parsed.
        workspace_mib: most scratch memory a layer may use, in MiB; all of the GPU's when None.
        builder_level: effort from 0 to 5; TensorRT's default when None.
        version_compatible: the engine also runs on later TensorRT versions of the same major.
        hardware_compatible: key of `COMPATIBILITIES`; the very GPU when None.
        refit: weights can be exchanged later.
        tf32: FP32 convolutions and matrix products may round their inputs to TF32.
    """

    profiles: tuple[Profile, ...] = ()
    plugins: tuple[Path, ...] = ()
    workspace_mib: int | None = None
    builder_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    refit: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError(
                f"the workspace of {self.workspace_mib} MiB is too small. Give at least 1, or leave it out."
            )
        if self.builder_level is not None and self.builder_level not in BUILDER_LEVELS:
            raise UserError(
                f"the builder level {self.builder_level} does not exist. Levels are 0 (quick) to 5 (thorough)."
            )
        if self.hardware_compatible is not None and self.hardware_compatible not in COMPATIBILITIES:
            raise UserError(
                f"the hardware compatibility {self.hardware_compatible!r} does not exist. "
                f"Choose {' or '.join(COMPATIBILITIES)}."
            )
        for library in self.plugins:
            if not library.exists():
                raise UserError(f"the plugin library {library} does not exist. Check the path.")

    def require(self, tensorrt: tuple[int, int]) -> None:
        """Check that a TensorRT version knows what was chosen.

        Raises:
            UserError: it does not, or it is older than strongly typed networks.
        """
        if tensorrt < (10, 0):
            raise UserError(
                f"TensorRT {_dotted(tensorrt)} has no strongly typed networks, so it could choose another precision "
                "than the graph's. Use TensorRT 10.0 or later (JetPack 6.1 or later)."
            )
        chosen = self.hardware_compatible
        if chosen is not None and tensorrt < COMPATIBILITIES[chosen].since:
            raise UserError(
                f"the hardware compatibility {chosen!r} needs TensorRT {_dotted(COMPATIBILITIES[chosen].since)}, and "
                f"this is {_dotted(tensorrt)}. Leave it out."
            )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
