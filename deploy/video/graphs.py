"""COSNet as two graphs: one turns frames into features, one segments a frame's features with those of references."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeattn.deploy.two_graphs import TypicalUse, reduced_graphs, save_graphs, typical_ranges
from edgeattn.export.calibration import MINIMUM, require_minimum
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.surgery import inline_plugins
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.cosnet import COSNet

_BATCH, _REFERENCES = 2, 3
"""Sizes of the example: each another number, and none of them 1, so that both stay dynamic."""


@dataclass(frozen=True)
class Combination:
    """How N references make one mask.

    Attributes:
        name: of the option.
        summary: what is computed.
        heads: method of `COSNet` that segments by features.
        whole_takes: references that one run of the whole network takes; None for all.
    """

    name: str
    summary: str
    heads: str
    whole_takes: int | None


MEAN = Combination("mean", "mean of the probabilities with each reference alone", "average_features", 1)
GROUP = Combination("group", "one softmax over the positions of all references", "segment_features", None)
COMBINATIONS = {combination.name: combination for combination in (MEAN, GROUP)}
"""By name; the first one is what the paper's tests do, the second the group form of its journal version."""


def combination_named(name: str) -> Combination:
    """Return the combination called `name`.

    Raises:
        UserError: there is none; the message lists them.
    """
    if name not in COMBINATIONS:
        raise UserError(f"unknown combination {name!r}. Choose {' or '.join(COMBINATIONS)}.")
    return COMBINATIONS[name]


@dataclass(frozen=True)
class VideoGraphs:
    """The two graphs of a video segmenter.

    Attributes:
        encoder: `frames` (batch, 3, height, width), preprocessed, to `features` (batch, channels, h, w); for targets
            and references alike.
        attention: `target_features` (batch, channels, h, w) and `reference_features` (batch, N, channels, h, w) to
            `mask` (batch, 1, height, width), the object's probability at the size of the frames. Co-attention is a node
            of domain `edgeattn` with its body.
        precision: "fp32", "fp16" or "int8"; inputs and outputs are FP32 either way.
        notes: what a user should read about the precision.
    """

    encoder: onnx.ModelProto
    attention: onnx.ModelProto
    precision: str = "fp32"
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write the graphs and return the paths of the encoder and of the attention in standard operators.

        FP32 graphs are `encoder.onnx`, `attention.onnx` and, with its plugin node, `attention.plugin.onnx`; others have
        `.fp16` or `.int8` before the ending.

        Args:
            folder: where to; created when missing.
        """
        encoder, attention, *_ = save_graphs(self.by_name, folder, self.precision)
        return encoder.path, attention.path

    @property
    def by_name(self) -> dict[str, onnx.ModelProto]:
        """Both graphs by the names of their files."""
        return {"encoder": self.encoder, "attention": self.attention}

    def reduced(self, precision: str, frames: Iterable[np.ndarray] = (), *, network: nn.Module) -> VideoGraphs:
        """Return both graphs in a reduced precision.

        Args:
            precision: "fp16", or "int8" with FP16 around it.
            frames: typical frames (1, 3, height, width), preprocessed, on which INT8 is calibrated and it is measured
                what FP16 cannot hold; only declared policies decide about FP16 when none are given.
            network: what was exported.

        Raises:
            UserError: too few frames for INT8.
        """
        group = list(frames)
        if precision == "int8":
            require_minimum(len(group), MINIMUM, "the frames")

        def feeds(features: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
            count = _shape(self.attention.graph.input[1])[1] or len(features)
            references = features[np.arange(count) % len(features)][None]
            return ({"target_features": one[None], "reference_features": references} for one in features)

        use = TypicalUse([group], feeds) if group else None
        ranges = typical_ranges(self.by_name, use)
        graphs, notes = reduced_graphs(precision, self.by_name, use, ranges, network)
        return VideoGraphs(**graphs, precision=precision, notes=notes)


def video_graphs(
    model: COSNet,
    size: tuple[int, int],
    *,
    references: int | None = None,
    combination: Combination = MEAN,
    opset: int = DEFAULT_OPSET,
) -> VideoGraphs:
    """Export a video segmenter as two graphs, so that each frame is encoded once, whatever it is used for.

    Args:
        model: the trained network.
        size: (height, width) of the frames. It is fixed, because several sizes have features of one size.
        references: N, the number of references; dynamic when None. The batch is always dynamic.
        combination: how the references make one mask.
        opset: version of the standard operators.

    Raises:
        UserError: no reference.
    """
    require_references(references)
    encoder = to_onnx(
        model,
        [torch.zeros(_BATCH, 3, *size)],
        input_names=["frames"],
        output_names=["features"],
        dynamic_axes=[{0: "batch"}],
        opset=opset,
        method="encode",
    )
    shape = _shape(encoder.graph.output[0])[1:]
    reference_axes = {0: "batch"} if references else {0: "batch", 1: "references"}
    attention = to_onnx(
        _Heads(model, combination, size),
        [torch.rand(_BATCH, *shape), torch.rand(_BATCH, references or _REFERENCES, *shape)],
        input_names=["target_features", "reference_features"],
        output_names=["mask"],
        dynamic_axes=[{0: "batch"}, reference_axes],
        opset=opset,
    )
    return VideoGraphs(encoder, attention)


def whole_graph(
    model: COSNet, size: tuple[int, int], *, references: int, opset: int = DEFAULT_OPSET
) -> onnx.ModelProto:
    """Export the whole network as one graph of standard operators, which encodes its references in every run.

    This is what the two graphs are measured against: with one reference the published pairwise form, less what only
    the reference's own mask needs.

    Args:
        model: the trained network.
        size: (height, width) of the frames.
        references: how many references one run takes.
        opset: version of the standard operators.

    Returns:
        `target` (1, 3, height, width) and `references` (1, N, 3, height, width) to `mask` (1, 1, height, width).

    Raises:
        UserError: no reference.
    """
    require_references(references)
    return inline_plugins(
        to_onnx(
            model,
            [torch.zeros(1, 3, *size), torch.zeros(1, references, 3, *size)],
            input_names=["target", "references"],
            output_names=["mask"],
            opset=opset,
            method="forward_group",
        )
    )


class _Heads(nn.Module):
    """What follows the encoder; the network keeps its module paths below `network`."""

    def __init__(self, network: COSNet, combination: Combination, size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.heads, self.size = combination.heads, size

    def forward(self, target_features: Tensor, reference_features: Tensor) -> Tensor:
        mask: Tensor = getattr(self.network, self.heads)(target_features, reference_features, self.size)
        return mask


def require_references(references: int | None) -> None:
    """Refuse a number of references below 1; None stands for any number.

    Raises:
        UserError: there is no reference.
    """
    if references is not None and references < 1:
        raise UserError(f"{references} references are asked for. Give at least 1; 5 are published.")


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the declared shape of an input or output; 0 where it varies."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
