"""CAN as two graphs: one turns images into features, one scores query features against a support set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from edgeattn.deploy.two_graphs import save_graphs
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError
from edgeattn.models.can import CAN

_EPISODES, _SUPPORTS, _CLASSES, _QUERIES = 2, 4, 3, 5
"""Sizes of the example: each another number, and none of them 1, so that all stay dynamic."""


@dataclass(frozen=True)
class FewShotGraphs:
    """The two graphs of a few-shot classifier.

    Attributes:
        embed: `images` (batch, 3, height, width) to `features`, for support images and queries alike.
        compare: `support_features`, `membership` and `query_features` to `scores`; see `CAN.compare`. Numbers of
            episodes, support images, classes and queries are dynamic.
    """

    embed: onnx.ModelProto
    compare: onnx.ModelProto

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write `embed.onnx` and `compare.onnx` and return their paths.

        Args:
            folder: where to; created when missing.
        """
        embed, compare = save_graphs(self.by_name, folder, "fp32")
        return embed.path, compare.path

    @property
    def by_name(self) -> dict[str, onnx.ModelProto]:
        """Both graphs by the names of their files."""
        return {"embed": self.embed, "compare": self.compare}


def few_shot_graphs(model: CAN, size: tuple[int, int], *, opset: int = DEFAULT_OPSET) -> FewShotGraphs:
    """Export a few-shot classifier as two graphs, so that a support set is embedded once for all its queries.

    Args:
        model: the trained network.
        size: (height, width) of the images; 84x84 for the published networks.
        opset: version of the standard operators.

    Raises:
        UserError: images of this size do not give features of the size that the meta learner has weights for.
    """
    images = torch.zeros(2, 3, *size)
    with torch.no_grad():
        features = model.embed(images)
    wanted = (model.cam.height, model.cam.width)
    if tuple(features.shape[2:]) != wanted:
        raise UserError(
            f"images of {size[0]}x{size[1]} give features of {features.shape[2]}x{features.shape[3]}, but the "
            f"network compares features of {wanted[0]}x{wanted[1]}. Give the size that it was trained at."
        )
    embed = to_onnx(
        model,
        [images],
        input_names=["images"],
        output_names=["features"],
        dynamic_axes=[{0: "batch"}],
        opset=opset,
        method="embed",
    )
    shape = features.shape[1:]
    membership = torch.eye(_CLASSES)[torch.arange(_SUPPORTS) % _CLASSES].repeat(_EPISODES, 1, 1)
    compare = to_onnx(
        model,
        [torch.rand(_EPISODES, _SUPPORTS, *shape), membership, torch.rand(_EPISODES, _QUERIES, *shape)],
        input_names=["support_features", "membership", "query_features"],
        output_names=["scores"],
        dynamic_axes=[
            {0: "episodes", 1: "supports"},
            {0: "episodes", 1: "supports", 2: "classes"},
            {0: "episodes", 1: "queries"},
        ],
        opset=opset,
        method="compare",
    )
    return FewShotGraphs(embed, compare)
