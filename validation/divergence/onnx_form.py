"""An ONNX form as a side of a comparison: it can be looked at, and taken apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from edgeattn.export.calibration import input_shapes
from edgeattn.export.model_file import load_model
from edgeattn.foundation import UserError
from edgeattn.validation.divergence.forms import Arrays, Outline, Sink
from edgeattn.validation.divergence.scopes import Place, ScopedGraph
from edgeattn.validation.divergence.segments import Dissection, Segment, Sessions, Walk
from edgeattn.validation.runners import FormFacts, facts_of


class OnnxForm:
    """An ONNX file, FP16 and BF16 emulated with rounding after every operation, Q/DQ computed as written.

    Args:
        path: the file.
        sessions: prepared segments, shared between forms that are compared one after the other.

    Raises:
        UserError: it does not exist or is no ONNX model.
    """

    def __init__(self, path: Path, *, sessions: Sessions | None = None) -> None:
        self.path, self.name = path, path.name
        model = load_model(path)
        self.facts: FormFacts = facts_of(model, path)
        self.graph = ScopedGraph(model)
        self.dissection = Dissection(model, reduced=self.facts.fp16 or self.facts.bf16)
        self.sessions = sessions or Sessions()
        self.inputs = input_shapes(model)
        self.outputs = tuple(value.name for value in model.graph.output)
        self._cuts: dict[frozenset[str], list[Segment]] = {}
        self._places: dict[Place, str] = {}

    @property
    def precision(self) -> str:
        """Precision that the graph holds: "int8", "bf16", "fp16" or "fp32"."""
        return "int8" if self.facts.qdq else "bf16" if self.facts.bf16 else "fp16" if self.facts.fp16 else "fp32"

    def feed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return what the form takes of some inputs; what it takes as FP16 is rounded to it.

        Raises:
            UserError: an input is missing or of another shape.
        """
        fed = {}
        for name, shape in self.inputs.items():
            if name not in arrays:
                raise UserError(f"the data has no input {name!r} for {self.path}; it holds {', '.join(arrays)}.")
            array = arrays[name]
            fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
            if not fits:
                takes = "x".join("?" if size is None else str(size) for size in shape)
                given = "x".join(map(str, array.shape))
                raise UserError(
                    f"{self.path} takes {takes} as input {name}, but the data has {given}. Give data of that size, or "
                    "a form of the size of the data."
                )
            fed[name] = array.astype(np.float16).astype(np.float32) if name in self.facts.half_inputs else array
        return fed

    def outline(self, graph: ScopedGraph, feed: Arrays) -> Outline:
        """Return the module boundaries, or the tensors by name where one of the graphs has no module paths."""
        if not (graph.has_metadata and self.graph.has_metadata):
            self._places = self.named_places
            return Outline(dict.fromkeys(self._places))
        self._places = self.module_places({})
        leaves = {self.graph.owner(index) for index in range(len(self.graph.graph.node))} - {""}
        return Outline(dict.fromkeys(self._places), leaves=leaves)

    def module_places(self, calls: Mapping[str, int]) -> dict[Place, str]:
        """Return the FP32 tensors at the boundaries of module calls, in the order of computation.

        Args:
            calls: how often modules are called, where that is known.
        """
        places = self.graph.places(calls)
        found = {place: name for place, name in places.items() if self.dissection.is_float(name)}
        return dict(sorted(found.items(), key=lambda item: self.dissection.position(item[1])))

    @property
    def named_places(self) -> dict[Place, str]:
        """Every computed FP32 tensor under its own name."""
        names = (name for name in self.graph.producer if self.dissection.is_float(name))
        return {Place(name, 0, "tensor"): name for name in names}

    def cut(self, tensors: Collection[str]) -> list[Segment]:
        """Return the segments that end in these tensors and in the outputs."""
        key = frozenset((*tensors, *self.outputs))
        if key not in self._cuts:
            self._cuts[key] = self.dissection.cut(key)
        return self._cuts[key]

    def run(self, feed: Arrays, wanted: Collection[Place], sink: Sink) -> dict[str, np.ndarray]:
        """Compute segment by segment; a tensor that is neither wanted nor still needed is not kept."""
        places: dict[str, list[Place]] = defaultdict(list)
        for place in wanted:
            places[self._places[place]].append(place)
        segments = self.cut(places)
        walk = Walk(segments, kept=self.outputs)
        given = self.feed(feed)
        for name, array in given.items():
            for place in places.get(name, ()):
                sink(place, array)
        for segment in segments:
            array = self.sessions.run(segment, {**given, **walk.values})
            walk.put(segment.output, array)
            for place in places.get(segment.output, ()):
                sink(place, array)
            walk.finish(segment)
        return {name: walk.values[name] for name in self.outputs}

    def values(self, feed: Arrays, names: Collection[str]) -> dict[str, np.ndarray]:
        """Return those of some tensors that the form computes, by name."""
        chosen = {name for name in names if self.dissection.is_float(name) and name in self.graph.producer}
        self._places = self.named_places
        found: dict[str, np.ndarray] = {}
        self.run(
            feed, [Place(name, 0, "tensor") for name in chosen], lambda place, array: found.update({place.path: array})
        )
        return found

    def depends(self, feed: Arrays, result: Place, cause: Place) -> bool:
        """Tell whether nodes lead from one tensor to another."""
        end = result.path if result.side == "network" else self._places[result]
        return self.dissection.leads(self._places[cause], end)

    def unmarked(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs of the form as one graph, as it is used: no inner tensor is an output.

        Raises:
            SegmentError: ONNX Runtime cannot run it.
        """
        return dict(zip(self.outputs, self.sessions.run_all(self.whole, self.feed(feed)), strict=True))

    @cached_property
    def whole(self) -> Segment:
        """The graph in one piece."""
        return Segment(tuple(self.inputs), self.outputs[0], (), "", self.dissection.model)


def require_same_inputs(first: OnnxForm, names: Sequence[str], other: str) -> None:
    """Refuse forms that take different inputs.

    Raises:
        UserError: the message names both sets.
    """
    if set(first.inputs) != set(names):
        raise UserError(
            f"{first.path} takes the inputs {', '.join(first.inputs)}, but {other} takes {', '.join(names)}: they are "
            "not two forms of one model. Give forms that were exported from the same model."
        )
