"""Two graphs joined into one, so that they are judged together like any other form of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper
from torch import nn

from edgeattn.models import ModelSpec


@dataclass(frozen=True)
class Episode:
    """One use of both graphs on a fixed number of images, and the PyTorch original of the same use.

    Attributes:
        name: unique within the network.
        chosen: numbers of the images whose features an input of the second graph takes, by its name.
        constants: what its other inputs are, by name.
        spec: declares the images as inputs, and what the second graph gives as outputs.
        original: takes the images as its arguments.
    """

    name: str
    chosen: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, np.ndarray]
    spec: ModelSpec
    original: nn.Module

    def feed(self, second: onnx.ModelProto, features: np.ndarray) -> dict[str, np.ndarray]:
        """Return the inputs of the second graph from the features (images, channels, h, w) of all images."""
        taken = {name: features[list(numbers)] for name, numbers in self.chosen.items()}
        grouped = {name: taken[name][None] for name in taken if _rank(second, name) > features.ndim}
        return {**taken, **grouped, **self.constants}


def joined(first: onnx.ModelProto, second: onnx.ModelProto, episode: Episode) -> onnx.ModelProto:
    """Return one graph that computes an episode with both graphs: images in, the second graph's outputs out.

    Args:
        first: images (batch, 3, height, width) to features; it runs once, on all images of the episode.
        second: features to outputs.
        episode: says which features go where.
    """
    front, back = _apart(first, "first."), _apart(second, "second.")
    (takes,), (features,) = front.graph.input, front.graph.output
    shape = [1, *(dimension.dim_value for dimension in takes.type.tensor_type.shape.dim[1:])]
    rank = len(features.type.tensor_type.shape.dim)
    glue, constants = [], []
    for ours, inside in zip(second.graph.input, back.graph.input, strict=True):
        if ours.name in episode.constants:
            constants.append(numpy_helper.from_array(episode.constants[ours.name], inside.name))
            continue
        numbers, picked = f"{inside.name}.numbers", f"{inside.name}.picked"
        constants.append(numpy_helper.from_array(np.array(episode.chosen[ours.name], np.int64), numbers))
        if _rank(second, ours.name) == rank:
            glue.append(helper.make_node("Gather", [features.name, numbers], [inside.name], name=inside.name))
            continue
        constants.append(numpy_helper.from_array(np.zeros(1, np.int64), f"{inside.name}.axis"))
        glue += [
            helper.make_node("Gather", [features.name, numbers], [picked], name=picked),
            helper.make_node("Unsqueeze", [picked, f"{inside.name}.axis"], [inside.name], name=inside.name),
        ]
    renamed = [
        helper.make_node("Identity", [inside.name], [ours.name], name=ours.name)
        for ours, inside in zip(second.graph.output, back.graph.output, strict=True)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Concat", list(episode.spec.inputs), [takes.name], name=takes.name, axis=0),
            *(*front.graph.node, *glue, *back.graph.node, *renamed),
        ],
        episode.name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in episode.spec.inputs],
        list(second.graph.output),
        initializer=[*front.graph.initializer, *back.graph.initializer, *constants],
        value_info=[*front.graph.value_info, *back.graph.value_info],
    )
    return helper.make_model(
        graph,
        ir_version=max(first.ir_version, second.ir_version),
        opset_imports=list({entry.domain: entry for entry in (*first.opset_import, *second.opset_import)}.values()),
        functions=list({(entry.domain, entry.name): entry for entry in (*first.functions, *second.functions)}.values()),
    )


def _apart(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """Return a copy whose tensors, nodes and axes have names of their own.

    ONNX Runtime takes axes of one name for equally long, and those of the two graphs are not.
    """
    copy = compose.add_prefix(model, prefix, rename_functions=False)
    for value in (*copy.graph.value_info, *copy.graph.input, *copy.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = f"{prefix}{dimension.dim_param}"
    return copy


def _rank(model: onnx.ModelProto, name: str) -> int:
    """Return the number of axes of an input."""
    return next(len(entry.type.tensor_type.shape.dim) for entry in model.graph.input if entry.name == name)
