"""Element types of the tensors of a graph, and what each operator allows in each place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN


@dataclass(frozen=True)
class ReducedType:
    """A floating-point type of 16 bits.

    Attributes:
        label: as users call it.
        suffix: in names of tensors and files.
        dtype: in graphs.
        numpy: in arrays.
        limit: largest finite number.
        smallest: smallest number above zero.
        unit: largest relative change of a number in its range that is rounded to it.
        integers: up to this all integers are exact.
        opset: first version of the standard operators whose convolutions, pools and norms take it.
        qdq_opset: first version whose QuantizeLinear and DequantizeLinear take scales of it.
    """

    label: str
    suffix: str
    dtype: ir.DataType
    numpy: np.dtype
    limit: float
    smallest: float
    unit: float
    integers: int
    opset: int
    qdq_opset: int

    @property
    def loss(self) -> float:
        """Relative change that a scalar, or a whole tensor, may take when rounded: four units.

        For FP16 that is half of INT8's own rounding.
        """
        return 4 * self.unit

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """Return numbers as this type holds them; what is too large becomes infinite."""
        with np.errstate(over="ignore"):
            return array.astype(self.numpy)


FP16 = ReducedType(
    label="FP16",
    suffix="fp16",
    dtype=ir.DataType.FLOAT16,
    numpy=np.dtype(np.float16),
    limit=65504.0,
    smallest=2.0**-24,
    unit=2.0**-11,
    integers=2048,
    opset=1,
    qdq_opset=19,
)
BF16 = ReducedType(
    label="BF16",
    suffix="bf16",
    dtype=ir.DataType.BFLOAT16,
    numpy=ir.DataType.BFLOAT16.numpy(),
    limit=(2 - 2.0**-7) * 2.0**127,
    smallest=2.0**-133,
    unit=2.0**-8,
    integers=256,
    opset=22,
    qdq_opset=19,
)
REDUCED_TYPES = {kind.dtype: kind for kind in (FP16, BF16)}
"""The reduced types by their name in graphs."""

_FLOAT = ir.DataType.FLOAT


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type (`TensorProto.DataType`) of every tensor of the main graph whose type is known.

    Types come from the graph's own records and from shape inference, which looks into local functions. Shapes that
    inference would add are not used anywhere: invented symbolic sizes make ONNX Runtime reject correct graphs.

    Raises:
        UserError: inference finds that operators and types do not fit.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise UserError(
            f"the ONNX model has inconsistent types or shapes: {str(error).strip()}. Check it with "
            "onnx.checker.check_model(model, full_check=True) and export it again."
        ) from error
    graph = inferred.graph
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in (*graph.value_info, *graph.input, *graph.output)
        if info.type.HasField("tensor_type")
    }
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    for node in graph.node:  # a plugin node without its function body: outputs have the inputs' type
        if node.domain == DOMAIN and node.input[0] in types:
            for name in node.output:
                types.setdefault(name, types[node.input[0]])
    return types


def write_types(model: ir.Model, types: dict[str, int]) -> None:
    """Give every value of the main graph that has no type yet its element type (and no shape)."""
    for value in graph_values(model.graph):
        if value.type is None and types.get(value.name or "", 0):
            value.type = ir.TensorType(ir.DataType(types[value.name or ""]))


def graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield inputs, initializers and node outputs of a graph, without those of its subgraphs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def check_types(model: onnx.ModelProto) -> None:
    """Check structure, names, order, operators and the element types of every operator's inputs and outputs.

    Raises:
        onnx.checker.ValidationError: the structure is wrong.
        onnx.shape_inference.InferenceError: types or shapes do not fit.
    """
    onnx.checker.check_model(model, full_check=True)


def allows_half(node: ir.Node, index: int, opset: int, *, output: bool, kind: ReducedType = FP16) -> bool:
    """Say whether a reduced type is legal for one floating-point input or output of an operator.

    Operators of domain `edgeattn` take one floating-point type throughout; other operators without a schema are
    unknown and allow nothing. An input fixed to float, such as the scales of Resize, stays float.
    """
    if node.domain == DOMAIN:
        return True
    schema = _schema(node, opset)
    if schema is None:
        return False
    formals = schema.outputs if output else schema.inputs
    formal = formals[min(index, len(formals) - 1)]
    allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    return f"tensor({kind.dtype.name.lower()})" in allowed.get(formal.type_str, [formal.type_str])


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of an initializer, or None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def constant_defect(array: np.ndarray, kind: ReducedType = FP16) -> str | None:
    """Say why a reduced type cannot hold a constant, or None when it can.

    Infinities are legal. A tensor is refused when a finite number overflows or when every non-zero number vanishes; a
    single number also when rounding changes it by more than the type's `loss`.
    """
    # Rounding keeps the order of magnitudes, so that the largest finite one decides for all.
    exact = _largest(array)
    rounded = float(kind.rounded(np.asarray(exact, array.dtype)))
    if np.isinf(rounded):
        return f"{exact:g} exceeds {kind.limit:g}"
    if exact and not rounded:
        return f"{abs(exact):g} vanishes"
    if array.size == 1 and abs(rounded - exact) > kind.loss * abs(exact):
        return f"{exact:g} becomes {rounded:g}"
    return None


def _largest(array: np.ndarray) -> float:
    """Return the finite number of the largest magnitude; 0 where there is none."""
    if array.size == 0:
        return 0.0
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        return _largest(array[np.isfinite(array)])
    return low if -low > high else high


def vanishing_count(array: np.ndarray, kind: ReducedType = FP16) -> int:
    """Return how many non-zero numbers become zero in a reduced type."""
    small = array[np.abs(array) < kind.smallest]
    return int(np.count_nonzero((small != 0) & (kind.rounded(small) == 0)))


def is_float(value: ir.Value | None) -> bool:
    """Say whether a value is an FP32 tensor."""
    return value is not None and value.dtype == _FLOAT


def has_half(types: dict[str, int]) -> bool:
    """Say whether any tensor already has a reduced floating-point type."""
    return any(kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for kind in types.values())
