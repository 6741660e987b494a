"""Attention modules in anyone's model, replaced by the blocks that export well, each after measuring that it is equal.

A module comes into question by the names and shapes of its state (`edgeattn.blocks.recognition`), never by its class
name. The block is then compared with it in float64: on the activations recorded while the user's model ran, on noise of
other sizes and 30 times as large, and with other weights, so that a zero-initialised gate or a clipped activation
cannot hide a difference. What differs is left as it is, with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.recognition import (
    Hints,
    Layout,
    Match,
    alternatives,
    matches,
    named_like,
    shapes_of,
    transferred,
)
from edgeattn.blocks.spec import Arguments
from edgeattn.export.replace_attention_calls import Call, call_of
from edgeattn.foundation import UserError

TOLERANCE = 1e-5
"""Largest relative L2 difference between the model's outputs before and after, in the model's own precision."""

ROUNDING = 1e-8
"""Largest relative L2 difference between a module and its replacement, in float64, where equal ones differ by 1e-12."""

_CALLS_KEPT = 2  # recorded calls per module: a recurrence has at least two
_SMALL = 12  # noise has about so many positions per axis
# Takes activations to where ReLU6 and hard sigmoids show, but not energies to the -65504 of blocks' masks.
_LARGE = 30.0
_NUMBER_LIMIT = 8192

Calls = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What became of one module that looks like a known attention module.

    Attributes:
        path: module path in the model; empty for the model itself.
        module: its class.
        block: the block that replaces it, or came nearest.
        variant: the layout of the block's state, such as "timm".
        replaced: whether it was replaced.
        reason: why.
        error: largest relative L2 error of the block that replaces it, or came nearest; None where none was measured.
    """

    path: str
    module: str
    block: str
    variant: str
    replaced: bool
    reason: str
    error: float | None


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A model with its attention replaced.

    Attributes:
        model: a copy of the user's model in evaluation mode, with blocks where `decisions` says so.
        decisions: one entry for every module that looks like a known attention module.
        error: relative L2 error of the model's outputs on the example inputs.
    """

    model: nn.Module
    decisions: tuple[Decision, ...]
    error: float

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of the replaced modules."""
        return tuple(decision.path for decision in self.decisions if decision.replaced)


def replace_attention(
    model: nn.Module, example_inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any]
) -> Replacement:
    """Replace the attention modules of a model by blocks, where that changes nothing.

    Args:
        model: any module, in float32 or float64; it stays as it is.
        example_inputs: a tensor, positional or keyword arguments of the model's `forward`.

    Returns:
        The new model in evaluation mode, and what became of every module that looks like a known attention module.

    Raises:
        UserError: the model cannot be copied, has parameters of lower precision, fails on the inputs or returns no
            tensor.
    """
    low = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if low:
        raise UserError(
            f"{type(model).__name__} has parameters of type {', '.join(map(str, low))}, in which equality cannot be "
            "measured. Give `model.float()`; the export makes FP16 forms itself."
        )
    args, kwargs = _arguments(example_inputs)
    try:
        held = _Held(copy.deepcopy(model)).eval()
    except Exception as error:  # a user's class can fail in any way
        raise UserError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Detach the tensors that it "
            "keeps outside its parameters and buffers."
        ) from error
    with torch.no_grad(), torch.random.fork_rng():
        looks = {path: module for path, module in held.named_modules() if path and _comes_into_question(module)}
        expected, calls = _recorded(held, looks, args, kwargs)
        decisions: list[Decision] = []
        accepted: dict[str, nn.Module] = {}
        known: dict[Any, Match] = {}
        for path, module in looks.items():
            if any(path.startswith(f"{outer}.") for outer in accepted):
                continue
            decision, block = _decided(path, module, calls[path], known)
            if decision is not None:
                decisions.append(decision)
            if block is not None:
                accepted[path] = block
        return _applied(held, accepted, decisions, expected, args, kwargs)


class _Held(nn.Module):
    """A model inside another module, so that it can be replaced as a whole.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    @staticmethod
    def inside(path: str) -> str:
        """Return a module path as it is in the model; the model's own is empty."""
        return path.removeprefix("model").removeprefix(".")


def _arguments(
    example_inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def _comes_into_question(module: nn.Module) -> bool:
    """Tell whether the names of a module's state are those of a block that it is not yet."""
    if isinstance(module, torch.jit.ScriptModule) or any(type(module) is block.build for block in BLOCKS):
        return False
    shapes = shapes_of(module.state_dict())
    return bool(shapes) and any(True for _ in named_like(shapes))


def _cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return model(*_cloned(args), **_cloned(dict(kwargs)))


def _recorded(
    held: _Held, modules: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], Mapping[str, Calls]]:
    """Run a model, and return its outputs and the arguments that each module was called with."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {path: [] for path in modules}

    def record(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            del module
            if len(calls[path]) < _CALLS_KEPT:
                calls[path].append((_cloned(given), _cloned(named)))

        return hook

    foreign = {path: _hooked(module) for path, module in modules.items()}
    handles = [
        module.register_forward_pre_hook(record(path), with_kwargs=True)
        for path, module in modules.items()
        if not foreign[path]
    ]
    try:
        outputs = _tensors(_run(held, args, kwargs))
    except Exception as error:  # a user's class can fail in any way
        raise UserError(
            f"{type(held.model).__name__} fails on the example inputs ({type(error).__name__}: {error}). "
            "Give inputs that its forward takes: a tensor, a sequence of arguments, or a mapping of keyword arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise UserError(
            f"{type(held.model).__name__} returns no tensor that could be compared. Wrap it so that it returns "
            "tensors, or tuples, lists or dictionaries of tensors."
        )
    return _cloned(outputs), calls


def _hooked(module: nn.Module) -> bool:
    """Tell whether a module or one inside it carries hooks, which a replacement would lose."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(inner, kind, None) for inner in module.modules() for kind in kinds)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _relative(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative L2 error of outputs; infinite where their number or shapes differ."""
    if len(actual) != len(expected) or not expected:
        return math.inf
    worst = 0.0
    for given, wanted in zip(actual, expected, strict=True):
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            return math.inf
        size, difference = wanted.double().norm().item(), (given.double() - wanted.double()).norm().item()
        error = difference / size if size else (0.0 if difference == 0 else math.inf)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _decided(
    path: str, module: nn.Module, calls: Calls, known: dict[Any, Match]
) -> tuple[Decision | None, nn.Module | None]:
    """Find the block that equals a module: the first that no check tells apart.

    Args:
        path: module path.
        module: the module.
        calls: recorded calls.
        known: matches that were accepted for other modules, by names, shapes and class; tried first.

    Returns:
        The decision, or None where shapes rule out every block, and the block in the module's number type.
    """
    shapes = shapes_of(module.state_dict())
    kind = type(module).__name__

    def left(layout: Layout, reason: str, error: float | None = None) -> tuple[Decision, None]:
        return Decision(path, kind, layout.block.name, layout.name, False, reason, error), None

    if not calls:
        match = next(matches(shapes), None)
        if match is None:
            return None, None
        hooks = _hooked(module)
        return left(
            match.layout,
            "it carries hooks, which the block would lose"
            if hooks
            else "the example inputs did not run it, so that nothing could be measured",
        )
    candidates = _candidates(module, shapes, calls, known)
    nearest: tuple[float, Layout, str] | None = None
    checks: _Checks | None = None
    key = (tuple(sorted(shapes.items())), type(module))
    for match, call in candidates:
        try:
            checks = checks or _Checks(module, calls)
        except Exception as failure:  # a user's class can fail in any way
            return left(match.layout, f"it does not run in float64 ({type(failure).__name__}: {failure})")
        error, reason, block = checks.of(match, call)
        if block is not None:
            known[key] = match
            decision = Decision(path, kind, match.layout.block.name, match.layout.name, True, reason, error)
            return decision, block
        if nearest is None or error < nearest[0]:
            nearest = (error, match.layout, reason)
    if nearest is None:
        return None, None
    error, layout, reason = nearest
    return left(layout, reason, error if math.isfinite(error) else None)


def _candidates(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], calls: Calls, known: Mapping[Any, Match]
) -> Iterator[tuple[Match, Call | None]]:
    """Yield blocks with arguments that may equal a module, each once; those that it resembles most come first."""
    numbers = _numbers(module)
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}

    def hints(layout: Layout) -> Hints | None:
        if call_of(module, layout.block.name) is not None:
            return Hints(named=attributes, numbers=numbers)
        if layout.variant.method != "forward":
            return None
        pinned = _pinned(layout, _tensors(calls[0]))
        return None if pinned is None else Hints(pinned, attributes, numbers)

    tried: list[tuple[str, Arguments]] = []
    before = known.get((tuple(sorted(shapes.items())), type(module)))
    if before is not None:
        tried.append((before.layout.block.name, before.arguments))
        yield before, call_of(module, before.layout.block.name)
    found = list(matches(shapes, hints))
    for expand in (False, True):
        for match in found:
            given = hints(match.layout)
            assert given is not None
            for arguments in alternatives(match, shapes, given) if expand else (match.arguments,):
                one = (match.layout.block.name, arguments)
                if one not in tried:
                    tried.append(one)
                    yield Match(match.layout, arguments, match.names), call_of(module, match.layout.block.name)


def _numbers(module: nn.Module) -> tuple[int, ...]:
    """Return the whole numbers among the attributes of a module and the modules inside it: strides, heads, groups."""
    found: dict[int, None] = {}
    for inner in module.modules():
        for value in vars(inner).values():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, int) and not isinstance(number, bool) and 0 < number <= _NUMBER_LIMIT:
                    found[number] = None
    return tuple(found)


def _pinned(layout: Layout, tensors: Sequence[torch.Tensor]) -> Arguments | None:
    """Return the constructor arguments that sizes of a block's inputs decide; None where the inputs do not fit."""
    inputs = layout.block.inputs_of(layout.variant)
    if len(inputs) != len(tensors):
        return None
    arguments = inspect.signature(layout.block.build).parameters
    pinned: dict[str, int] = {}
    for entry, tensor in zip(inputs, tensors, strict=True):
        if len(entry.axes) != tensor.dim():
            return None
        for axis, size in zip(entry.axes, tensor.shape, strict=True):
            if isinstance(axis, int) and axis != size:
                return None
            if isinstance(axis, str) and axis in arguments and pinned.setdefault(axis, size) != size:
                return None
    return pinned


class _Checks:
    """What a block has to reproduce to replace a module.

    Args:
        module: the published module.
        calls: recorded calls.
    """

    def __init__(self, module: nn.Module, calls: Calls) -> None:
        self.module = module
        self.generator = torch.Generator().manual_seed(0)
        trained = copy.deepcopy(module).double()
        changed = copy.deepcopy(trained)
        changed.load_state_dict({name: self._changed(name, value) for name, value in trained.state_dict().items()})
        self.sources = (trained, changed)
        recorded = [self._double(call) for call in calls]
        noise = next(
            (inputs for inputs in self._noises(recorded[0]) if _outputs(trained, inputs) is not None), recorded[0]
        )
        large = tree_map(lambda leaf: leaf * _LARGE if _floating(leaf) else leaf, noise)
        # The recorded call comes first: it refuses most candidates.
        self.cases: list[tuple[int, str, Any, list[torch.Tensor]]] = []
        cases = [(0, "recorded activations", call) for call in recorded]
        for state, words in enumerate(("", " with other weights")):
            cases += [(state, f"noise{words}", noise), (state, f"large noise{words}", large)]
        for state, name, inputs in cases:
            expected = _outputs(self.sources[state], inputs)
            if expected is not None and all(bool(tensor.isfinite().all()) for tensor in expected):
                self.cases.append((state, name, inputs, expected))
            elif name == "recorded activations":
                _run(trained, *_cloned(inputs))  # raises what went wrong
                raise ValueError("its output is not finite")

    def of(self, match: Match, call: Call | None) -> tuple[float, str, nn.Module | None]:
        """Compare a block with the module: largest relative error, what it was or why not, the block if it is equal."""
        worst, reason = 0.0, "equal on recorded activations, noise and other weights"
        blocks: list[nn.Module] = []
        for state, name, inputs, expected in self.cases:
            try:
                while len(blocks) <= state:
                    blocks.append(self._block(match, call, self.sources[len(blocks)]))
                given = _tensors(_run(blocks[state], *inputs))
            except Exception as failure:  # what a wrong candidate raises on foreign input is not known beforehand
                return (
                    math.inf,
                    f"{match.layout.block.name} cannot take its place ({type(failure).__name__}: {failure})",
                    None,
                )
            wanted = expected if call is None or call.outputs is None else expected[: call.outputs]
            error = _relative(given, wanted)
            worst = max(worst, error)
            if error > ROUNDING:
                return worst, f"{match.layout.block.name} differs on {name}", None
        first = next(self.module.parameters(), next(self.module.buffers(), torch.empty(0)))
        return worst, reason, blocks[0].to(first.device, first.dtype)

    def _block(self, match: Match, call: Call | None, source: nn.Module) -> nn.Module:
        """Build a block in float64, with the source's state and epsilons."""
        epsilons = _epsilons(match, source)
        block = match.layout.block.build(**match.arguments).double().eval()
        state = transferred(match, source.state_dict(), epsilons)
        block.load_state_dict({**block.state_dict(), **state})
        if match.layout.adjust is None:
            for path, epsilon in epsilons.items():
                norm = block.get_submodule(path)
                if hasattr(norm, "eps"):
                    norm.eps = epsilon  # type: ignore[assignment]
        first = next(source.parameters(), torch.empty(0))
        wrapped = block if call is None else call.wrap(source, block)
        return wrapped.to(first.device).eval()

    def _changed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return other values for a tensor of a state; variances stay positive."""
        if not value.is_floating_point() or not value.numel():
            return value
        random = torch.rand(value.shape, generator=self.generator, dtype=value.dtype).to(value.device)
        if name.rpartition(".")[2] == "running_var":
            return value * (0.5 + random)
        size = value.square().mean().sqrt().item() or 1.0
        return value + size * (random - 0.5)

    def _double(self, tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.double() if _floating(leaf) else leaf, tree)

    def _noises(self, call: Any) -> Iterator[Any]:
        """Yield random inputs: two examples of other sizes, then of the recorded sizes."""
        tensors = _tensors(call)
        if len(tensors) == 1 and tensors[0].dim() >= 3 and _floating(tensors[0]):
            shape = tensors[0].shape
            # Channels come second in maps and last in sequences; the axes grow differently, so that none is square.
            channels = 1 if len(shape) >= 4 else 2
            for channel_axis in {channels, 3 - channels}:
                sizes = [min(size, _SMALL) + 1 + 2 * axis for axis, size in enumerate(shape)]
                sizes[0], sizes[channel_axis] = 2, shape[channel_axis]
                yield tree_map(lambda leaf, sizes=sizes: self._noise(leaf, sizes), call)
        yield tree_map(lambda leaf: self._noise(leaf, None), call)

    def _noise(self, leaf: Any, sizes: Sequence[int] | None) -> Any:
        if not _floating(leaf) or not bool(leaf.isfinite().all()):
            return leaf
        shape = leaf.shape if sizes is None else sizes
        scale = max(leaf.square().mean().sqrt().item(), 1.0)
        noise = torch.randn(*shape, generator=self.generator, dtype=leaf.dtype)
        for axis in (1, len(shape) - 1):  # channels of maps and of sequences have means of their own, which pools keep
            one = [size if index == axis else 1 for index, size in enumerate(shape)]
            noise = noise + torch.randn(*one, generator=self.generator, dtype=leaf.dtype)
        return (scale * noise).to(leaf.device)


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _outputs(module: nn.Module, inputs: Any) -> list[torch.Tensor] | None:
    """Return what a module gives, or None where it refuses the inputs."""
    try:
        return _tensors(_run(module, *inputs))
    except Exception:  # a user's class can fail in any way
        return None


def _epsilons(match: Match, source: nn.Module) -> dict[str, float]:
    """Return the epsilon of each normalisation of a published module by our module path."""
    found = {}
    for published, ours in match.names.items():
        epsilon = getattr(source.get_submodule(published.rpartition(".")[0]), "eps", None)
        if isinstance(epsilon, float):
            found[ours.rpartition(".")[0]] = epsilon
    return found


def _applied(
    held: _Held,
    accepted: Mapping[str, nn.Module],
    decisions: Iterable[Decision],
    expected: Sequence[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Replacement:
    """Put the blocks into the model; the last of them is taken out again while the model's outputs differ."""
    originals = {path: held.get_submodule(path) for path in accepted}
    places = {
        path: [name for name, module in held.named_modules(remove_duplicate=False) if module is originals[path]]
        for path in accepted
    }
    for path, block in accepted.items():
        for place in places[path]:
            _set(held, place, block)
    kept, verdicts = list(accepted), {decision.path: decision for decision in decisions}
    while True:
        trouble = "the model's output differs with the block in its place"
        try:
            error = _relative(_tensors(_run(held, args, kwargs)), expected)
        except Exception as failure:  # a model that looks into its modules can fail in any way
            if not kept:
                raise
            error, trouble = (
                math.inf,
                f"the model fails with the block in its place ({type(failure).__name__}: {failure})",
            )
        if error <= TOLERANCE or not kept:
            decided = (dataclasses.replace(entry, path=held.inside(path)) for path, entry in verdicts.items())
            return Replacement(held.model, tuple(decided), error)
        path = kept.pop()
        for place in places[path]:
            _set(held, place, originals[path])
        verdicts[path] = dataclasses.replace(verdicts[path], replaced=False, reason=trouble)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
