"""Which tensors of an ONNX form are inputs and outputs of torch modules, call by call.

Every node names the torch modules that it belongs to (`export.metadata.NAME_SCOPES`); repeated calls of a module are
not told apart there, but by order: nodes of one source line recur with every call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import gcd

import onnx

from edgeattn.export.metadata import NAME_SCOPES, metadata_of, module_scopes, parsed_list

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata key of the source lines that a node comes from."""

TRANSPARENT = frozenset({"Cast", "Identity", "QuantizeLinear", "DequantizeLinear"})
"""Operators that change how a tensor is stored, not which tensor of the network it is."""

_FRAME_LINES = 2  # a frame is a line that names the file and a line of source


@dataclass(frozen=True, order=True)
class Place:
    """One tensor at the boundary of one call of a torch module.

    Attributes:
        path: dotted path of the module; for the boundary of the whole network the name of an input or output.
        call: which call of the module, from 0.
        side: "in", "out", or "network".
        index: which of the module's tensors on that side, from 0.
    """

    path: str
    call: int
    side: str
    index: int = 0

    def __str__(self) -> str:
        if self.side == "network":
            return self.path
        call = f" call {self.call + 1}" if self.call else ""
        return f"{self.path}{call}{' input' if self.side == 'in' else ''}"


@dataclass(frozen=True)
class _Step:
    """Nodes of one torch operation, such as the standard operators that a plugin's body became."""

    site: tuple[str, ...]
    nodes: tuple[int, ...]


class ScopedGraph:
    """An ONNX graph seen as calls of torch modules.

    Args:
        model: any form; not modified.

    Attributes:
        scopes: module paths of each node from the root inwards, without the root; empty where it does not say.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        metadata = [metadata_of(node) for node in self.graph.node]
        self.scopes = [[path for path in module_scopes(entry) if path] for entry in metadata]
        self._sites = [_site(entry) for entry in metadata]
        self._leaves = [tuple(parsed_list(entry.get(NAME_SCOPES, "[]"))) for entry in metadata]
        self.producer = {name: index for index, node in enumerate(self.graph.node) for name in node.output if name}
        self._constants = {tensor.name for tensor in self.graph.initializer}

    @property
    def has_metadata(self) -> bool:
        """Whether any node says which module it comes from."""
        return any(self._leaves)

    def owner(self, node: int) -> str:
        """Return the innermost module of a node, `""` for the network itself or an unknown one."""
        return self.scopes[node][-1] if self.scopes[node] else ""

    @cached_property
    def paths(self) -> list[str]:
        """Every module that has nodes, in the order of their first nodes."""
        return list(dict.fromkeys(path for scopes in self.scopes for path in scopes))

    @cached_property
    def computes_batchnorm(self) -> set[str]:
        """Modules whose BatchNormalization is a node of its own, not folded into a convolution."""
        return {self.owner(index) for index, node in enumerate(self.graph.node) if node.op_type == "BatchNormalization"}

    def places(self, calls: Mapping[str, int]) -> dict[Place, str]:
        """Return the tensor at each boundary of each module call that can be told.

        Args:
            calls: how often modules are called, where that is known; otherwise the graph itself has to show it.
        """
        found: dict[Place, str] = {}
        for path, nodes in self._members.items():
            found.update(self._boundary(path, nodes, calls.get(path, self.calls[path])))
        return found

    @cached_property
    def calls(self) -> dict[str, int]:
        """How often each module is called: what divides the number of nodes of each of its source lines."""
        return {
            path: reduce(gcd, (len(steps) for steps in self._by_site(nodes).values()))
            for path, nodes in self._members.items()
        }

    @cached_property
    def silent(self) -> set[str]:
        """Modules with nodes whose results nothing outside them reads."""
        return {path for path, nodes in self._members.items() if not self._leaving(nodes)}

    @cached_property
    def _members(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = defaultdict(list)
        for index, scopes in enumerate(self.scopes):
            for path in scopes:
                members[path].append(index)
        return members

    def source(self, tensor: str) -> str:
        """Return the tensor that another one stores in some other type: back through casts and Q/DQ."""
        while (index := self.producer.get(tensor)) is not None and self.graph.node[index].op_type in TRANSPARENT:
            tensor = self.graph.node[index].input[0]
        return tensor

    @cached_property
    def _readers(self) -> dict[str, set[int]]:
        """Nodes that read a tensor, directly or through casts and Q/DQ; -1 stands for a graph output."""
        readers: dict[str, set[int]] = defaultdict(set)
        for index, node in enumerate(self.graph.node):
            if node.op_type not in TRANSPARENT:
                for name in node.input:
                    readers[self.source(name)].add(index)
        for value in self.graph.output:
            readers[self.source(value.name)].add(-1)
        return readers

    def _boundary(self, path: str, nodes: Sequence[int], calls: int) -> dict[Place, str]:
        """Return the tensors that enter and leave each call of one module."""
        by_site = self._by_site(nodes)
        out: dict[Place, str] = {}
        for side, found in (("out", self._leaving(nodes)), ("in", self._entering(nodes))):
            out.update(self._calls(path, side, found, by_site, calls))
        return out

    def _leaving(self, nodes: Sequence[int]) -> list[tuple[_Step, int, int]]:
        """Return step, place in it from the end, and slot of the results that something outside reads."""
        inside = set(nodes)
        return [
            (step, from_end, slot)
            for step, from_end, node in self._walk(nodes)
            for slot, name in enumerate(node.output)
            if name and not self._readers[name] <= inside
        ]

    def _entering(self, nodes: Sequence[int]) -> list[tuple[_Step, int, int]]:
        """Return step, place in it from the end, and slot of the operands that come from outside."""
        inside = set(nodes)
        found = []
        for step, from_end, node in self._walk(nodes):
            for slot, name in enumerate(node.input):
                source = self.source(name)
                if name and source not in self._constants and self.producer.get(source, -1) not in inside:
                    found.append((step, from_end, slot))
        return found

    def _walk(self, nodes: Sequence[int]) -> Iterator[tuple[_Step, int, onnx.NodeProto]]:
        for step in self._steps(nodes):
            for place, index in enumerate(step.nodes):
                if self.graph.node[index].op_type not in TRANSPARENT:
                    yield step, place - len(step.nodes), self.graph.node[index]

    def _by_site(self, nodes: Sequence[int]) -> dict[tuple[str, ...], list[_Step]]:
        by_site: dict[tuple[str, ...], list[_Step]] = defaultdict(list)
        for step in self._steps(nodes):
            by_site[step.site].append(step)
        return by_site

    def _steps(self, nodes: Sequence[int]) -> list[_Step]:
        grouped: dict[object, list[int]] = {}
        for index in nodes:
            grouped.setdefault(self._leaves[index], []).append(index)
        return [_Step(self._sites[members[0]], tuple(members)) for members in grouped.values()]

    def _calls(
        self,
        path: str,
        side: str,
        found: Iterable[tuple[_Step, int, int]],
        by_site: Mapping[tuple[str, ...], Sequence[_Step]],
        calls: int,
    ) -> dict[Place, str]:
        """Carry boundary tensors over from the call where they were seen to the same step of every other call."""
        tensors: dict[tuple[tuple[str, ...], int, int, int], list[str]] = {}
        for step, from_end, slot in found:
            peers = by_site[step.site]
            if len(peers) % calls:
                continue  # some call lacks this step
            period = len(peers) // calls
            residue = peers.index(step) % period
            chosen = peers[residue::period]
            names = [self._tensor(peer, from_end, slot, side) for peer in chosen]
            tensors.setdefault((step.site, residue, from_end, slot), names)
        result: dict[Place, str] = {}
        for call in range(calls):
            unique = dict.fromkeys(names[call] for names in tensors.values() if names[call])
            result.update({Place(path, call, side, index): name for index, name in enumerate(unique)})
        return result

    def _tensor(self, step: _Step, from_end: int, slot: int, side: str) -> str:
        if -from_end > len(step.nodes):
            return ""
        node = self.graph.node[step.nodes[from_end]]
        names = node.output if side == "out" else node.input
        if slot >= len(names):
            return ""
        return names[slot] if side == "out" else self.source(names[slot])


def _site(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return what nodes of the same source line have in common, in whichever call of their module."""
    # Only the innermost frame: the lines further out tell where the module was called from.
    frame = metadata.get(STACK_TRACE, "").strip().splitlines()[-_FRAME_LINES:]
    return (*module_scopes(metadata), *frame)
