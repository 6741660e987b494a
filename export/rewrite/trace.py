"""Reading attention off a graph: products of two activations, and what their axes mean in the tensors they come from.

An exporter may write one product in many ways, but between the feature map and the product there is only
rearrangement. So an element of the product's operand can be followed back, index by index, to an element of the map;
following the last index of an axis tells which axes of the map that axis runs along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from edgeattn.export.rewrite.sizes import Sizes

RESHAPES = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
REARRANGES = RESHAPES | {"Transpose", "Identity", "Cast"}
_SHAPE_ONLY = {"Shape", "Size", "EyeLike"}
_RANDOM = {"RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Bernoulli", "Multinomial"}


@dataclass(frozen=True)
class Matrix:
    """A constant matrix in the middle of a product, which maps the channels of one operand to those of the other.

    Attributes:
        tensor: the matrix.
        output_first: its first axis belongs to the other operand.
    """

    tensor: gs.Tensor
    output_first: bool


@dataclass(frozen=True)
class Operand:
    """One operand of a product.

    Attributes:
        tensor: the operand.
        free: axes that the result has and the other operand has not.
        contracted: axes that are summed over.
        matrix: what the operand is multiplied with first.
    """

    tensor: gs.Tensor
    free: tuple[int, ...]
    contracted: tuple[int, ...]
    matrix: Matrix | None = None


@dataclass(frozen=True)
class Product:
    """A MatMul or Einsum of two activations, perhaps with a constant matrix between them."""

    node: gs.Node
    operands: tuple[Operand, Operand]


@dataclass(frozen=True)
class Source:
    """The feature map that an operand is a rearrangement of.

    Attributes:
        tensor: the map, (batch, channels, height, width) or with its axes in another order, or with the positions
            flattened into one axis.
        shape: its sizes in the trial.
        channel: the axis of the channels.
        along: the axes that the positions of the product run along.
    """

    tensor: gs.Tensor
    shape: tuple[int, ...]
    channel: int
    along: frozenset[int]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Axes of the positions, in order: height and width, or the single flattened axis."""
        return tuple(axis for axis in range(1, len(self.shape)) if axis != self.channel)

    @property
    def direction(self) -> str:
        """`column` or `row` where the product runs along one of two spatial axes, `all` along all, else `""`."""
        real = frozenset(axis for axis in self.spatial if self.shape[axis] > 1)
        if self.along == real:
            return "all"
        names = dict(zip(self.spatial, ("column", "row"), strict=False))
        return names.get(next(iter(self.along)), "") if len(self.along) == 1 else ""

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(self.shape[axis] for axis in self.spatial)


class Tracer:
    """Follows tensors through a graph in both directions.

    Args:
        graph: graph in topological order.
        sizes: sizes of its tensors.
    """

    def __init__(self, graph: gs.Graph, sizes: Sizes) -> None:
        self.graph = graph
        self.sizes = sizes
        self.outputs = {tensor.name for tensor in graph.outputs}

    @cached_property
    def _data_dependent(self) -> set[str]:
        """Names of the tensors whose values (not only their shapes) depend on the input data."""
        found = {tensor.name for tensor in self.graph.inputs}
        for node in self.graph.nodes:
            inputs = node.inputs[:1] if node.op == "CastLike" else node.inputs
            reads = any(tensor.name in found for tensor in inputs) and node.op not in _SHAPE_ONLY
            if reads or node.op in _RANDOM or any(True for _ in node.subgraphs()):
                found.update(tensor.name for tensor in node.outputs)
        return found

    def is_data(self, tensor: gs.Tensor) -> bool:
        """Tell whether a tensor's value depends on the input data; masks and shapes do not."""
        return tensor.name in self._data_dependent

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Return the nodes that read a tensor's values; those that ask for its shape do not count."""
        return [node for node in tensor.outputs if node.op not in _SHAPE_ONLY]

    def factor(self, tensor: gs.Tensor) -> float | None:
        """Return the value of a tensor that is one known number."""
        value = self.sizes.values.get(tensor.name)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def is_scalar(self, tensor: gs.Tensor) -> bool:
        """Tell whether a tensor is one constant number."""
        shape = self.sizes.shapes.get(tensor.name)
        return shape is not None and all(size == 1 for size in shape) and not self.is_data(tensor)

    def is_layout(self, node: gs.Node) -> bool:
        """Tell whether a node only rearranges its first input."""
        if node.domain or node.op not in REARRANGES:
            return False
        if node.op != "Cast":
            return True
        types = [self.sizes.element_types.get(tensor.name) for tensor in (node.inputs[0], node.outputs[0])]
        return types[0] == types[1]

    def product(self, node: gs.Node) -> Product | None:
        """Read a node as a product of two activations."""
        data = [self.is_data(tensor) for tensor in node.inputs]
        if node.domain or node.op not in ("MatMul", "Einsum") or sum(data) != 2:
            return None
        ranks = [len(self.sizes.shapes.get(tensor.name, ())) for tensor in node.inputs]
        if node.op == "Einsum":
            return _einsum(node, ranks, data) if len(data) <= 3 and all(ranks) else None
        if ranks[0] == ranks[1] >= 3:
            rank = ranks[0]
            left = Operand(node.inputs[0], free=(rank - 2,), contracted=(rank - 1,))
            right = Operand(node.inputs[1], free=(rank - 1,), contracted=(rank - 2,))
            return Product(node, (left, right))
        return None

    def chain(self, tensor: gs.Tensor) -> list[gs.Tensor]:
        """Return the tensors that `tensor` is a rearrangement of, the farthest first and itself last."""
        found = [tensor]
        while found[0].inputs and self.is_layout(found[0].inputs[0]):
            found.insert(0, found[0].inputs[0].inputs[0])
        return found

    def source(self, operand: Operand, *, channel: Sequence[int], positions: Sequence[int]) -> Source | None:
        """Find the feature map behind an operand.

        Args:
            operand: of a product.
            channel: its axes that hold channels.
            positions: its axes that hold positions.

        Returns:
            The farthest four-axis tensor that the operand rearranges, else the farthest three-axis one; None when the
            axes do not separate into channels and positions there.
        """
        chain = self.chain(operand.tensor)
        for rank in (4, 3):
            for index, tensor in enumerate(chain):
                if len(self.sizes.shapes.get(tensor.name, ())) == rank:
                    found = self._view(chain[index:], channel, positions)
                    if found is not None:
                        return found
        return None

    def _view(self, chain: list[gs.Tensor], channel: Sequence[int], positions: Sequence[int]) -> Source | None:
        moved = [self._moved(chain, axes) for axes in (channel, positions)]
        if moved[0] is None or moved[1] is None or len(moved[0]) > 1 or moved[0] & moved[1] or 0 in moved[0] | moved[1]:
            return None
        shape = self.sizes.shapes[chain[0].name]
        # One channel moves nothing: it is axis 1, as in torch, unless the positions run along that axis.
        channel_axis = next(iter(moved[0])) if moved[0] else (len(shape) - 1 if 1 in moved[1] else 1)
        return Source(chain[0], shape, channel_axis, moved[1]) if moved[1] else None

    def _moved(self, chain: list[gs.Tensor], axes: Sequence[int]) -> frozenset[int] | None:
        """Return the axes of the first tensor that move when the last one's index goes to the end of `axes`."""
        shapes = [self.sizes.shapes.get(tensor.name) for tensor in chain]
        if any(shape is None or 0 in shape for shape in shapes):
            return None
        size = shapes[-1] or ()
        index = [size[axis] - 1 if axis in axes else 0 for axis in range(len(size))]
        for position in range(len(chain) - 1, 0, -1):
            node = chain[position].inputs[0]
            before, after = shapes[position - 1] or (), shapes[position] or ()
            if node.op == "Transpose":
                order = node.attrs.get("perm", list(range(len(after)))[::-1])
                index = [index[order.index(axis)] for axis in range(len(order))]
            elif node.op in RESHAPES:
                flat = int(np.ravel_multi_index(index, after)) if after else 0
                index = [int(item) for item in np.unravel_index(flat, before)]
        return frozenset(axis for axis, item in enumerate(index) if item)

    def spatial_reference(self, tensor: gs.Tensor, count: int) -> Source | None:
        """Find a four-axis map upstream of a flattened one, through operations that keep positions apart.

        Args:
            tensor: three-axis tensor.
            count: its number of positions.

        Returns:
            The nearest (batch, channels, height, width) tensor with as many positions, or None.
        """
        seen = [tensor]
        for current in seen:
            shape = self.sizes.shapes.get(current.name, ())
            if len(shape) == 4 and shape[2] * shape[3] == count:
                return Source(current, shape, 1, frozenset({2, 3}))
            seen.extend(item for item in self._position_wise_inputs(current) if item not in seen)
        return None

    def origins(self, tensor: gs.Tensor) -> set[str]:
        """Return the names of the tensors that `tensor` is computed from position by position, itself included."""
        names = {tensor.name}
        queue = [tensor]
        for current in queue:
            for item in self._position_wise_inputs(current):
                if item.name not in names:
                    names.add(item.name)
                    queue.append(item)
        return names

    def _position_wise_inputs(self, tensor: gs.Tensor) -> list[gs.Tensor]:
        """Return the activations from which a tensor follows without mixing positions."""
        if not tensor.inputs:
            return []
        node = tensor.inputs[0]
        if node.op == "Conv" and any(size != 1 for size in self.sizes.shapes.get(node.inputs[1].name, (0,) * 4)[2:]):
            return []
        position_wise = {
            "Conv",
            "MatMul",
            "Gemm",
            "Einsum",
            "Add",
            "Mul",
            "Div",
            "BatchNormalization",
            "Relu",
            "LeakyRelu",
        }
        if node.domain or not (self.is_layout(node) or node.op in position_wise):
            return []
        data = [item for item in node.inputs if self.is_data(item)]
        return data if len(data) == 1 else []


def _einsum(node: gs.Node, ranks: Sequence[int], data: Sequence[bool]) -> Product | None:
    """Read an Einsum of two activations, `...` and a constant matrix included."""
    terms, result = _einsum_terms(str(node.attrs["equation"]), ranks)
    if any(len({*term}) != len(term) for term in terms):
        return None
    matrix = None
    places = [place for place, is_data in enumerate(data) if is_data]
    first, second = (terms[place] for place in places)
    if len(terms) == 3:
        middle = data.index(False)
        letters = terms[middle]
        inner = [letter for letter in letters if letter in first and letter not in second + result]
        outer = [letter for letter in letters if letter in second and letter not in first + result]
        if len(letters) != 2 or not inner or not outer:
            return None
        matrix = Matrix(node.inputs[middle], output_first=letters.index(outer[0]) == 0)
        first = first.replace(inner[0], outer[0])
    operands = []
    for place, own, other, own_matrix in ((places[0], first, second, matrix), (places[1], second, first, None)):
        if any(letter not in result + other for letter in own):
            return None
        operands.append(
            Operand(
                node.inputs[place],
                free=tuple(axis for axis, letter in enumerate(own) if letter not in other),
                contracted=tuple(axis for axis, letter in enumerate(own) if letter in other and letter not in result),
                matrix=own_matrix,
            )
        )
    return Product(node, (operands[0], operands[1])) if all(operand.contracted for operand in operands) else None


def _einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Split an equation into one term per operand and the result, every axis with a letter of its own."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = "".join(chr(ord("A") + index) for index in range(max(ranks)))
    for index, rank in enumerate(ranks):
        extra = rank - len(terms[index].replace("...", ""))
        terms[index] = terms[index].replace("...", hidden[len(hidden) - extra :] if extra else "")
    if not arrow:
        every = "".join(terms)
        result = "..." + "".join(sorted(letter for letter in {*every} if every.count(letter) == 1 and letter.islower()))
    return terms, result.replace("...", hidden)
