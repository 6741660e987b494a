"""Which block a state belongs to: published names and shapes in, blocks with constructor arguments out.

Every variant of every block is a layout: a key map to our names, and the constructor arguments that were declared with
it (for tests, listings, references, benchmarks) as starting points. Names decide which layouts come into question; then
the arguments are changed one at a time towards the observed shapes. What shapes do not show (a stride, the order of two
pooled maps) is left to `alternatives`, for a caller who can measure which of them is right.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Variant

Shapes = Mapping[str, tuple[int, ...]]
"""Shape by name of a state's tensors, without the counters of batch normalisation."""

State = dict[str, Tensor]

COUNTER = "num_batches_tracked"
_LAYERS = frozenset({"abn", "carafe", "lstm", "gru", "lstm-cell", "gru-cell"})
"""Declared blocks that are layers of any network rather than attention; their states are everywhere."""
_FLIP_LIMIT = 24  # tensors; larger blocks are whole networks, whose options are not tried
_COMMON = (1, 2, 3, 4, 8)
_BUILT: dict[object, Shapes | None] = {}  # shapes by block and arguments; many layouts try the same ones
_BUILT_LIMIT = 20_000
_ALTERNATIVES_LIMIT = 400


@dataclass(frozen=True)
class Layout:
    """One published form of a block's state.

    Attributes:
        block: the block.
        variant: the variant whose inputs and method apply.
        name: the variant's name, or that of a further layout.
        key_map: replacement template by pattern, from published names to ours.
        arguments: constructor arguments to start from.
        trailing_axes: shapes may differ by axes of size 1 at the end.
        adjust: exact change of the renamed state for constants that the block fixes; takes the state and the published
            module's epsilons by our module path.
    """

    block: BlockSpec
    variant: Variant
    name: str
    key_map: Mapping[str, str]
    arguments: tuple[Arguments, ...]
    trailing_axes: bool = False
    adjust: Callable[[State, Mapping[str, float]], State] | None = None

    def renamed(self, names: Iterable[str]) -> dict[str, str] | None:
        """Return our name by published name, or None where two names or none would come out."""
        ours: dict[str, str] = {}
        for name in names:
            ours[name] = next(
                (
                    new
                    for pattern, text in self.key_map.items()
                    for new, n in [re.subn(pattern, text, name, count=1)]
                    if n
                ),
                name,
            )
        return ours if len(set(ours.values())) == len(ours) and all(ours.values()) else None


@dataclass(frozen=True)
class Hints:
    """What is known of a module beside its state.

    Attributes:
        pinned: constructor arguments that are certain.
        named: values by attribute name, tried first where a constructor argument has the name.
        numbers: whole numbers that occur in the module, such as strides.
    """

    pinned: Arguments = field(default_factory=dict)
    named: Arguments = field(default_factory=dict)
    numbers: tuple[int, ...] = ()


NO_HINTS = Hints()


@dataclass(frozen=True)
class Match:
    """A block whose state has the observed names and shapes.

    Attributes:
        layout: the layout that matched.
        arguments: constructor arguments.
        names: our name by published name.
    """

    layout: Layout
    arguments: Arguments
    names: Mapping[str, str]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state's tensors without its counters."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.rpartition(".")[2] != COUNTER}


def _match_epsilon(state: State, epsilons: Mapping[str, float]) -> State:
    """Scale what enters a context block's LayerNorm, which has epsilon 1e-5, so that another epsilon is met exactly.

    norm(s h; e) = norm(h; e / s^2).
    """
    changed = dict(state)
    for path, epsilon in epsilons.items():
        parent, _, _ = path.rpartition(".")
        for name in (f"{parent}.0.weight", f"{parent}.0.bias"):
            changed[name] = changed[name] * math.sqrt(1e-5 / epsilon)
    return changed


@dataclass(frozen=True)
class _Further:
    """A layout that no variant declares: the variant it is a form of, and the fields of `Layout`."""

    block: str
    variant: str
    name: str
    key_map: Mapping[str, str]
    arguments: tuple[Arguments, ...]
    trailing_axes: bool = False
    adjust: Callable[[State, Mapping[str, float]], State] | None = None


_CONTEXT: Arguments = {"inplanes": 8, "ratio": 0.5}
_FURTHER = (
    _Further(
        "global-context",
        "mul",
        "timm",
        {
            r"^conv_attn\.": "conv_mask.",
            r"^mlp_scale\.fc1\.": "channel_mul_conv.0.",
            r"^mlp_scale\.norm\.": "channel_mul_conv.1.",
            r"^mlp_scale\.fc2\.": "channel_mul_conv.3.",
            r"^mlp_add\.fc1\.": "channel_add_conv.0.",
            r"^mlp_add\.norm\.": "channel_add_conv.1.",
            r"^mlp_add\.fc2\.": "channel_add_conv.3.",
        },
        tuple(
            {**_CONTEXT, "pooling_type": pooling, "fusion_types": fusion}
            for pooling in ("att", "avg")
            for fusion in (("channel_mul",), ("channel_add",), ("channel_add", "channel_mul"))
        ),
        trailing_axes=True,
        adjust=_match_epsilon,
    ),
    _Further(
        "squeeze-excitation",
        "timm",
        "timm-efficientnet",
        {r"^conv_reduce\.": "fc.0.", r"^conv_expand\.": "fc.2."},
        ({"channel": 8, "hidden": 3, "bias": True, "convolutions": True},),
    ),
)


@functools.cache
def layouts() -> tuple[Layout, ...]:
    """Return every layout of every attention block whose state holds something, those of variants first."""
    declared = [
        Layout(block, variant, variant.name, variant.key_map, _declared(variant))
        for block in BLOCKS
        if block.name not in _LAYERS
        for variant in block.variants
    ]
    for extra in _FURTHER:
        block = BLOCKS.get(extra.block)
        variant = block.variant(extra.variant)
        declared.append(
            Layout(block, variant, extra.name, extra.key_map, extra.arguments, extra.trailing_axes, extra.adjust)
        )
    return tuple(declared)


def _declared(variant: Variant) -> tuple[Arguments, ...]:
    """Return the constructor arguments that a variant mentions."""
    published = [] if variant.published is None else [variant.published.arguments]
    return (variant.arguments, *variant.references.values(), *variant.listings.values(), *published)


_FILLS = frozenset(
    {
        *(getattr(torch.nn.init, name) for name in dir(torch.nn.init) if re.fullmatch(r"[a-z]\w*_", name)),
        *(Tensor.copy_, Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_),
    }
)
_DRAWS = (torch.rand, torch.randn)


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors, the larger part of building a module whose shapes alone are asked for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return torch.empty(*args, **kwargs) if func in _DRAWS else func(*args, **kwargs)


def shapes_when_built(block: BlockSpec, arguments: Arguments, *, declared: bool = False) -> Shapes | None:
    """Return the shapes of the state that arguments give, or None where the block refuses them.

    Args:
        block: the block.
        arguments: constructor arguments.
        declared: the arguments are declared ones, or nearly, whose module fits into memory. It is built there, where
            memory that nothing fills costs nothing, rather than without memory: the operators of some constructors
            would make torch import its compiler for that, which takes longer than all the rest.
    """
    key = (block.name, tuple(sorted((name, repr(value)) for name, value in arguments.items())))
    if key not in _BUILT:
        if len(_BUILT) > _BUILT_LIMIT:
            _BUILT.clear()
        try:
            place = contextlib.nullcontext() if declared else torch.device("meta")
            with place, _Unfilled(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a size of zero on the way to the right one
                _BUILT[key] = shapes_of(block.build(**arguments).state_dict())
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            _BUILT[key] = None
    return _BUILT[key]


@functools.cache
def _by_count() -> Mapping[int, tuple[tuple[Layout, Mapping[frozenset[str], tuple[Arguments, ...]]], ...]]:
    """Return, per number of tensors, the layouts that have so many, with starting arguments by set of our names."""
    found: dict[int, dict[int, tuple[Layout, dict[frozenset[str], list[Arguments]]]]] = {}
    built: dict[int, dict[str, frozenset[str] | None]] = {}
    for index, layout in enumerate(layouts()):
        seen = built.setdefault(id(layout.block), {})
        starts = [dict(arguments) for arguments in layout.arguments]
        tensors = len(shapes_when_built(layout.block, starts[0], declared=True) or ())
        for start in (*starts, *(_flipped(layout) if tensors <= _FLIP_LIMIT else ())):
            key = repr(sorted(start.items(), key=lambda item: item[0]))
            if key not in seen:
                shapes = shapes_when_built(layout.block, start, declared=True)
                seen[key] = None if shapes is None else frozenset(shapes)
            names = seen[key]
            if names:
                _, per_names = found.setdefault(len(names), {}).setdefault(index, (layout, {}))
                if start not in per_names.setdefault(names, []):
                    per_names[names].append(start)
    return {
        count: tuple((layout, {names: tuple(starts) for names, starts in per.items()}) for layout, per in by.values())
        for count, by in found.items()
    }


def _flipped(layout: Layout) -> Iterator[Arguments]:
    """Yield the first starting arguments with each boolean option the other way round, and each two of them."""
    start = dict(layout.arguments[0])
    options = {
        name: not start.get(name, parameter.default)
        for name, parameter in inspect.signature(layout.block.build).parameters.items()
        if isinstance(start.get(name, parameter.default), bool)
    }
    for count in (1, 2):
        for names in itertools.combinations(options, count):
            yield {**start, **{name: options[name] for name in names}}


def named_like(names: Shapes) -> Iterator[tuple[Layout, Mapping[str, str], tuple[Arguments, ...]]]:
    """Yield the layouts whose names a state has: the layout, our name by published name, starting arguments."""
    for layout, starts in _by_count().get(len(names), ()):
        ours = layout.renamed(names)
        if ours is not None and (fitting := starts.get(frozenset(ours.values()))):
            yield layout, ours, fitting


def matches(shapes: Shapes, hints: Callable[[Layout], Hints | None] | None = None) -> Iterator[Match]:
    """Yield the blocks, with constructor arguments, whose state has the published names and shapes.

    Args:
        shapes: published name to shape.
        hints: what else is known, by layout; None where the layout is out of the question.
    """
    for layout, names, starts in named_like(shapes):
        known = NO_HINTS if hints is None else hints(layout)
        if known is None:
            continue
        wanted = {names[name]: shape for name, shape in shapes.items()}
        solved: set[str] = set()
        for start in starts:
            options = repr(sorted((name, value) for name, value in start.items() if not _is_number(value)))
            if options in solved:
                continue
            arguments = _solved(layout, start, wanted, known)
            if arguments is not None:
                solved.add(options)
                yield Match(layout, arguments, names)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _distance(layout: Layout, arguments: Arguments, wanted: Shapes) -> float:
    """Return how far the shapes that arguments give are from the wanted ones; 0 is equal, infinite is not built."""
    shapes = shapes_when_built(layout.block, arguments)
    if shapes is None or shapes.keys() != wanted.keys():
        return math.inf
    total = 0.0
    for name, shape in shapes.items():
        given, target = _comparable(shape, layout), _comparable(wanted[name], layout)
        if len(given) != len(target):
            return math.inf
        total += sum(abs(math.log(max(a, 1e-3) / max(b, 1e-3))) for a, b in zip(given, target, strict=True))
    return total


def _comparable(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return a shape as it is compared: () is (1,), and axes of size 1 at the end may not count."""
    if layout.trailing_axes:
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
    return shape or (1,)


def _solved(layout: Layout, start: Arguments, wanted: Shapes, hints: Hints) -> Arguments | None:
    """Return arguments that give the wanted shapes: the best single change is made until none is left to make."""
    parameters = inspect.signature(layout.block.build).parameters
    named = {
        name: value
        for name, value in hints.named.items()
        if name in parameters and type(value) is type(start.get(name, parameters[name].default))
    }
    sizes = sorted({size for shape in wanted.values() for size in shape if size > 0})
    quotients = sorted({a // b for a in sizes for b in sizes if a % b == 0})
    whole = list(dict.fromkeys((*hints.numbers, *sizes, *quotients, *_COMMON)))
    ratios = sorted({b / a for a in sizes for b in sizes if b < a})
    domains: dict[str, Sequence[float]] = {}
    for name, parameter in parameters.items():
        annotation = str(parameter.annotation)
        if name in hints.pinned or any(word in annotation for word in ("Sequence", "tuple", "str", "bool")):
            continue
        if "int" in annotation:
            domains[name] = whole
        elif "float" in annotation and "ratio" in name:
            domains[name] = ratios
    pinned = {name: value for name, value in hints.pinned.items() if name in parameters}
    for begin in ({**start, **named, **pinned}, {**start, **pinned}):
        found = _descended(layout, begin, wanted, domains)
        if found is not None:
            return found
    return None


def _descended(
    layout: Layout, begin: Arguments, wanted: Shapes, domains: Mapping[str, Sequence[float]]
) -> Arguments | None:
    """Set each argument in turn to the value that brings the shapes nearest, until they are equal or none helps."""
    current, best = dict(begin), _distance(layout, begin, wanted)
    while best > 0:
        before = best
        for name, domain in domains.items():
            known: set[float] = {best}
            for tried, value in enumerate(domain):
                distance = _distance(layout, {**current, name: value}, wanted)
                if distance < best:
                    current, best = {**current, name: value}, distance
                if best == 0:
                    return current
                known.add(distance)
                if tried == 2 and known == {best} and best < math.inf:
                    break  # shapes do not show this argument
        if best == before:
            return None
    return current


def alternatives(match: Match, shapes: Shapes, hints: Hints) -> Iterator[Arguments]:
    """Yield the arguments of a match and all that give the same shapes by options that shapes do not show.

    Few changes come first. Options are both values of a boolean, the texts and numbers that the block's layouts
    mention, and the whole numbers of the hints.
    """
    layout, base = match.layout, match.arguments
    wanted = {match.names[name]: shape for name, shape in shapes.items()}
    mentioned: dict[str, list[Any]] = {}
    for other in layouts():
        if other.block is layout.block:
            for arguments in other.arguments:
                for name, value in arguments.items():
                    mentioned.setdefault(name, []).append(value)
    free: dict[str, list[Any]] = {}
    for name, parameter in inspect.signature(layout.block.build).parameters.items():
        current = base.get(name, parameter.default)
        if name in hints.pinned:
            continue
        values: list[Any] = [parameter.default, *mentioned.get(name, [])]
        if isinstance(current, bool):
            values = [not current]
        elif "int" in str(parameter.annotation) and "Sequence" not in str(parameter.annotation):
            values += list(hints.numbers)
        elif "float" in str(parameter.annotation) and isinstance(hints.named.get(name), float):
            values.append(hints.named[name])
        unseen = [value for i, value in enumerate(values) if value != current and value not in values[:i]]
        options = [
            value
            for value in unseen
            if value is not inspect.Parameter.empty and _distance(layout, {**base, name: value}, wanted) == 0
        ]
        if options:
            free[name] = options
    yield base
    produced = 1
    for count in range(1, len(free) + 1):
        for names in itertools.combinations(free, count):
            for values_ in itertools.product(*(free[name] for name in names)):
                changed = {**base, **dict(zip(names, values_, strict=True))}
                if count > 1 and _distance(layout, changed, wanted) != 0:
                    continue
                yield changed
                produced += 1
                if produced >= _ALTERNATIVES_LIMIT:
                    return


def transferred(match: Match, state: Mapping[str, Tensor], epsilons: Mapping[str, float]) -> State:
    """Return a published state by our names, in our shapes.

    Args:
        match: the block that the state belongs to.
        state: tensors by published name.
        epsilons: of the published module's normalisations, by our module path.
    """
    expected = shapes_when_built(match.layout.block, match.arguments)
    assert expected is not None  # a match was built
    ours = {match.names[name]: tensor for name, tensor in state.items() if name in match.names}
    shaped = {name: tensor.detach().reshape(expected[name]) for name, tensor in ours.items()}
    return match.layout.adjust(shaped, epsilons) if match.layout.adjust else shaped
