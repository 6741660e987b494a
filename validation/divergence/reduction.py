"""From the first divergent module to the smallest ONNX model that still fails, with its inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER
from polygraphy.tools.debug.subtool.iterative_debug_args import CheckCmdArgs
from polygraphy.tools.debug.subtool.reduce import Reduce

from edgeattn.export.metadata import metadata_of
from edgeattn.foundation import atomic_path
from edgeattn.validation.divergence.forms import Arrays, relative_l2
from edgeattn.validation.divergence.onnx_form import OnnxForm
from edgeattn.validation.divergence.segments import Segment, session_of
from edgeattn.validation.runners import RUNTIME_ERRORS

LINEAR_UP_TO = 100
"""Graphs up to this many nodes are reduced node by node, which finds less than bisection cannot in branches."""


@dataclass(frozen=True)
class Evidence:
    """A segment that failed, with the sample on which it failed worst.

    Attributes:
        segment: the nodes.
        inputs: what they ran on: tensors of the other form.
        expected: the other form's result.
        feed: the network's inputs.
        allowed: largest relative L2 that counts as equal.
    """

    segment: Segment
    inputs: Arrays
    expected: np.ndarray
    feed: Arrays
    allowed: float


@dataclass(frozen=True)
class Reduction:
    """A minimal failing model.

    Attributes:
        model: path of the ONNX file; what FP16 rounds is written as casts, so that it fails on a CPU, too.
        inputs: path of the .npz with its inputs.
        expected: path of the .npz with the outputs that the other form has.
        nodes: nodes in it.
        segment_nodes: nodes of the divergent segment that it was reduced from.
        reduced: whether Polygraphy reduced the segment, which needs values inside it from the other form.
    """

    model: Path
    inputs: Path
    expected: Path
    nodes: int
    segment_nodes: int
    reduced: bool


def write_minimal(evidence: Evidence, other: object, folder: Path) -> Reduction:
    """Write `minimal.onnx`, `minimal.inputs.npz` and `minimal.expected.npz` into a folder.

    The divergent segment is reduced further with `polygraphy debug reduce` when the other form is an ONNX form, whose
    tensors of the same names say what is right inside the segment. Otherwise nothing inside it has a counterpart, and
    the segment itself is the smallest model that can be shown to fail.

    Args:
        evidence: what failed.
        other: the form that the failing one was compared with.
        folder: where the files go.

    Raises:
        UserError: the folder cannot be written.
    """
    known = {**{name: evidence.inputs[name] for name in evidence.segment.inputs}}
    known[evidence.segment.output] = evidence.expected
    model = _with_shapes(evidence.segment.model, known)
    inner = {name for node in model.graph.node for name in node.output} - set(known)
    reduced = isinstance(other, OnnxForm) and len(model.graph.node) > 1
    if isinstance(other, OnnxForm) and reduced:
        known.update(other.values(evidence.feed, inner))
        model = _reduce(model, known, evidence.allowed)
    inputs = {value.name: known[value.name] for value in model.graph.input}
    expected = {value.name: known[value.name] for value in model.graph.output}
    paths = folder / "minimal.onnx", folder / "minimal.inputs.npz", folder / "minimal.expected.npz"
    with atomic_path(paths[0]) as temporary:
        onnx.save(model, temporary)
    for path, arrays in zip(paths[1:], (inputs, expected), strict=True):
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    return Reduction(*paths, len(model.graph.node), len(evidence.segment.model.graph.node), reduced)


def fails(model: onnx.ModelProto, known: Arrays, allowed: float) -> bool:
    """Tell whether a model gives something else than what is known of its outputs, on what is known of its inputs.

    A model with an input or output of which nothing is known cannot be shown to fail.
    """
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    if not all(name in known for name in names):
        return False
    try:
        found = session_of(model).run(None, {value.name: known[value.name] for value in model.graph.input})
    except RUNTIME_ERRORS:
        return True
    return any(
        array.shape != known[value.name].shape or not relative_l2(known[value.name], array) <= allowed
        for value, array in zip(model.graph.output, found, strict=True)
    )


def _with_shapes(model: onnx.ModelProto, known: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return a copy whose inputs have the shapes of their values, as Polygraphy needs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        shape = value.type.tensor_type.shape
        shape.CopyFrom(onnx.TensorShapeProto())
        for size in known[value.name].shape:
            shape.dim.add(dim_value=size)
    return copy


def _reduce(model: onnx.ModelProto, known: Arrays, allowed: float) -> onnx.ModelProto:
    """Run Polygraphy's reducer in this process; the model itself when it finds nothing smaller that fails."""
    with tempfile.TemporaryDirectory() as name, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        folder = Path(name)
        source, target = folder / "segment.onnx", folder / "minimal.onnx"
        onnx.save(model, source)
        save_json([{value.name: known[value.name] for value in model.graph.input}], str(folder / "inputs.json"))
        tool = Reduce()
        arguments = tool.setup_parser().parse_args(
            [
                *(str(source), "--output", str(target)),
                *("--mode", "linear" if len(model.graph.node) <= LINEAR_UP_TO else "bisect"),
                *("--load-inputs", str(folder / "inputs.json")),
                *("--iter-artifact", str(folder / "step.onnx")),
                *("--save-debug-replay", str(folder / "replay.json")),
            ]
        )
        tool.parse(arguments)
        # In place of a command that is started anew for every step.
        tool.arg_groups[CheckCmdArgs].run_check = lambda path: not fails(onnx.load(path), known, allowed)
        tool.run(arguments)
        found = onnx.load(target)
    if not fails(found, known, allowed):
        return model
    _restore_metadata(found, model)
    return found


def _restore_metadata(reduced: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Give nodes the metadata back that Polygraphy's graph library drops."""
    metadata = {node.name: metadata_of(node) for node in source.graph.node}
    for node in reduced.graph.node:
        del node.metadata_props[:]
        for key, value in metadata.get(node.name, {}).items():
            node.metadata_props.add(key=key, value=value)
