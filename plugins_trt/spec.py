"""`PluginSpec`: the single declaration of an operation that a TensorRT plugin may run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeattn.foundation import UserError

DOMAIN = "edgeattn"
"""ONNX domain, plugin namespace and torch library namespace of every operation."""

PLUGIN_VERSION = "1"
"""`plugin_version` that TensorRT's parser looks the creator up with."""

ELEMENT_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Data types that kernels take, by torch's name, with the size of one element."""

LAYOUTS = ("linear", "channels-last")
"""Memory layouts of 4-D tensors, (batch, channels, height, width) and (batch, height, width, channels). Tensors of any
other rank, and workspaces, are always linear."""

LARGEST_IMAGE = 2**31 - 1
"""Elements that one image of an input or output may have: kernels index inside an image with 32 bits."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: field name of the tensor.
        shape: one symbol per axis, such as `("batch", "channels", "height", "width")`; equal symbols are equal sizes.
    """

    name: str
    shape: tuple[str, ...]

    @property
    def follows_layout(self) -> bool:
        """Whether the tensor is a map, which may come channels-last."""
        return len(self.shape) == 4


@dataclass(frozen=True)
class Workspace:
    """A buffer between launches, dense and in the order of its shape.

    Attributes:
        name: field name of the buffer.
        shape: expressions over the sizes and the tiling's constants.
        element: "float32", or "data" for the type of the operation's tensors.
    """

    name: str
    shape: tuple[str, ...]
    element: str


@dataclass(frozen=True)
class Tiling:
    """How an operation is cut into programs, for some GPUs, data types and layouts.

    Attributes:
        constants: compile-time constants that all launches share, such as tile sizes, by name.
        warps: warps per program, by launch.
        stages: software pipeline stages, by launch.
        elements: data types it is for.
        layouts: layouts it is for.
        sms: CUDA architectures it is for; all when None.
    """

    constants: Mapping[str, int]
    warps: Mapping[str, int]
    stages: Mapping[str, int]
    elements: tuple[str, ...] = tuple(ELEMENT_BYTES)
    layouts: tuple[str, ...] = LAYOUTS
    sms: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    The kernel's parameters are, in this order: `reads`, `scalars` (int32), `writes`, then the compile-time constants by
    name. TensorRT's Python plugins prescribe the order.

    Attributes:
        name: unique within the operation.
        kernel: the Triton kernel as `module:function`.
        reads: names of inputs and workspaces.
        scalars: expressions over the sizes.
        writes: names of outputs and workspaces.
        grid: programs along x, y and z, as expressions over sizes and constants. y and z must stay below 65536.
        constants: the kernel's compile-time parameters, as expressions over static sizes and the tiling's constants.
            The layout is passed besides, as `CHANNELS_LAST`.
    """

    name: str
    kernel: str
    reads: tuple[str, ...]
    scalars: tuple[str, ...]
    writes: tuple[str, ...]
    grid: tuple[str, str, str]
    constants: Mapping[str, str]


@dataclass(frozen=True)
class PluginSpec:
    """An operation of domain `edgeattn`: signature, mathematics in standard operators, and the kernels that run it.

    The body is ONNX text (see `onnx.parser`) over the plain names of the signature. Two pseudo-operations mark the
    region that has to stay in FP32 when the rest of the graph runs in FP16: `Widen(x)` enters the region and
    `Narrow(x, like)` leaves it, back to the type of `like`. In an FP32 body both disappear.

    Attributes:
        name: unique name of the declaration.
        op_type: operator name in ONNX, TensorRT and torch; declarations that differ in optional inputs share it.
        inputs: input tensors; all have one floating-point type.
        outputs: output tensors, of the same type. Their sizes are sizes of inputs.
        body: the statements between the braces of an ONNX function.
        summary: the mathematics in one line.
        static: sizes that are compiled into the kernels.
        presets: values of the static sizes that published models use, compiled by default.
        workspaces: buffers between launches.
        launches: the kernels, in order; empty where no kernel exists yet.
        tilings: the first that fits a GPU, type and static sizes is used.
        flops: floating-point operations of the mathematics, as an expression over the sizes.
    """

    name: str
    op_type: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    body: str
    summary: str
    static: tuple[str, ...] = ()
    presets: tuple[Mapping[str, int], ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    launches: tuple[Launch, ...] = ()
    tilings: tuple[Tiling, ...] = field(default=(), repr=False)
    flops: str = "0"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def prefix(self) -> str:
        """Prefix of every tensor name inside the body.

        TensorRT's parser binds a formal name to an outer tensor of the same name, so formals have to be unique in any
        graph they may meet.
        """
        return f"__{DOMAIN}_{self.name}_"

    @property
    def has_maps(self) -> bool:
        """Whether any input or output may come channels-last; otherwise all kernels are linear."""
        return any(tensor.follows_layout for tensor in (*self.inputs, *self.outputs))

    def sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the size of every symbol from the shapes of the inputs.

        Args:
            shapes: shape of every input, by name.

        Raises:
            UserError: a shape of another rank, or two sizes for one symbol.
        """
        sizes: dict[str, int] = {"1": 1}
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if len(shape) != len(tensor.shape):
                raise UserError(
                    f"{self.op_type}: {tensor.name} has shape {tuple(shape)}, but needs {len(tensor.shape)} axes: "
                    f"({', '.join(tensor.shape)})."
                )
            for symbol, size in zip(tensor.shape, shape, strict=True):
                if sizes.setdefault(symbol, size) != size:
                    raise UserError(
                        f"{self.op_type}: {symbol} is {size} in {tensor.name} {tuple(shape)}, but {sizes[symbol]} "
                        "in an earlier input. Give all inputs the same."
                    )
        del sizes["1"]
        return sizes

    def shape_of(self, tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of an input or output for given sizes."""
        return tuple(1 if symbol == "1" else sizes[symbol] for symbol in tensor.shape)

    def tiling(self, sm: int, element: str, layout: str) -> Tiling:
        """Return the tiling for a GPU architecture, data type and layout.

        Args:
            sm: CUDA architecture, such as 87.
            element: data type, one of `ELEMENT_BYTES`.
            layout: layout of the 4-D tensors, one of `LAYOUTS`.

        Raises:
            UserError: none fits; the message says for which combination.
        """
        for tiling in self.tilings:
            if element in tiling.elements and layout in tiling.layouts and (tiling.sms is None or sm in tiling.sms):
                return tiling
        raise UserError(
            f"{self.name} has no kernel for {element}, layout {layout}, on sm_{sm}. Use the model's plain form, which "
            "needs no plugin."
        )
