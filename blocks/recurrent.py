"""Recurrent units as torch.nn has them: LSTM, GRU and RNN over sequences, and cells of the first two for one step.

Paper: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 1997 (with the forget gate of Gers et
al., 2000); Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014 (arXiv 1406.1078);
Elman, "Finding Structure in Time", Cognitive Science 1990.
Code: https://github.com/pytorch/pytorch, `torch/nn/modules/rnn.py`.

    LSTM    i, f, o = sigmoid(W x + b + R h),  g = tanh(W x + b + R h),  c' = f c + i g,  h' = o tanh(c')
    GRU     r, z = sigmoid(W x + b + R h),  n = tanh(W x + b + r (R h + b')),  h' = (1 - z) n + z h
    RNN     h' = tanh(W x + b + R h)

An LSTM with a projection P has h' = P o tanh(c'), and R then sees the smaller h. ONNX's node knows no projection, but
R P o tanh(c) is the product of R P with what the node calls h: the node gets R P as its recurrence, and P stands behind
it. An initial h, which need not be P times anything, enters as further input features of the first step, with R as
their weight. Both are exact; the node's own product grows from R and P to R P, which `unrolled=True` avoids.

A sequence becomes one ONNX LSTM, GRU or RNN node per layer, for both directions. torch's exporter traces these modules
through a loop over the example's steps and so refuses a dynamic length; here the node is written directly, within
TensorRT's limits: layout 0, no coupled input and forget gates, and a GRU's reset gate behind the recurrent product.
`unrolled=True` writes every step of a fixed length instead, for runtimes without these nodes.

Gate order: torch has i, f, g, o and r, z, n; ONNX has i, o, f, g and z, r, n, with all sigmoid gates in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

State = tuple[torch.Tensor, ...]
"""Hidden state, and for an LSTM the cell state behind it."""


def _carried(forget: torch.Tensor, cell: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    return forget * cell + update


class LSTMUnit(nn.Module):
    """One LSTM step behind the product of the inputs with their weights, gates in ONNX order i, o, f, c.

    The cell state, to which every step adds, stays in FP32: FP16 loses the additions once it is some 1000 times larger.
    """

    op_type: ClassVar[str] = "LSTM"
    order: ClassVar[tuple[int, ...]] = (0, 3, 1, 2)
    states: ClassVar[int] = 2
    attributes: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.carry = Fp32Step(_carried)

    @staticmethod
    def biases(on_input: torch.Tensor, on_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the biases that the products of input and state get: the sum of both, and none."""
        return on_input + on_state, None

    def forward(
        self, from_input: torch.Tensor, recurrence: torch.Tensor, bias: torch.Tensor | None, state: State
    ) -> State:
        """Advance the state.

        Args:
            from_input: (batch, 4 * hidden), the product of the input with W and both biases.
            recurrence: (hidden, 4 * hidden), R transposed.
            bias: None.
            state: h and c, each (batch, hidden).
        """
        hidden, cell = state
        return self.gated(torch.addmm(from_input, hidden, recurrence), cell)

    def gated(self, total: torch.Tensor, cell: torch.Tensor) -> State:
        """Advance the state, given what the gates' sigmoids and the candidate's tanh see (batch, 4 * hidden)."""
        size = cell.shape[-1]
        gates, candidate = total[:, : 3 * size].sigmoid(), total[:, 3 * size :].tanh()
        cell = self.carry(gates[:, 2 * size :], cell, gates[:, :size] * candidate)
        return gates[:, size : 2 * size] * cell.tanh(), cell


class GRUUnit(nn.Module):
    """One GRU step behind the product of the inputs with their weights, gates in ONNX order z, r, h."""

    op_type: ClassVar[str] = "GRU"
    order: ClassVar[tuple[int, ...]] = (1, 0, 2)
    states: ClassVar[int] = 1
    attributes: ClassVar[dict[str, int]] = {"linear_before_reset": 1}

    @staticmethod
    def biases(on_input: torch.Tensor, on_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the biases that the products of input and state get: each its own, for r multiplies one of them."""
        return on_input, on_state

    def forward(
        self, from_input: torch.Tensor, recurrence: torch.Tensor, bias: torch.Tensor | None, state: State
    ) -> State:
        """Advance the state.

        Args:
            from_input: (batch, 3 * hidden), the product of the input with W and its bias.
            recurrence: (hidden, 3 * hidden), R transposed.
            bias: (3 * hidden,), of the product with R, or None.
            state: h (batch, hidden).
        """
        (hidden,) = state
        from_state = torch.matmul(hidden, recurrence) if bias is None else torch.addmm(bias, hidden, recurrence)
        return (self.gated(from_input, from_state, hidden),)

    def gated(self, from_input: torch.Tensor, from_state: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Advance the state, given the products with W and with R, each (batch, 3 * hidden)."""
        size = hidden.shape[-1]
        gates = (from_input[:, : 2 * size] + from_state[:, : 2 * size]).sigmoid()
        candidate = (from_input[:, 2 * size :] + gates[:, size:] * from_state[:, 2 * size :]).tanh()
        return candidate + gates[:, :size] * (hidden - candidate)


class RNNUnit(nn.Module):
    """One step without gates behind the product of the inputs with their weights."""

    op_type: ClassVar[str] = "RNN"
    order: ClassVar[tuple[int, ...]] = (0,)
    states: ClassVar[int] = 1
    attributes: ClassVar[dict[str, int]] = {}

    @staticmethod
    def biases(on_input: torch.Tensor, on_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the biases that the products of input and state get: the sum of both, and none."""
        return on_input + on_state, None

    def forward(
        self, from_input: torch.Tensor, recurrence: torch.Tensor, bias: torch.Tensor | None, state: State
    ) -> State:
        """Advance the state.

        Args:
            from_input: (batch, hidden), the product of the input with W and both biases.
            recurrence: (hidden, hidden), R transposed.
            bias: None.
            state: h (batch, hidden).
        """
        return (torch.addmm(from_input, state[0], recurrence).tanh(),)


Unit = LSTMUnit | GRUUnit | RNNUnit


def _reordered(tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Return the rows of a weight or bias with the gates in another order."""
    rows = tensor.unflatten(0, (len(order), -1))
    return torch.stack([rows[gate] for gate in order]).flatten(0, 1)


class Direction(nn.Module):
    """One layer in one direction: one product for the inputs of all steps, then step after step.

    Args:
        unit: the step.
        weight: W (gates * hidden, inputs).
        recurrence: R (gates * hidden, hidden).
        biases: of the products with W and with R, each (gates * hidden,); or nothing.
        backwards: begin at the last input.
        projection: P (features, hidden) of an LSTM that has one; R is (gates * hidden, features) then.
    """

    def __init__(
        self,
        unit: Unit,
        weight: torch.Tensor,
        recurrence: torch.Tensor,
        biases: Sequence[torch.Tensor],
        backwards: bool,
        projection: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.backwards = backwards
        self.weight: torch.Tensor
        self.recurrence: torch.Tensor
        self.input_bias: torch.Tensor | None
        self.state_bias: torch.Tensor | None
        on_input, on_state = unit.biases(*biases) if biases else (None, None)
        self.register_buffer("weight", weight.transpose(0, 1).contiguous())
        self.register_buffer("recurrence", recurrence.transpose(0, 1).contiguous())
        self.register_buffer("input_bias", on_input)
        self.register_buffer("state_bias", on_state)
        self.projection: torch.Tensor | None
        self.register_buffer("projection", None if projection is None else projection.transpose(0, 1).contiguous())

    def forward(self, x: torch.Tensor, initial: State, time: int) -> tuple[torch.Tensor, State]:
        """Run over a sequence.

        Args:
            x: (length, batch, inputs), or with time 1 (batch, length, inputs).
            initial: states (batch, hidden).
            time: axis of the steps.

        Returns:
            The outputs, shaped like x with hidden instead of inputs, and the last states.
        """
        from_inputs = torch.matmul(x, self.weight)
        if self.input_bias is not None:
            from_inputs = from_inputs + self.input_bias
        state, outputs = initial, []
        steps = range(x.shape[time])
        for step in reversed(steps) if self.backwards else steps:
            state = self.unit(from_inputs.select(time, step), self.recurrence, self.state_bias, state)
            if self.projection is not None:
                state = (torch.matmul(state[0], self.projection), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if self.backwards else outputs, dim=time), state


class Layer(nn.Module):
    """One layer in one or two directions: inside an ONNX export a single node, unless it is unrolled.

    Args:
        directions: the definition of the node, forwards first.
        node: the node's W, R and, where there are biases, B.
        unrolled: export every step instead of the node.
    """

    def __init__(self, directions: Sequence[Direction], node: Sequence[torch.Tensor], unrolled: bool) -> None:
        super().__init__()
        self.directions = nn.ModuleList(directions)
        self.unrolled = unrolled
        for name, value in zip(("weight", "recurrence", "bias"), node, strict=False):
            self.register_buffer(name, value)
        self.projection: torch.Tensor | None
        self.register_buffer("projection", None)
        self.initial_weight: torch.Tensor | None
        self.register_buffer("initial_weight", None)
        if directions[0].projection is not None:
            self._project(node[1])

    def _project(self, recurrences: torch.Tensor) -> None:
        """Give the node the products R P, and keep P, and R as the weight of the initial states."""
        self.projection = torch.stack([direction.projection for direction in self.directions])  # type: ignore[misc]
        rows, features = recurrences.shape[1:]
        weight = torch.zeros(len(recurrences), rows, len(recurrences), features, dtype=recurrences.dtype)
        for index, recurrence in enumerate(recurrences):
            weight[index, :, index] = recurrence
        self.initial_weight = weight.flatten(2)
        self.recurrence = recurrences @ self.projection.transpose(1, 2)

    def forward(self, x: torch.Tensor, initial: State, time: int) -> tuple[torch.Tensor, State]:
        """Run over a sequence.

        Args:
            x: (length, batch, inputs), or with time 1 (batch, length, inputs).
            initial: states (directions, batch, hidden), or nothing for zeros.
            time: axis of the steps.

        Returns:
            The outputs, directions side by side in the last axis, and the last states, shaped as the first.
        """
        if not self.unrolled and torch.onnx.is_in_onnx_export():
            return self._node(x, initial, time)
        unit: Unit = self.get_submodule("directions.0").unit  # type: ignore[assignment]
        if not initial:
            zeros = self._zeros(x, x.shape[1 - time])
            first = zeros if self.projection is None else zeros[..., : self.projection.shape[2]]
            initial = (first, zeros)[: unit.states]
        ran = [
            direction(x, tuple(entry[index] for entry in initial), time)
            for index, direction in enumerate(self.directions)
        ]
        outputs = torch.cat([outputs for outputs, _ in ran], dim=2) if len(ran) > 1 else ran[0][0]
        return outputs, tuple(torch.stack(last) for last in zip(*(state for _, state in ran), strict=True))

    def _node(self, x: torch.Tensor, initial: State, time: int) -> tuple[torch.Tensor, State]:
        """Write the ONNX node; it has the steps in front."""
        unit: Unit = self.get_submodule("directions.0").unit  # type: ignore[assignment]
        x = x.transpose(0, 1) if time else x
        length, batch = x.shape[:2]
        weight, recurrence = self.get_buffer("weight"), self.get_buffer("recurrence")
        directions, _, hidden = recurrence.shape
        if self.projection is not None and initial:
            x, weight = self._with_initial(x, initial[0], weight)
            initial = (self._zeros(x, batch), *initial[1:])
        inputs = [x, weight, recurrence, self._buffers.get("bias"), None, *initial]
        while inputs[-1] is None:
            inputs.pop()
        shapes = [(length, directions, batch, hidden)] + [(directions, batch, hidden)] * unit.states
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if directions == 2 else "forward",
            **unit.attributes,
        }
        outputs, *last = torch.onnx.ops.symbolic_multi_out(
            f"::{unit.op_type}", inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
        )
        if self.projection is not None:
            outputs, last[0] = torch.matmul(outputs, self.projection), torch.matmul(last[0], self.projection)
        if directions == 1:
            outputs = outputs.squeeze(1)
            return outputs.transpose(0, 1) if time else outputs, tuple(last)
        return outputs.permute((2, 0, 1, 3) if time else (0, 2, 1, 3)).flatten(2), tuple(last)

    def _zeros(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Return states (directions, batch, hidden) to begin with."""
        hidden = self.get_buffer("recurrence").shape[2]
        return torch.zeros(len(self.directions), batch, hidden, dtype=x.dtype, device=x.device)

    def _with_initial(
        self, x: torch.Tensor, initial: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the initial h to the inputs of each direction's first step, and its weight to the inputs' weights."""
        assert self.initial_weight is not None
        steps = torch.arange(x.shape[0], device=x.device)[:, None, None]
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        firsts = (0, x.shape[0] - 1)
        further = [torch.where(steps == first, state, nothing) for first, state in zip(firsts, initial, strict=False)]
        return torch.cat([x, *further], dim=2), torch.cat([weight, self.initial_weight], dim=2)


class Sequences(nn.Module):
    """A stack of layers; what `LSTM`, `GRU` and `RNN` become for an export.

    Args:
        name: what error messages call it.
        layers: the layers.
        input_size: number of input features.
        batch_first: the batch comes before the steps.
    """

    def __init__(self, name: str, layers: Sequence[Layer], input_size: int, batch_first: bool) -> None:
        super().__init__()
        self.name = name
        self.layers = nn.ModuleList(layers)
        self.input_size = input_size
        self.time = 1 if batch_first else 0

    def forward(self, x: torch.Tensor, *initial: torch.Tensor) -> State:
        """Run over a sequence; arguments and results as in `Recurrent.forward`."""
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise UserError(
                f"{self.name} takes sequences of {self.input_size} features with a batch axis, got {tuple(x.shape)}. "
                "Add the axis, or build the block with another input_size."
            )
        length = x.shape[self.time]
        unrolled = any(bool(layer.unrolled) for layer in self.layers)
        if unrolled:
            require_static(self.name, "length", length, "every step is written out; build it with unrolled=False")
        if isinstance(length, int) and length < 1:
            raise UserError(f"{self.name} needs at least one step, got {tuple(x.shape)}. Leave empty sequences out.")
        last: list[State] = []
        start = 0
        for layer in self.layers:
            end = start + len(layer.directions)  # type: ignore[arg-type]
            x, state = layer(x, tuple(entry[start:end] for entry in initial), self.time)
            last.append(state)
            start = end
        return x, *(torch.cat(entries) if len(entries) > 1 else entries[0] for entries in zip(*last, strict=True))


class Recurrent(nn.Module):
    """Layers of recurrent units with the state of torch.nn's module of the same name.

    State names, per layer k: `weight_ih_l{k}` (gates * hidden, inputs), `weight_hh_l{k}` (gates * hidden, hidden),
    `bias_ih_l{k}` and `bias_hh_l{k}`; the backward direction has the suffix `_reverse`. A layer behind a bidirectional
    one has 2 * hidden inputs. Dropout is for training only and has no counterpart here.

    Args:
        input_size: number of input features.
        hidden_size: number of features of the state.
        num_layers: number of layers.
        bias: whether there are biases.
        batch_first: inputs and outputs are (batch, length, features) instead of (length, batch, features).
        bidirectional: every layer runs in both directions.
        unrolled: write every step of a fixed length into the graph, instead of one node per layer.
        proj_size: features that an LSTM's h is projected to, with `weight_hr_l{k}` (proj_size, hidden); 0 for none.

    Raises:
        ValueError: a size or number of layers below 1; a projection of another unit, or to no fewer features.
    """

    unit: ClassVar[type[Unit]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        unrolled: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name}={value}: {type(self).__name__} needs at least 1")
        if proj_size and self.unit is not LSTMUnit:
            raise ValueError(f"proj_size={proj_size}: only an LSTM has a projection, {type(self).__name__} has none")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size={proj_size}: an LSTM is projected to 1 to {hidden_size - 1} features, or 0")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.unrolled = unrolled
        self.suffixes = ("", "_reverse") if bidirectional else ("",)
        self.kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
        self.projected = proj_size > 0
        features = proj_size or hidden_size
        rows = len(self.unit.order) * hidden_size
        bound = hidden_size**-0.5
        for layer in range(num_layers):
            inputs = features * len(self.suffixes) if layer else input_size
            shapes = dict(zip(self.kinds, ((rows, inputs), (rows, features), (rows,), (rows,)), strict=False))
            if self.projected:
                shapes["weight_hr"] = (proj_size, hidden_size)
            for suffix in self.suffixes:
                for kind, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                    self.register_parameter(f"{kind}_l{layer}{suffix}", parameter)

    def forward(self, x: torch.Tensor, *initial: torch.Tensor) -> State:
        """Run over a sequence.

        Args:
            x: (length, batch, input_size), or with `batch_first` (batch, length, input_size).
            initial: for an LSTM h and c, otherwise h, each (num_layers * directions, batch, hidden_size), h with
                proj_size features where there is a projection; zeros when left out.

        Returns:
            The last layer's outputs, shaped as x with the features of h for each direction, and the last states, shaped
            as the initial ones.

        Raises:
            UserError: another shape, a sequence without steps, or an unrolled sequence of dynamic length.
        """
        return self._sequences()(x, *initial)

    def prepare_for_export(self) -> Sequences:
        """Return the layers with the weights as the ONNX nodes want them: gates in their order, directions stacked."""
        with torch.no_grad():
            return self._sequences()

    def _sequences(self) -> Sequences:
        layers = [self._layer(index) for index in range(self.num_layers)]
        return Sequences(type(self).__name__, layers, self.input_size, self.batch_first)

    def _layer(self, index: int) -> Layer:
        directions, stacks = [], []
        for suffix in self.suffixes:
            tensors = [
                _reordered(self.get_parameter(f"{kind}_l{index}{suffix}"), self.unit.order) for kind in self.kinds
            ]
            weight, recurrence, *biases = tensors
            projection = self.get_parameter(f"weight_hr_l{index}{suffix}") if self.projected else None
            directions.append(Direction(self.unit(), weight, recurrence, biases, bool(suffix), projection))
            stacks.append((weight, recurrence, torch.cat(biases)) if biases else (weight, recurrence))
        return Layer(directions, [torch.stack(tensors) for tensors in zip(*stacks, strict=True)], self.unrolled)


class LSTM(Recurrent):
    """Long short-term memory over sequences; takes the state of torch.nn.LSTM, with or without projection.

    See `Recurrent` for state names, arguments and errors.
    """

    unit = LSTMUnit


class GRU(Recurrent):
    """Gated recurrent units over sequences; takes the state of torch.nn.GRU.

    The reset gate multiplies the product with the state, bias included, not the state itself as in the paper. See
    `Recurrent` for state names, arguments and errors.
    """

    unit = GRUUnit


class RNN(Recurrent):
    """Recurrent layers without gates; takes the state of torch.nn.RNN with its default, tanh.

    See `Recurrent` for state names, arguments and errors.
    """

    unit = RNNUnit


class MergedLSTMCell(nn.Module):
    """One LSTM step with one product: [x; h] with [W | R], both biases added into one.

    Args:
        weight: (4 * hidden, inputs + hidden), gates in ONNX order.
        bias: (4 * hidden,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.unit = LSTMUnit()

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> State:
        """Advance the state; arguments and results as in `LSTMCell.forward`."""
        total = nn.functional.linear(torch.cat([x, h], dim=1), self.weight, self.bias)
        return self.unit.gated(total, c)


class SplitGRUCell(nn.Module):
    """One GRU step with the gates in ONNX order.

    Args:
        weight: (3 * hidden, inputs).
        recurrence: (3 * hidden, hidden).
        on_input: bias of the product with weight, (3 * hidden,), or None.
        on_state: bias of the product with recurrence, (3 * hidden,), or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        recurrence: torch.Tensor,
        on_input: torch.Tensor | None = None,
        on_state: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.recurrence: torch.Tensor
        self.on_input: torch.Tensor | None
        self.on_state: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("recurrence", recurrence)
        self.register_buffer("on_input", on_input)
        self.register_buffer("on_state", on_state)
        self.unit = GRUUnit()

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Advance the state; arguments and result as in `GRUCell.forward`."""
        from_input = nn.functional.linear(x, self.weight, self.on_input)
        from_state = nn.functional.linear(h, self.recurrence, self.on_state)
        return self.unit.gated(from_input, from_state, h)


class Cell(nn.Module):
    """One step of a recurrent unit with the state of torch.nn's cell of the same name.

    State names: `weight_ih` (gates * hidden, inputs), `weight_hh` (gates * hidden, hidden), `bias_ih` and `bias_hh`.

    Args:
        input_size: number of input features.
        hidden_size: number of features of the state.
        bias: whether there are biases.

    Raises:
        ValueError: a size below 1.
    """

    unit: ClassVar[type[Unit]]

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: {type(self).__name__} needs at least 1")
        rows = len(self.unit.order) * hidden_size
        bound = hidden_size**-0.5
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size).uniform_(-bound, bound))
        self.bias_ih = nn.Parameter(torch.empty(rows).uniform_(-bound, bound)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(rows).uniform_(-bound, bound)) if bias else None

    def _in_order(self) -> list[torch.Tensor]:
        """Return weights and biases with the gates in ONNX order."""
        tensors = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [_reordered(tensor, self.unit.order) for tensor in tensors if tensor is not None]


class LSTMCell(Cell):
    """One LSTM step; takes the state of torch.nn.LSTMCell. See `Cell` for state names, arguments and errors."""

    unit = LSTMUnit

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> State:
        """Advance the state.

        Args:
            x: (batch, input_size).
            h: (batch, hidden_size).
            c: (batch, hidden_size).

        Returns:
            The next h and c.
        """
        return self._merged()(x, h, c)

    def prepare_for_export(self) -> MergedLSTMCell:
        """Return the step with input and state in one product, and the gates with a sigmoid side by side."""
        with torch.no_grad():
            return self._merged()

    def _merged(self) -> MergedLSTMCell:
        weight, recurrence, *biases = self._in_order()
        return MergedLSTMCell(torch.cat([weight, recurrence], dim=1), biases[0] + biases[1] if biases else None)


class GRUCell(Cell):
    """One GRU step; takes the state of torch.nn.GRUCell. See `Cell` for state names, arguments and errors.

    The reset gate stands between the two products, so they stay two.
    """

    unit = GRUUnit

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Advance the state.

        Args:
            x: (batch, input_size).
            h: (batch, hidden_size).

        Returns:
            The next h.
        """
        return self._split()(x, h)

    def prepare_for_export(self) -> SplitGRUCell:
        """Return the step with the gates that have a sigmoid side by side."""
        with torch.no_grad():
            return self._split()

    def _split(self) -> SplitGRUCell:
        weight, recurrence, *biases = self._in_order()
        return SplitGRUCell(weight, recurrence, *biases)


_SEQUENCE = (TensorInput("x", ("batch", "length", "input_size")),)
_STEPS_FIRST = TensorInput("x", ("length", "batch", "input_size"))
_SIZES: tuple[Sizes, ...] = (
    {"batch": 2, "length": 5},
    {"batch": 3, "length": 7},
    {"batch": 1, "length": 2},
    {"batch": 1, "length": 1},
)
_FIXED_SIZES: tuple[Sizes, ...] = tuple({"batch": batch, "length": 5} for batch in (2, 1, 3))
_ONE_STEP: tuple[Sizes, ...] = tuple({"batch": batch} for batch in (2, 1, 3))
_FIXED = {"length": "every step is written into the graph"}
_SMALL: Arguments = {"input_size": 5, "hidden_size": 6}
_BOTH_WAYS: Arguments = {**_SMALL, "num_layers": 2, "batch_first": True, "bidirectional": True}


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the gates of all steps, which a node keeps inside, or of both directions' outputs."""
    directions = 2 if arguments.get("bidirectional") else 1
    per_step = 4 if arguments.get("unrolled") else directions
    rows: int = arguments["hidden_size"]
    projected = int(arguments.get("proj_size", 0))
    return sizes["batch"] * sizes["length"] * max(per_step * rows, int(arguments["input_size"]) + projected)


def _largest_step(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the gates, or of input and state side by side."""
    hidden: int = arguments["hidden_size"]
    return sizes["batch"] * max(4 * hidden, hidden + int(arguments["input_size"]))


_INT8 = "the products with weights of the unrolled cell, where their noise allows it; the node stays in floating point"
_NODE_PRECISION = (
    "the node runs in FP16: its gates saturate, so that an overflowing product still gives the exact limit 0 or 1"
)
_CELL_PRECISION = (
    "the products and gates run in FP16, for gates saturate; the cell state, which sums over all steps, stays in FP32, "
    "from step to step and as input and output of a single step"
)

_OPENNMT = Published(
    "one layer of OpenNMT's encoder, sentences of 50 words",
    {"input_size": 500, "hidden_size": 250, "batch_first": True, "bidirectional": True},
    {"batch": 1, "length": 50},
)

_PROJECTED = (
    Variant("projected", {**_BOTH_WAYS, "proj_size": 4}),
    Variant(
        "projected-with-state",
        {**_SMALL, "proj_size": 4},
        inputs=(
            _STEPS_FIRST,
            TensorInput("h", (1, "batch", "proj_size")),
            TensorInput("c", (1, "batch", "hidden_size")),
        ),
    ),
)

for _build, _title, _paper, _year, _states, _published, _precision in (
    (
        LSTM,
        "long short-term memory over sequences",
        "Long Short-Term Memory, Neural Computation 1997; forget gate: Learning to Forget, 2000",
        2000,
        ("h", "c"),
        _OPENNMT,
        f"{_NODE_PRECISION}; the node's cell state loses small additions after some 1000 steps, so for such lengths "
        "keep the node in FP32 by name. Unrolled, the cell state stays in FP32",
    ),
    (
        GRU,
        "gated recurrent units over sequences",
        "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation, EMNLP 2014",
        2014,
        ("h",),
        _OPENNMT,
        f"{_NODE_PRECISION}, and its state is a mean of numbers from -1 to 1",
    ),
    (
        RNN,
        "recurrent layers without gates",
        "Finding Structure in Time, Cognitive Science 1990",
        1990,
        ("h",),
        None,
        "the node runs in FP16: its tanh saturates, so that an overflowing product still gives the exact limit",
    ),
):
    BLOCKS.add(
        BlockSpec(
            name=_build.__name__.lower(),
            title=_title,
            paper=_paper,
            year=_year,
            code="https://github.com/pytorch/pytorch, torch/nn/modules/rnn.py",
            build=_build,
            original=f"edgeattn.validation.originals.recurrent:{_build.__name__}",
            variants=(
                Variant("torch", _BOTH_WAYS, published=_published),
                Variant(
                    "steps-first-with-state",
                    {**_SMALL, "bias": False},
                    inputs=(_STEPS_FIRST, *(TensorInput(name, (1, "batch", "hidden_size")) for name in _states)),
                ),
                Variant("unrolled", {**_BOTH_WAYS, "unrolled": True}, fixed=_FIXED, sizes=_FIXED_SIZES),
                *(_PROJECTED if _build is LSTM else ()),
            ),
            largest=_largest,
            precision=_precision,
            int8=_INT8,
            inputs=_SEQUENCE,
            sizes=_SIZES,
        )
    )

for _cell, _title, _year, _states, _precision in (
    (LSTMCell, "one LSTM step", 2000, ("h", "c"), _CELL_PRECISION),
    (GRUCell, "one GRU step", 2014, ("h",), "all of the step runs in FP16: its gates saturate, its state is a mean"),
):
    BLOCKS.add(
        BlockSpec(
            name=f"{_cell.unit.op_type.lower()}-cell",
            title=_title,
            paper=BLOCKS.get(_cell.unit.op_type.lower()).paper,
            year=_year,
            code="https://github.com/pytorch/pytorch, torch/nn/modules/rnn.py",
            build=_cell,
            original=f"edgeattn.validation.originals.recurrent:{_cell.__name__}",
            variants=(
                Variant(
                    "torch",
                    _SMALL,
                    published=Published(
                        "first decoder layer with input feeding, Luong et al. 2015",
                        {"input_size": 2000, "hidden_size": 1000},
                        {"batch": 1},
                    ),
                ),
            ),
            largest=_largest_step,
            precision=_precision,
            int8=_INT8,
            inputs=tuple(
                TensorInput(name, ("batch", size))
                for name, size in (("x", "input_size"), *((name, "hidden_size") for name in _states))
            ),
            sizes=_ONE_STEP,
        )
    )
