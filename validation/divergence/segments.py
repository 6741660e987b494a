"""A form's graph cut at chosen tensors: each piece runs alone, on whatever inputs it is given."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnxruntime

from edgeattn.export.emulation import emulate_fp16
from edgeattn.validation.divergence.scopes import ScopedGraph
from edgeattn.validation.runners import RUNTIME_ERRORS

Arrays = Mapping[str, np.ndarray]

_ROUNDED = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}
"""Types that an emulated graph rounds to, the coarsest first."""


def session_of(model: onnx.ModelProto, *, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session that computes a graph as its nodes say, on ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Fused into integer kernels, Q/DQ with FP16 scales drift from what the nodes say.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, eq=False)
class Segment:
    """The nodes that lead from some tensors of a graph to one other.

    Attributes:
        inputs: tensors that it starts from: chosen ones, and inputs of the graph.
        output: tensor that it computes.
        modules: innermost torch modules of its nodes, in order; `""` for what belongs to the network itself.
        owner: the module of the node that computes the output.
        model: the nodes as a model of their own.
    """

    inputs: tuple[str, ...]
    output: str
    modules: tuple[str, ...]
    owner: str
    model: onnx.ModelProto

    @cached_property
    def digest(self) -> str:
        """What tells segments apart that compute different things."""
        return hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()

    @cached_property
    def precision(self) -> str:
        """The coarsest type that a tensor is rounded to in it: "bf16", "fp16", or "fp32" for no other."""
        targets = {
            entry.i
            for node in self.model.graph.node
            if node.op_type == "Cast"
            for entry in node.attribute
            if entry.name == "to"
        }
        return next((name for name, target in _ROUNDED.items() if target in targets), "fp32")


class Dissection:
    """A graph that runs in segments.

    Args:
        model: the form; FP16 and BF16 are emulated with rounding after every operation.
        reduced: the form has FP16 or BF16 tensors.

    Attributes:
        model: what is run: the form itself or its emulation, with the same names of tensors.
        shapes: of its tensors where they are known, 0 where a size is not.
    """

    def __init__(self, model: onnx.ModelProto, *, reduced: bool) -> None:
        self.model = emulate_fp16(model) if reduced else model
        graph = self.model.graph
        self._types, self.shapes = _types_and_shapes(self.model)
        self._scoped = ScopedGraph(self.model)
        self._producer = self._scoped.producer
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs = [value.name for value in graph.input if value.name not in self._initializers]

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor exists and holds FP32 numbers (FP16 and BF16 ones have become FP32)."""
        return self._types.get(tensor) == onnx.TensorProto.FLOAT

    def position(self, tensor: str) -> int:
        """Return the place of a tensor's node in the order of computation; -1 for an input."""
        return self._producer.get(tensor, -1)

    def leads(self, start: str, end: str) -> bool:
        """Return whether a tensor is computed from another."""
        if end not in self._producer:
            return False
        return start in self._between(end, {start})[1]

    def cut(self, tensors: Collection[str]) -> list[Segment]:
        """Return the segment that ends in each of these tensors, in the order of computation."""
        stops = {*tensors, *self._inputs}
        ordered = sorted((name for name in tensors if name in self._producer), key=self.position)
        return [self._segment(name, stops) for name in ordered]

    def _segment(self, output: str, stops: Collection[str]) -> Segment:
        nodes, starts, constants = self._between(output, stops)
        graph = self.model.graph
        model = onnx.ModelProto(ir_version=self.model.ir_version)
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(
            function
            for function in self.model.functions
            if any(graph.node[index].domain == function.domain for index in nodes)
        )
        model.graph.name = "segment"
        model.graph.node.extend(graph.node[index] for index in nodes)
        model.graph.initializer.extend(self._initializers[name] for name in constants)
        model.graph.input.extend(self._value(name) for name in starts)
        model.graph.output.append(self._value(output))
        modules = dict.fromkeys(self._scoped.owner(index) for index in nodes)
        owner = self._scoped.owner(nodes[-1])
        return Segment(tuple(starts), output, tuple(modules), owner, model)

    def _between(self, output: str, stops: Collection[str]) -> tuple[list[int], list[str], list[str]]:
        """Return the nodes before a tensor up to the stops, the stops that are reached, and the constants read."""
        nodes: set[int] = set()
        starts: dict[str, None] = {}
        constants: dict[str, None] = {}
        pending = [self._producer[output]]
        while pending:
            index = pending.pop()
            if index in nodes:
                continue
            nodes.add(index)
            for name in _reads(self.model.graph.node[index]):
                if name in stops:
                    starts[name] = None
                elif name in self._initializers:
                    constants[name] = None
                elif name in self._producer:
                    pending.append(self._producer[name])
        return sorted(nodes), sorted(starts, key=self.position), list(constants)

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, self._types[name], None)


def _types_and_shapes(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Return the element type and shape of every tensor that can be told; a damaged graph may be inconsistent."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types, shapes = {}, {}
    for value in (*model.graph.value_info, *graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return types, shapes


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads, also from inside the bodies of control flow."""
    yield from node.input
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in body.node:
                yield from _reads(inner)


class SegmentError(Exception):
    """ONNX Runtime cannot run a segment, for the reason in the message."""


class Sessions:
    """Sessions by what they compute, so that a segment that several forms share is prepared once.

    Args:
        threads: ONNX Runtime's threads within an operation.

    Attributes:
        rounding: what the rounding of a segment explains, with its derivation, by the segment's digest.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.rounding: dict[str, tuple[float, str]] = {}
        self._made: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, segment: Segment, given: Arrays) -> np.ndarray:
        """Compute a segment's output from arrays that hold at least its inputs.

        Raises:
            SegmentError: ONNX Runtime cannot run it.
        """
        return self.run_all(segment, given)[0]

    def run_all(self, segment: Segment, given: Arrays) -> list[np.ndarray]:
        """Compute every output of a segment's model.

        Raises:
            SegmentError: ONNX Runtime cannot run it.
        """
        try:
            if segment.digest not in self._made:
                self._made[segment.digest] = session_of(segment.model, threads=self.threads)
            session = self._made[segment.digest]
            results: list[np.ndarray] = session.run(None, {name: given[name] for name in segment.inputs})
        except RUNTIME_ERRORS as error:
            raise SegmentError(str(error)) from error
        return results


class Walk:
    """Values of one form while its segments run in order; what no later segment reads is dropped.

    Args:
        segments: in the order of computation.
        kept: tensors that are never dropped.
    """

    def __init__(self, segments: Sequence[Segment], kept: Collection[str] = ()) -> None:
        self._left = Counter(name for segment in segments for name in (*segment.inputs, segment.output))
        self._kept = set(kept)
        self.values: dict[str, np.ndarray] = {}
        self.peak_bytes = 0

    def put(self, name: str, array: np.ndarray) -> None:
        """Add a value, unless nothing needs it."""
        if self._left[name] or name in self._kept:
            self.values[name] = array
            self.peak_bytes = max(self.peak_bytes, sum(value.nbytes for value in self.values.values()))

    def finish(self, segment: Segment) -> None:
        """Count a segment as done."""
        for name in (*segment.inputs, segment.output):
            self._left[name] -= 1
            if self._left[name] <= 0 and name not in self._kept:
                self.values.pop(name, None)
