"""What a recognised core is made of, and how the plugin node that stands for it is wired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from edgeattn.export.rewrite.trace import Matrix, Source
from edgeattn.plugins_trt import DOMAIN, PLUGIN_VERSION, PluginSpec


class Mismatch(Exception):  # noqa: N818 - it is an answer, not a defect
    """An attention that is almost a known core; the message says what is different."""


@dataclass(frozen=True)
class Factor:
    """A number that multiplies (`Mul`) or divides (`Div`) the attended values, such as CCNet's gamma."""

    operator: str
    tensor: gs.Tensor


@dataclass(frozen=True)
class Feed:
    """One input of a plugin: a feature map, brought to (batch, channels, height, width).

    Attributes:
        source: the map and the meaning of its axes.
        reference: where the positions of `source` are flattened, a four-axis map of the same height and width.
        matrix: constant matrix that maps the channels of the map.
        scale: constant factor.
        factors: factors that the graph applies to the result, and that are moved here because attention is linear.
    """

    source: Source
    reference: Source | None = None
    matrix: Matrix | None = None
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()

    @property
    def tensors(self) -> Iterable[gs.Tensor]:
        """Yield the graph tensors that the feed reads."""
        yield self.source.tensor
        if self.reference is not None:
            yield self.reference.tensor
        if self.matrix is not None:
            yield self.matrix.tensor
        yield from (factor.tensor for factor in self.factors)

    @property
    def operators(self) -> list[str]:
        """Operators of the factors, in order."""
        return [factor.operator for factor in self.factors]

    @property
    def flips(self) -> bool:
        """Whether the matrix has to be transposed to be a convolution's weight."""
        return self.matrix is not None and not self.matrix.output_first

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes (batch, channels, height, width) in the trial."""
        sizes = self.source.shape
        spatial = self.reference.positions if self.reference is not None else self.source.positions
        return (sizes[0], sizes[self.source.channel], *spatial)


@dataclass(frozen=True)
class Result:
    """One output of a plugin and the tensor of the graph that it replaces.

    Attributes:
        tensor: tensor to replace.
        flat: the tensor is (batch, channels, positions).
    """

    tensor: gs.Tensor
    flat: bool = False


@dataclass(frozen=True)
class Candidate:
    """A core found by structure, to be verified by numbers.

    Attributes:
        spec: operation that may replace it.
        feeds: its inputs in the operation's order, without a gate.
        results: its outputs, in the operation's order.
        core: the nodes that do the work: products and softmax first, the node that yields the last result last.
        attention: for criss-cross attention, its attention tensors by direction.
        residual: what the graph adds to the result, if the operation adds one.
        gate: weight (1, channels) and bias (1) of the gate, if the operation has one.
        notes: facts about the graph that explain a refusal, most telling first.
    """

    spec: PluginSpec
    feeds: tuple[Feed, ...]
    results: tuple[Result, ...]
    core: tuple[gs.Node, ...]
    attention: dict[str, gs.Tensor] = field(default_factory=dict)
    residual: gs.Tensor | None = None
    gate: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()

    @property
    def softmax(self) -> gs.Node:
        """The node that names the core's place in the network."""
        return next(node for node in self.core if node.op == "Softmax")

    @property
    def inputs(self) -> list[gs.Tensor]:
        """The graph tensors that the core reads, each once."""
        tensors = [tensor for feed in self.feeds for tensor in feed.tensors]
        if self.residual is not None:
            tensors.append(self.residual)
        return list({tensor.name: tensor for tensor in tensors}.values())

    def swapped(self) -> Candidate:
        """Return the same core with query and key exchanged."""
        query, key, *others = self.feeds
        return replace(self, feeds=(key, query, *others))


@dataclass
class Snippet:
    """The nodes and constants that replace a core."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, operator: str, inputs: Sequence[str], step: str, **attributes: Any) -> str:
        """Append a node of one output and return the output's name."""
        name = f"{self.prefix}/{step}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: np.ndarray | np.generic, step: str) -> str:
        """Add a constant and return its name."""
        name = f"{self.prefix}/{step}"
        self.constants[name] = np.asarray(value)
        return name

    def initializers(self) -> list[onnx.TensorProto]:
        """Return the constants as ONNX tensors."""
        return [numpy_helper.from_array(value, name) for name, value in self.constants.items()]


def build(candidate: Candidate, prefix: str, *, static: bool) -> Snippet:
    """Write the replacement of a core.

    Args:
        candidate: the core.
        prefix: start of every new name; the plugin node itself is called `<prefix>/<operation>`.
        static: sizes are fixed, so flattened positions are restored with constants.

    Returns:
        Nodes in topological order; the plugin node is the one of domain `edgeattn`.
    """
    snippet = Snippet(prefix)
    names = [tensor.name for tensor in candidate.spec.inputs]
    inputs = [_feed(snippet, feed, role, static) for feed, role in zip(candidate.feeds, names, strict=False)]
    if "residual" in names:
        inputs.append(candidate.residual.name if candidate.residual is not None else _zeros(snippet, inputs[-1]))
    if candidate.gate is not None:
        inputs += [snippet.constant(value, role) for value, role in zip(candidate.gate, names[-2:], strict=True)]
    name = f"{prefix}/{candidate.spec.op_type}"
    outputs = [
        f"{prefix}/{tensor.name}" if result.flat else result.tensor.name
        for result, tensor in zip(candidate.results, candidate.spec.outputs, strict=True)
    ]
    node = helper.make_node(candidate.spec.op_type, inputs, outputs, name=name, domain=DOMAIN)
    node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
    node.attribute.append(helper.make_attribute("plugin_version", PLUGIN_VERSION))
    snippet.nodes.append(node)
    for result, output in zip(candidate.results, outputs, strict=True):
        if result.flat:
            flat = snippet.constant(np.array([0, 0, -1], dtype=np.int64), f"{output.rpartition('/')[2]}_flat_shape")
            last = f"{output}_flat"
            snippet.nodes.append(helper.make_node("Reshape", [output, flat], [result.tensor.name], name=last))
    return snippet


def _feed(snippet: Snippet, feed: Feed, role: str, static: bool) -> str:
    """Bring one input to (batch, channels, height, width), scaled."""
    source = feed.source
    order = [0, source.channel, *source.spatial]
    name = source.tensor.name
    if order != sorted(order):
        name = snippet.add("Transpose", [name], f"{role}_channels_first", perm=order)
    if feed.reference is not None:
        name = snippet.add("Reshape", [name, _map_shape(snippet, feed.reference, role, static)], f"{role}_map")
    if feed.matrix is not None:
        name = snippet.add("Conv", [name, _weight(snippet, feed.matrix, role)], f"{role}_mapped")
    if feed.scale != 1.0:
        name = snippet.add("Mul", [name, snippet.constant(np.float32(feed.scale), f"{role}_scale")], f"{role}_scaled")
    for index, factor in enumerate(feed.factors):
        name = snippet.add(factor.operator, [name, factor.tensor.name], f"{role}_times_{index}")
    return name


def _map_shape(snippet: Snippet, reference: Source, role: str, static: bool) -> str:
    """Return the name of the shape (0, 0, height, width), where 0 keeps a size."""
    if static:
        return snippet.constant(np.array([0, 0, *reference.positions], dtype=np.int64), f"{role}_map_shape")
    zeros = snippet.constant(np.zeros(2, dtype=np.int64), f"{role}_keep")
    size = snippet.add("Shape", [reference.tensor.name], f"{role}_size", start=2, end=4)
    return snippet.add("Concat", [zeros, size], f"{role}_map_shape", axis=0)


def _weight(snippet: Snippet, matrix: Matrix, role: str) -> str:
    """Return the name of a matrix as the weight (outputs, inputs, 1, 1) of a convolution."""
    name = matrix.tensor.name
    if not matrix.output_first:
        name = snippet.add("Transpose", [name], f"{role}_matrix", perm=[1, 0])
    axes = snippet.constant(np.array([2, 3], dtype=np.int64), f"{role}_kernel_axes")
    return snippet.add("Unsqueeze", [name, axes], f"{role}_weight")


def _zeros(snippet: Snippet, like: str) -> str:
    """Return zeros of the size of `like`: the residual of a graph that adds none."""
    size = snippet.add("Shape", [like], "residual_size")
    return snippet.add("Expand", [snippet.constant(np.zeros(1, dtype=np.float32), "zero"), size], "residual")
