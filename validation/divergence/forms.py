"""The two sides of a comparison: what gives the tensors of a network, one after the other, as it computes them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from torch import nn

from edgeattn.export.to_onnx import prepare_for_export
from edgeattn.validation.divergence.scopes import Place, ScopedGraph

Arrays = Mapping[str, np.ndarray]
Sink = Callable[[Place, np.ndarray], None]
"""Takes each tensor of a form as soon as it is computed."""

_IDENTITIES = (nn.Identity, nn.modules.dropout._DropoutNd)
_FOLDING = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Outline:
    """What a form can give, learnt before the comparison.

    Attributes:
        places: every boundary of a module call whose tensor can be had, with its shape where that is known, in the
            order in which the form computes them.
        stand_ins: for places of the ONNX form that this form does not have, the place that holds the same tensor.
        leaves: innermost modules that compute something; one without a node in the ONNX graph is missing there.
    """

    places: Mapping[Place, tuple[int, ...] | None]
    stand_ins: Mapping[Place, Place] = field(default_factory=dict)
    leaves: Collection[str] = ()


class Observed(Protocol):
    """A form whose tensors can be looked at.

    Attributes:
        name: how the form is called in the result.
    """

    name: str

    def outline(self, graph: ScopedGraph, feed: Arrays) -> Outline:
        """Return what the form can give beside an ONNX graph of the same network."""
        ...

    def run(self, feed: Arrays, wanted: Collection[Place], sink: Sink) -> dict[str, np.ndarray]:
        """Compute the network, hand every wanted tensor to `sink`, and return the outputs by name."""
        ...

    def depends(self, feed: Arrays, result: Place, cause: Place) -> bool:
        """Tell whether one tensor of the form changes with another."""
        ...


class TorchForm:
    """A torch network as it is exported: with the exact foldings that its blocks declare, but nothing else changed.

    Args:
        module: the network with its weights; it is copied.
        inputs: names of forward's arguments, in order.
        outputs: names of what forward returns, in order; the last ones may be left out.
        name: for messages.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], *, name: str = "PyTorch"
    ) -> None:
        self.name = name
        self.original = copy.deepcopy(module).eval()
        self.module = prepare_for_export(module)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._probes: dict[tuple[tuple[int, ...], ...], _Probe] = {}
        self._folding: float | None = None

    def outline(self, graph: ScopedGraph, feed: Arrays) -> Outline:
        """Run once, to learn the calls and shapes and which convolutions absorbed a normalisation."""
        sizes = tuple(array.shape for array in feed.values())
        if sizes not in self._probes:
            probe = self._probes[sizes] = _Probe()
            self._forward(self.module, feed, probe.before, probe.after)
            probe.finish()
        return self._probes[sizes].outline(graph)

    def run(self, feed: Arrays, wanted: Collection[Place], sink: Sink) -> dict[str, np.ndarray]:
        """Compute the network once; what nobody wants is dropped at once."""
        wanted = set(wanted)

        def hand_over(side: str, path: str, call: int, tensors: Iterable[torch.Tensor]) -> None:
            for index, tensor in enumerate(tensors):
                place = Place(path, call, side, index)
                if place in wanted:
                    sink(place, tensor.detach().numpy().copy())

        return self._forward(
            self.module,
            feed,
            lambda path, call, _, given: hand_over("in", path, call, given),
            lambda path, call, _, made: hand_over("out", path, call, made),
        )

    def depends(self, feed: Arrays, result: Place, cause: Place) -> bool:
        """Tell whether a tensor changes when what a module makes is doubled, everything else being the same."""
        arrays = []
        for factor in (1, 2):
            found: list[np.ndarray] = []
            with self._scaled(cause, factor):
                outputs = self.run(feed, [result], lambda _, array: found.append(array))  # noqa: B023
            arrays.append(outputs[result.path] if result.side == "network" else found[0])
        return not np.array_equal(arrays[0], arrays[1])

    @contextmanager
    def _scaled(self, place: Place, factor: int) -> Iterator[None]:
        """Multiply what one call of a module makes while the block runs."""
        calls: Counter[str] = Counter()

        def hook(_: nn.Module, __: tuple[Any, ...], result: Any) -> Any:
            calls[place.path] += 1
            return result * factor if calls[place.path] == place.call + 1 and torch.is_tensor(result) else None

        handle = self.module.get_submodule(place.path).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def folding_error(self, feed: Arrays) -> float:
        """Return the largest relative L2 that the exact foldings make at the outputs, on the first sample asked for."""
        if self._folding is None:
            before = self._forward(self.original, feed, None, None)
            after = self._forward(self.module, feed, None, None)
            self._folding = max(relative_l2(before[name], after[name]) for name in before)
        return self._folding

    def _forward(self, module: nn.Module, feed: Arrays, before: Any, after: Any) -> dict[str, np.ndarray]:
        calls: Counter[str] = Counter()
        open_calls: dict[str, list[int]] = {}

        def enter(path: str) -> Callable[..., None]:
            def hook(part: nn.Module, arguments: tuple[Any, ...]) -> None:
                open_calls.setdefault(path, []).append(calls[path])
                calls[path] += 1
                before(path, open_calls[path][-1], part, _tensors(arguments))

            return hook

        def leave(path: str) -> Callable[..., None]:
            def hook(part: nn.Module, _: tuple[Any, ...], result: Any) -> None:
                after(path, open_calls[path].pop(), part, _tensors(result))

            return hook

        with ExitStack() as stack, torch.no_grad():
            for path, part in module.named_modules() if before else ():
                if path:
                    stack.callback(part.register_forward_pre_hook(enter(path)).remove)
                    stack.callback(part.register_forward_hook(leave(path)).remove)
            result = module(*(torch.from_numpy(np.ascontiguousarray(feed[name])) for name in self.inputs))
        produced = _tensors(result, floating=False)
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, produced, strict=False)}


class _Probe:
    """Learns from one run which tensors there are and which convolutions a normalisation reads."""

    def __init__(self) -> None:
        self.shapes: dict[Place, tuple[int, ...]] = {}
        self.pairs: list[tuple[tuple[str, int], tuple[str, int]]] = []
        self.leaves: set[str] = set()
        self._makers: dict[int, tuple[str, int]] = {}
        self._alive: list[torch.Tensor] = []

    def before(self, path: str, call: int, part: nn.Module, given: list[torch.Tensor]) -> None:
        """Note the inputs of a call."""
        self._note("in", path, call, given)
        if getattr(part, "running_mean", None) is not None and given and id(given[0]) in self._makers:
            self.pairs.append((self._makers[id(given[0])], (path, call)))

    def after(self, path: str, call: int, part: nn.Module, made: list[torch.Tensor]) -> None:
        """Note the outputs of a call."""
        self._note("out", path, call, made)
        if next(part.children(), None) is None and not isinstance(part, _IDENTITIES):
            self.leaves.add(path)
        if len(made) == 1 and isinstance(part, _FOLDING):
            self._makers[id(made[0])] = (path, call)
            self._alive.append(made[0])  # an id is a tensor's own only while it lives

    def finish(self) -> None:
        """Let go of the tensors."""
        self._alive.clear()
        self._makers.clear()

    def outline(self, graph: ScopedGraph) -> Outline:
        """Return the places; a normalisation that was folded into the layer before it makes one unit with it."""
        present = set(graph.paths)
        leaves, hidden, stand_ins = set(self.leaves), set(), {}
        for (first, first_call), (second, second_call) in self.pairs:
            if second in graph.computes_batchnorm:
                continue
            hidden |= {Place(first, first_call, "out"), Place(second, second_call, "in")}
            if {first, second} & present:
                leaves -= {first, second}
            if not {first, second} <= present:  # all nodes of the unit carry one of the two names
                stand_ins[Place(first, first_call, "out")] = Place(second, second_call, "out")
                stand_ins[Place(second, second_call, "in")] = Place(first, first_call, "in")
        return Outline({place: shape for place, shape in self.shapes.items() if place not in hidden}, stand_ins, leaves)

    def _note(self, side: str, path: str, call: int, tensors: list[torch.Tensor]) -> None:
        self.shapes.update(
            {Place(path, call, side, index): tuple(tensor.shape) for index, tensor in enumerate(tensors)}
        )


def _tensors(value: Any, *, floating: bool = True) -> list[torch.Tensor]:
    """Return the tensors of arguments or results, nested as they may be; only floating-point ones unless told."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() or not floating else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item, floating=floating)]


class RunnerForm:
    """Any Polygraphy runner, such as an engine's: its outputs are the tensors that can be looked at.

    A runner whose inner tensors are marked as outputs under their ONNX names is compared at those; one without only at
    the outputs of the network.

    Args:
        runner: an active runner.
        name: for messages.
    """

    def __init__(self, runner: BaseRunner, *, name: str) -> None:
        self.name = name
        self.runner = runner
        self._names: dict[Place, str] = {}

    def outline(self, graph: ScopedGraph, feed: Arrays) -> Outline:
        """Run once, to learn which tensors of the graph the runner gives."""
        outputs = self._infer(feed)
        self._names = {place: tensor for place, tensor in graph.places({}).items() if tensor in outputs}
        return Outline({place: outputs[tensor].shape for place, tensor in self._names.items()})

    def run(self, feed: Arrays, wanted: Collection[Place], sink: Sink) -> dict[str, np.ndarray]:
        """Run the runner and hand over what is wanted."""
        outputs = self._infer(feed)
        for place in wanted:
            if place in self._names:
                sink(place, outputs[self._names[place]])
        return outputs

    def depends(self, feed: Arrays, result: Place, cause: Place) -> bool:
        """Tell nothing: a runner has no modules of its own that could be missing elsewhere."""
        return False

    def _infer(self, feed: Arrays) -> dict[str, np.ndarray]:
        given = {name: feed[name] for name in self.runner.get_input_metadata(use_numpy_dtypes=False)}
        return {name: np.array(array) for name, array in self.runner.infer(given).items()}


def relative_l2(reference: np.ndarray, actual: np.ndarray, *, scale: np.ndarray | None = None) -> float:
    """Return the norm of a difference over the norm of the reference.

    Equal infinities and NaNs in the same place count as equal; infinite where only one side is finite, or they differ.

    Args:
        reference: the values to be matched.
        actual: the values under test, same shape.
        scale: values whose norm to divide by; the reference when None.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        squares = float(np.square(np.subtract(actual, reference, dtype=np.float64)).sum())
        norm = float(np.square(np.asarray(reference if scale is None else scale, np.float64)).sum())
    if not (np.isfinite(squares) and np.isfinite(norm)):
        finite = np.isfinite(reference) & np.isfinite(actual)
        same = finite | (reference == actual) | (np.isnan(reference) & np.isnan(actual))
        if not same.all():
            return float("inf")
        wide = reference if scale is None else scale
        usable = finite & np.isfinite(wide)
        squares = float(np.square(np.subtract(actual[usable], reference[usable], dtype=np.float64)).sum())
        norm = float(np.square(np.asarray(wide[usable], np.float64)).sum())
    if norm == 0:
        return 0.0 if squares == 0 else float("inf")
    return float((squares / norm) ** 0.5)
