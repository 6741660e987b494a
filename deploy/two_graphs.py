"""What networks of two graphs share: the names of their files, and their forms in FP16 and INT8."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from edgeattn.deploy.pipeline import RANGE_COUNT, save_model
from edgeattn.export.block_policies import declared_exclusions
from edgeattn.export.calibration import MINIMUM, CalibrationSamples, input_shapes, input_types
from edgeattn.export.calibration_statistics import lean_session
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import Int8Options, NothingToQuantiseError, quantise
from edgeattn.export.precision_types import FP16
from edgeattn.export.ranges import MeasuredRanges, measure_ranges
from edgeattn.export.surgery import inline_plugins
from edgeattn.foundation import UserError
from edgeattn.plugins_trt import DOMAIN

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GraphFile:
    """One file of a graph.

    Attributes:
        graph: name of the graph.
        path: the file, `GRAPH[.plugin][.PRECISION].onnx`.
        precision: "fp32", "fp16" or "int8".
        plugin: it holds nodes of domain `edgeattn`.
    """

    graph: str
    path: Path
    precision: str
    plugin: bool


def save_graphs(graphs: Mapping[str, onnx.ModelProto], folder: Path, precision: str) -> tuple[GraphFile, ...]:
    """Write graphs in standard operators, and where they have plugin nodes also as they are.

    Args:
        graphs: plugin form by name.
        folder: where to; created when missing.
        precision: "fp32", "fp16" or "int8".

    Returns:
        The files, those in standard operators first.
    """
    ending = ".onnx" if precision == "fp32" else f".{precision}.onnx"
    plugins = {name for name, graph in graphs.items() if any(node.domain == DOMAIN for node in graph.graph.node)}
    plain = {name: inline_plugins(graph) if name in plugins else graph for name, graph in graphs.items()}
    return (
        *(
            GraphFile(name, save_model(graph, folder / f"{name}{ending}"), precision, plugin=False)
            for name, graph in plain.items()
        ),
        *(
            GraphFile(name, save_model(graph, folder / f"{name}.plugin{ending}"), precision, plugin=True)
            for name, graph in graphs.items()
            if name in plugins
        ),
    )


def remove_others(folder: Path, graphs: Iterable[str], kept: Iterable[GraphFile]) -> None:
    """Remove files of graphs that an earlier run wrote, say in another precision, and this one did not.

    Args:
        folder: where they are.
        graphs: names of the graphs.
        kept: what stays.
    """
    names = {file.path.name for file in kept}
    for graph, plugin, precision in itertools.product(graphs, ("", ".plugin"), ("", ".fp16", ".int8")):
        if (name := f"{graph}{plugin}{precision}.onnx") not in names:
            (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class TypicalUse:
    """Images on which reduced precision is calibrated; features are computed anew by every loop over them.

    Attributes:
        groups: typical images, each (1, 3, height, width) and preprocessed, in groups that are used together.
        feeds: inputs of the second graph by name, from the features (images, channels, h, w) of a group.
    """

    groups: Sequence[Sequence[np.ndarray]]
    feeds: Callable[[np.ndarray], Iterable[Arrays]]

    def of_first(self, first: onnx.ModelProto, groups: int | None = None) -> Iterator[Arrays]:
        """Yield inputs of the graph that takes images, of so many groups at most."""
        (takes,) = first.graph.input
        return ({takes.name: image} for group in self.groups[:groups] for image in group)

    def of_second(self, first: onnx.ModelProto, groups: int | None = None) -> Iterator[Arrays]:
        """Yield inputs of the graph that takes features."""
        (takes,), (gives,) = first.graph.input, first.graph.output
        session = lean_session(copy.deepcopy(first))
        for group in self.groups[:groups]:
            features = [session.run([gives.name], {takes.name: image})[0] for image in group]
            yield from self.feeds(np.concatenate(features))


def typical_ranges(graphs: Mapping[str, onnx.ModelProto], use: TypicalUse | None) -> dict[str, MeasuredRanges | None]:
    """Return what the tensors of each graph hold in typical use, by name of the graph; None where there is no such use.

    Args:
        graphs: FP32 form by name: the graph that takes images, then the one that takes features.
        use: typical images.
    """
    batches = _batches(graphs, use)
    return {
        name: measure_ranges(graph, batches[name](RANGE_COUNT), FP16) if batches else None
        for name, graph in graphs.items()
    }


def reduced_graphs(
    precision: str,
    graphs: Mapping[str, onnx.ModelProto],
    use: TypicalUse | None,
    ranges: Mapping[str, MeasuredRanges | None],
    network: nn.Module,
) -> tuple[dict[str, onnx.ModelProto], tuple[str, ...]]:
    """Return both graphs in a reduced precision, and what a user should read about them.

    Args:
        precision: "fp16", or "int8" with FP16 around it.
        graphs: FP32 form by name: the graph that takes images, then the one that takes features.
        use: typical images, on which INT8 is calibrated.
        ranges: of `typical_ranges`; where they are None, only declared policies decide what stays FP32.
        network: what was exported; its blocks may keep layers out of INT8.

    Raises:
        UserError: no layer of either graph has a good INT8 form.
    """
    batches = _batches(graphs, use)
    reduced, notes, bare = {}, list[str](), list[str]()
    for name, graph in graphs.items():
        working = graph
        if precision == "int8":
            try:
                samples = _samples(graph, batches[name])
                quantised = quantise(graph, samples, Int8Options(exclude=_excluded(network, graph)))
                working = quantised.model
                notes += quantised.notes
            except NothingToQuantiseError as error:
                bare.append(f"{name} has no INT8 layer: {error}")
                notes.append(bare[-1])
        half = to_fp16(working, ranges=ranges[name])
        reduced[name] = half.model
        notes += half.notes
    if len(bare) == len(graphs):
        raise UserError(f"neither graph has an INT8 form. {bare[0]}")
    return reduced, tuple(dict.fromkeys(notes))


_Batches = Callable[[int | None], Iterator[Arrays]]


def _batches(graphs: Mapping[str, onnx.ModelProto], use: TypicalUse | None) -> dict[str, _Batches]:
    """Return what yields the inputs of each graph in typical use; nothing where there is no such use."""
    if use is None:
        return {}
    first = next(iter(graphs.values()))
    return {
        name: functools.partial(of_graph, first)
        for name, of_graph in zip(graphs, (use.of_first, use.of_second), strict=True)
    }


def _samples(graph: onnx.ModelProto, batches: _Batches) -> CalibrationSamples:
    return CalibrationSamples(
        lambda: map(dict, batches(None)),
        input_shapes(graph),
        "the typical images",
        MINIMUM,
        types=input_types(graph),
    )


def _excluded(network: nn.Module, graph: onnx.ModelProto) -> tuple[str, ...]:
    """Return what blocks keep out of INT8; a graph of a part of the network has the network's paths below `network`."""
    return declared_exclusions(network, graph) + declared_exclusions(nn.ModuleDict({"network": network}), graph)
