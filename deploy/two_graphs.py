"""What networks of two graphs share: the names of their files, and their FP16 forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from edgeattn.deploy.pipeline import save_model
from edgeattn.export.calibration_statistics import lean_session
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.precision_types import FP16
from edgeattn.export.ranges import measure_ranges
from edgeattn.export.surgery import inline_plugins
from edgeattn.plugins_trt import DOMAIN

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GraphFile:
    """One file of a graph.

    Attributes:
        graph: name of the graph.
        path: the file, `GRAPH[.plugin][.fp16].onnx`.
        precision: "fp32" or "fp16".
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
        precision: "fp32" or "fp16".

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


def fp16_graphs(
    first: onnx.ModelProto,
    second: onnx.ModelProto,
    groups: Iterable[Sequence[np.ndarray]] = (),
    feeds: Callable[[np.ndarray], Iterable[Arrays]] = lambda features: (),
) -> tuple[onnx.ModelProto, onnx.ModelProto, tuple[str, ...]]:
    """Return the FP16 forms of two graphs, and what a user should read about them.

    Args:
        first: turns images into features.
        second: takes features.
        groups: typical images (1, 3, height, width), preprocessed, in groups that are used together, on which it is
            measured what FP16 cannot hold; only declared policies decide when none are given.
        feeds: inputs of the second graph by name, from the features (images, channels, h, w) of a group.
    """
    of_first, of_second = None, None
    if kept := [list(group) for group in groups]:
        (takes,), (gives,) = first.graph.input, first.graph.output
        of_first = measure_ranges(first, ({takes.name: image} for group in kept for image in group), FP16)
        session = lean_session(copy.deepcopy(first))

        def features(group: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([session.run([gives.name], {takes.name: image})[0] for image in group])

        of_second = measure_ranges(second, (feed for group in kept for feed in feeds(features(group))), FP16)
    halves = to_fp16(first, ranges=of_first), to_fp16(second, ranges=of_second)
    return halves[0].model, halves[1].model, tuple(dict.fromkeys(note for half in halves for note in half.notes))
