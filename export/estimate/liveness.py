"""The activation memory that a graph needs: buffers placed one after another in an arena, as the runtime would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeattn.export.estimate.fusion import FusedGraph

_ALIGNMENT = 256


@dataclass(frozen=True)
class ActivationMemory:
    """What activations take.

    Attributes:
        arena_bytes: size of the arena that holds every intermediate result and workspace, gaps included.
        live_bytes: most of it that is in use at one time: no arrangement of buffers takes less.
        output_bytes: the graph's outputs, which lie outside of the arena from beginning to end.
        peak_layer: layer at which the arena is fullest.
    """

    arena_bytes: int
    live_bytes: int
    output_bytes: int
    peak_layer: int


class _Arena:
    """Places each buffer in the smallest gap that holds it, or at the end."""

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[int, int]] = {}
        self.size = 0
        self.live = 0

    def add(self, name: str, size: int) -> None:
        """Place a buffer."""
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        place, best, end = None, None, 0
        for start, extent in sorted(self._blocks.values()):
            gap = start - end
            if gap >= size and (best is None or gap < best):
                place, best = end, gap
            end = max(end, start + extent)
        place = end if place is None else place
        self._blocks[name] = place, size
        self.size = max(self.size, place + size)
        self.live += size

    def rename(self, old: str, new: str) -> None:
        """Let a buffer go on under another name."""
        self._blocks[new] = self._blocks.pop(old)

    def free(self, name: str) -> None:
        """Take a buffer out, if it is there."""
        self.live -= self._blocks.pop(name, (0, 0))[1]


def activation_memory(fused: FusedGraph, bytes_of: Callable[[str], int], workspaces: Sequence[int]) -> ActivationMemory:
    """Return what the activations of a graph take.

    A buffer lives from the layer that writes it to the last one that reads it. A pointwise layer writes over a buffer
    of the same size that only it reads. Inputs belong to the caller and constants to the engine.

    Args:
        fused: layers in execution order.
        bytes_of: size of a buffer.
        workspaces: bytes that each layer needs for itself.
    """
    last: dict[str, int] = {}
    readers = Counter(name for layer in fused.layers for name in layer.reads)
    for index, layer in enumerate(fused.layers):
        last.update(dict.fromkeys((*layer.writes, *layer.reads), index))
    outputs = {fused.buffers.get(name, name) for name in fused.graph.outputs}
    inner = {name for layer in fused.layers for name in layer.writes} - outputs
    arena, live, place = _Arena(), 0, 0
    for index, layer in enumerate(fused.layers):
        dying = [name for name in layer.reads if last[name] == index and name in inner]
        reusable = [name for name in layer.in_place if name in dying and readers[name] == 1 and layer.product is None]
        for name in layer.writes:
            if name not in inner:
                continue
            source = next((old for old in reusable if bytes_of(old) == bytes_of(name)), None)
            if source is None:
                arena.add(name, bytes_of(name))
            else:
                reusable.remove(source)
                arena.rename(source, name)
        if workspaces[index]:
            arena.add("", workspaces[index])
        if arena.live > live:
            live, place = arena.live, index
        for name in ("", *dying, *(name for name in layer.writes if last[name] == index)):
            arena.free(name)
    return ActivationMemory(arena.size, live, sum(bytes_of(name) for name in outputs & set(last)), place)
