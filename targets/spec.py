"""`Target`: the software a model is exported for."""

from __future__ import annotations

from dataclasses import dataclass

from edgeattn.foundation import Registry


@dataclass(frozen=True)
class Target:
    """A deployment target.

    Attributes:
        name: unique name.
        summary: what it is, in words.
        tensorrt: TensorRT version (major, minor).
        cuda: CUDA version (major, minor).
        sm: CUDA architecture, such as 87.
        opset: version of the standard ONNX operators that exports for it use.
        source: where the versions come from.
    """

    name: str
    summary: str
    tensorrt: tuple[int, int]
    cuda: tuple[int, int]
    sm: int
    opset: int
    source: str

    @property
    def takes_function_bodies(self) -> bool:
        """Whether the parser prefers a registered plugin over a local function of the same name.

        Up to TensorRT 10.6 the function body always wins, so plugin nodes must come without one.
        """
        return self.tensorrt >= (10, 7)


TARGETS: Registry[Target] = Registry("target")
