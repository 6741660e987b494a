"""What the table of targets is made of: `Target`, `Sm`, and the parts that targets are combined from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sm:
    """A CUDA architecture.

    Attributes:
        number: compute capability without the dot, such as 87.
        name: what it is, in words.
        minimum_ptx_isa: oldest PTX ISA that names the architecture, such as 74 for 7.4.
        shared_memory_kib: most shared memory one thread block may use, in KiB (by opt-in).
        source: where the figures come from.
        unverified: which of the figures nobody has confirmed.
    """

    number: int
    name: str
    minimum_ptx_isa: int
    shared_memory_kib: int
    source: str
    unverified: frozenset[str] = frozenset()

    @property
    def shared_memory_bytes(self) -> int:
        """Most shared memory one thread block may use, in bytes (by opt-in)."""
        return 1024 * self.shared_memory_kib


@dataclass(frozen=True)
class Software:
    """A software stack, such as a JetPack release or a TensorRT release for discrete GPUs.

    Attributes:
        name: unique name, with which the names of its targets begin.
        summary: what it is, in words.
        tensorrt: TensorRT version, as far as it is known, such as "10.3.0.30".
        cuda: CUDA version (major, minor).
        opset: version of the standard ONNX operators that exports for it use.
        hardware: names of the hardware it runs on; a family stands for all its members.
        cudnn: cuDNN version, if known.
        python: Python version or range of versions, if known.
        aliases: other names.
        sources: where each figure comes from.
        unverified: figures that nobody has confirmed, of this stack or of hardware under it.
    """

    name: str
    summary: str
    tensorrt: str
    cuda: tuple[int, int]
    opset: int
    hardware: tuple[str, ...]
    cudnn: str | None = None
    python: str | None = None
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    unverified: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Hardware:
    """A module, a discrete GPU, or a family of them, of which only the common figures are known.

    Attributes:
        name: unique name, with which the names of its targets end.
        summary: what it is, in words.
        sm: CUDA architecture, such as 87.
        family: name of the family it belongs to; None for a family.
        software: names of the software stacks that run on it; when empty, all that name it or its family.
        aliases: other names.
        dla_cores, memory_gib, bandwidth_gb_s, int8_tops, fp16_tflops: see `Target`.
        shared_memory_kib: limit where it is not that of the architecture.
        sources: where each figure comes from.
        unverified: figures that nobody has confirmed.
    """

    name: str
    summary: str
    sm: int
    family: str | None = None
    software: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    dla_cores: int | None = None
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    int8_tops: float | None = None
    fp16_tflops: float | None = None
    shared_memory_kib: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    unverified: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unsupported:
    """Software that nothing is exported for.

    Attributes:
        name: unique name.
        summary: what it is, and what it holds.
        names: names of targets it answers for, together with everything that continues them after a "." or "-".
        reason: why it is not supported.
        instead: what to do instead.
        source: where that comes from.
    """

    name: str
    summary: str
    names: tuple[str, ...]
    reason: str
    instead: str
    source: str


@dataclass(frozen=True)
class Target:
    """A deployment target: a software stack on hardware.

    Attributes:
        name: unique name.
        summary: what it is, in words.
        tensorrt: TensorRT version (major, minor).
        tensorrt_full: TensorRT version as far as it is known, such as "10.3.0.30".
        cuda: CUDA version (major, minor).
        sm: CUDA architecture, such as 87.
        ptx_isa: newest PTX ISA that the driver of its CUDA takes, such as 85 for 8.5.
        shared_memory_kib: most shared memory one thread block may use, in KiB (by opt-in).
        opset: version of the standard ONNX operators that exports for it use.
        cudnn: cuDNN version; None when unknown.
        python: Python version or range of versions; None when unknown.
        dla_cores: cores of the deep learning accelerator; None when modules of the family differ.
        memory_gib: memory as its maker states it; on Jetson the CPU shares it. None when modules of the family differ.
        bandwidth_gb_s: peak memory bandwidth in 10^9 bytes per second; None likewise.
        int8_tops: peak of the GPU's tensor cores for dense INT8, in 10^12 operations per second; None likewise.
        fp16_tflops: peak for dense FP16 with FP32 accumulation, in 10^12 operations per second; None likewise.
        software: name of its software stack; None for a target that was declared whole.
        hardware: name of its hardware; None likewise.
        sources: where each figure comes from, by attribute.
        unverified: attributes whose figure nobody has confirmed.
    """

    name: str
    summary: str
    tensorrt: tuple[int, int]
    tensorrt_full: str
    cuda: tuple[int, int]
    sm: int
    ptx_isa: int
    shared_memory_kib: int
    opset: int
    cudnn: str | None = None
    python: str | None = None
    dla_cores: int | None = None
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    int8_tops: float | None = None
    fp16_tflops: float | None = None
    software: str | None = None
    hardware: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    unverified: frozenset[str] = frozenset()

    @property
    def takes_function_bodies(self) -> bool:
        """Whether the parser prefers a registered plugin over a local function of the same name.

        Up to TensorRT 10.6 the function body always wins, so plugin nodes must come without one.
        """
        return self.tensorrt >= (10, 7)

    @property
    def takes_python_plugins(self) -> bool:
        """Whether TensorRT's ahead-of-time Python plugins are usable (10.9 has them, 10.14 breaks them)."""
        return self.tensorrt >= (10, 15)
