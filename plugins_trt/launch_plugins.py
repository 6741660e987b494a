"""`LaunchPlugin`: one launch of an operation as a plugin of its own.

TensorRT's Python ahead-of-time plugins run one kernel each and have no workspace. An operation of several launches
becomes a chain of such plugins, with its workspaces as tensors between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from edgeattn.plugins_trt.expressions import names_in, tokens
from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import Launch, PluginSpec

Extent = TypeVar("Extent")


@dataclass(frozen=True)
class LaunchTensor:
    """A tensor that a launch reads or writes.

    Attributes:
        name: name of the input, output or workspace.
        axes: one expression per axis, over sizes and the tiling's constants.
        follows_layout: whether it may come channels-last.
        element: "float32", or "data" for the type of the operation's tensors.
    """

    name: str
    axes: tuple[str, ...]
    follows_layout: bool
    element: str


@dataclass(frozen=True)
class LaunchPlugin:
    """A launch with the tensors on its two sides.

    Attributes:
        spec: the operation.
        launch: which of its launches.
        reads: what the kernel reads, in the order of its parameters.
        writes: what it writes, likewise.
    """

    spec: PluginSpec
    launch: Launch
    reads: tuple[LaunchTensor, ...]
    writes: tuple[LaunchTensor, ...]

    @property
    def name(self) -> str:
        """Operator name in ONNX and TensorRT, such as `CoAttentionGatedMerge`."""
        return self.spec.name + "".join(part.capitalize() for part in self.launch.name.split("_"))

    @property
    def follows_layout(self) -> bool:
        """Whether any of its tensors may come channels-last."""
        return any(tensor.follows_layout for tensor in (*self.reads, *self.writes))

    @property
    def shape_constants(self) -> frozenset[str]:
        """Names of the tiling's constants that shapes of workspaces depend on."""
        axes = [axis for tensor in (*self.reads, *self.writes) for axis in tensor.axes]
        return frozenset(name for axis in axes for name in names_in(axis)) - _size_names(self.spec)

    def sizes(self, shapes: Mapping[str, Sequence[Extent]]) -> dict[str, Extent]:
        """Return the sizes that can be read off the shapes of what the launch reads.

        Args:
            shapes: shape of every tensor of `reads`, by name: integers, or symbolic sizes.
        """
        found: dict[str, Extent] = {}
        for tensor in self.reads:
            for axis, extent in zip(tensor.axes, shapes[tensor.name], strict=True):
                if axis in _size_names(self.spec):
                    found.setdefault(axis, extent)
        return found


def launch_plugins(specs: Iterable[PluginSpec] = PLUGINS) -> Iterator[LaunchPlugin]:
    """Yield the launches of operations as plugins, in order; nothing for an operation without kernels."""
    for spec in specs:
        yield from launch_plugins_of(spec)


@cache
def launch_plugins_of(spec: PluginSpec) -> tuple[LaunchPlugin, ...]:
    """Return the launches of an operation as plugins, in order.

    Raises:
        ValueError: a launch needs a size that it cannot see in the shapes of what it reads.
    """
    tensors = {
        tensor.name: LaunchTensor(tensor.name, tensor.shape, tensor.follows_layout, "data")
        for tensor in (*spec.inputs, *spec.outputs)
    }
    for buffer in spec.workspaces:
        axes = tuple(axis for extent in buffer.shape for axis in _split(extent))
        tensors[buffer.name] = LaunchTensor(buffer.name, axes, False, buffer.element)
    plugins = tuple(
        LaunchPlugin(
            spec,
            launch,
            tuple(tensors[name] for name in launch.reads),
            tuple(tensors[name] for name in launch.writes),
        )
        for launch in spec.launches
    )
    for plugin in plugins:
        _check(plugin)
    return plugins


def _split(extent: str) -> list[str]:
    """Split an axis that is a product of sizes into one axis for each.

    Buffers are dense, so nothing moves in memory; but every size is then there to be read by the launches that follow.
    """
    names = [str(token.value) for token in tokens(extent) if token.kind == "name"]
    operations = [token.value for token in tokens(extent) if token.kind != "name"]
    return names if operations == ["*"] * (len(names) - 1) else [extent]


@cache
def _size_names(spec: PluginSpec) -> frozenset[str]:
    return frozenset(symbol for tensor in spec.inputs for symbol in tensor.shape) - {"1"}


def _check(plugin: LaunchPlugin) -> None:
    launch = plugin.launch
    seen = {axis for tensor in plugin.reads for axis in tensor.axes}
    needed = {
        "grid": launch.grid,
        "scalars": launch.scalars,
        "constants": launch.constants.values(),
        "outputs": [axis for tensor in plugin.writes for axis in tensor.axes],
    }
    for what, texts in needed.items():
        hidden = {name for text in texts for name in names_in(text)} & _size_names(plugin.spec) - seen
        if hidden:
            raise ValueError(
                f"{plugin.name}: its {what} depend on {', '.join(sorted(hidden))}, but no tensor that the launch reads "
                "has an axis of that size"
            )
