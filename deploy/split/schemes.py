"""Which networks have two graphs, what each graph is for, and how both together are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.deploy.few_shot import few_shot_graphs
from edgeattn.deploy.split.chain import Episode
from edgeattn.deploy.video.graphs import COMBINATIONS, GROUP, MEAN, combination_named, require_references, video_graphs
from edgeattn.models import ModelSpec, OutputSpec
from edgeattn.models.can import CAN, episode_membership
from edgeattn.models.cosnet import COSNet
from edgeattn.models.variants import numbered_classes
from edgeattn.validation.originals import can as original_can
from edgeattn.validation.originals import cosnet as original_cosnet
from edgeattn.validation.originals.co_attention import affinity_matrix, attend, gated


@dataclass(frozen=True)
class GraphRole:
    """What a user should know of a graph.

    Attributes:
        name: of the graph, and of its files.
        does: one sentence on inputs and outputs.
        run: one sentence on when to run it.
    """

    name: str
    does: str
    run: str


@dataclass(frozen=True)
class Scheme:
    """How one kind of network is split.

    Attributes:
        network: its class.
        roles: the graph that turns images into features, and the one that takes features.
        choices: default by name of each option that only some networks have.
        export: trained network, (height, width), opset and choices to both graphs by name, in the order of the roles.
        episodes: declaration, PyTorch original and choices to what both graphs together are judged on.
    """

    network: Callable[..., nn.Module]
    roles: tuple[GraphRole, GraphRole]
    choices: Mapping[str, int | str | None]
    export: Callable[..., Mapping[str, onnx.ModelProto]]
    episodes: Callable[..., Iterator[Episode]]


def _few_shot_export(network: CAN, size: tuple[int, int], opset: int) -> Mapping[str, onnx.ModelProto]:
    return few_shot_graphs(network, size, opset=opset).by_name


_UNEVEN = (0, 1, 0, 0)
"""Class of each support image in an episode that differs from the declared one in all numbers."""


def _few_shot_episodes(spec: ModelSpec, original: original_can.CAN) -> Iterator[Episode]:
    """Yield the declared episode, of one support image for each class, and one of several queries and uneven shots."""
    images = len(spec.inputs)
    ways = images - 1
    yield _few_shot_episode(f"{ways}-way 1-shot, 1 query", spec, original, range(ways))
    queries = images - len(_UNEVEN)
    yield _few_shot_episode(f"2-way, 3 shots and 1 shot, {queries} queries", spec, original, _UNEVEN)


def _few_shot_episode(name: str, spec: ModelSpec, original: original_can.CAN, labels: Sequence[int]) -> Episode:
    """Return an episode whose first images are support images of the given classes; the others are queries."""
    numbers, supports = tuple(range(len(spec.inputs))), len(labels)
    membership = episode_membership(labels, max(labels) + 1)
    return Episode(
        name,
        chosen={"support_features": numbers[:supports], "query_features": numbers[supports:]},
        constants={"membership": membership.numpy()},
        spec=replace(
            spec,
            outputs=(OutputSpec("scores", "scores"),),
            labels=_query_labels,
            classes=numbered_classes(max(labels) + 1),
        ),
        original=_OriginalEpisode(original, membership),
    )


class _OriginalEpisode(nn.Module):
    """The original few-shot network on support images and queries, each (1, 3, height, width), as arguments in turn."""

    def __init__(self, original: original_can.CAN, membership: Tensor) -> None:
        super().__init__()
        self.original, self.membership = original, membership

    def forward(self, *images: Tensor) -> Tensor:
        """Return scores (1, queries, classes)."""
        supports = self.membership.shape[1]
        support, queries = torch.stack(images[:supports], dim=1), torch.stack(images[supports:], dim=1)
        return self.original.episode(support, queries, self.membership)


def _query_labels(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return (batch, queries, 1, 1) labels: the class with the largest score, per query."""
    del size  # one label for each image
    return outputs["scores"].argmax(dim=2)[..., None, None]


def _video_export(
    network: COSNet, size: tuple[int, int], opset: int, *, references: int | None, combination: str
) -> Mapping[str, onnx.ModelProto]:
    chosen = combination_named(combination)
    return video_graphs(network, size, references=references, combination=chosen, opset=opset).by_name


_SEVERAL = 3
"""References of the second episode where their number is open."""


def _video_episodes(
    spec: ModelSpec, original: original_cosnet.COSNet, *, references: int | None, combination: str
) -> Iterator[Episode]:
    """Yield the published pair and one of several references, or only one of the number that the graph takes."""
    require_references(references)
    combine = _COMBINED[combination_named(combination).name]
    for count in (references,) if references else (1, _SEVERAL):
        # A sample has no more than a pair: the reference and the target itself take turns. With itself a frame shares
        # every object, so that masks of several references are not empty and relative errors mean something.
        order = tuple((1, 0)[index % 2] for index in range(count))
        yield Episode(
            f"{count} reference{'s' if count > 1 else ''}",
            chosen={"target_features": (0,), "reference_features": order},
            constants={},
            spec=replace(spec, outputs=(OutputSpec("mask", "probability"),), labels=_mask_labels),
            original=_OriginalVideo(original, order, combine),
        )


class _OriginalVideo(nn.Module):
    """The original pairwise network with several references, each of them one of the two frames."""

    def __init__(self, original: original_cosnet.COSNet, order: Sequence[int], combine: _Combine) -> None:
        super().__init__()
        self.original, self.order, self.combine = original, order, combine

    def forward(self, *frames: Tensor) -> Tensor:
        """Return the object's probability in the first frame (1, 1, height, width)."""
        return self.combine(self.original, frames[0], [frames[index] for index in self.order])


_Combine = Callable[[original_cosnet.COSNet, Tensor, Sequence[Tensor]], Tensor]


def _mean_of_pairs(original: original_cosnet.COSNet, target: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Average over runs of the pairwise network, as the published evaluation does."""
    return torch.stack([original(target, reference)[0] for reference in references]).mean(dim=0)


def _group(original: original_cosnet.COSNet, target: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Put the references side by side in one softmax; everything else is the pairwise network."""
    exemplar, _ = original.encoder(target)
    q = torch.cat([original.encoder(reference)[0].flatten(2) for reference in references], dim=2)
    affinity = affinity_matrix(original.linear_e.weight.T, exemplar.flatten(2), q)
    attended = gated(attend(affinity, q).reshape(exemplar.shape), original.gate)
    hidden = torch.relu(original.bn1(original.conv1(torch.cat([attended, exemplar], dim=1))))
    logits = original.main_classifier1(hidden)
    return torch.sigmoid(F.interpolate(logits, target.shape[2:], mode="bilinear", align_corners=False))


_COMBINED: Mapping[str, _Combine] = {MEAN.name: _mean_of_pairs, GROUP.name: _group}
"""What the PyTorch original computes, by the name of the combination."""


def _mask_labels(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Return (batch, 1, height, width) labels: 1 where the object's probability exceeds a half."""
    del size  # the mask already has the input's size
    return (outputs["mask"] > 0.5).long()


_WAYS = " or ".join(f"{name} ({entry.summary})" for name, entry in COMBINATIONS.items())

SCHEMES = {
    scheme.network: scheme
    for scheme in (
        Scheme(
            CAN,
            (
                GraphRole(
                    "embed",
                    "Turns preprocessed images into features, support images and queries alike.",
                    "Once for each image; keep the features of the support images.",
                ),
                GraphRole(
                    "compare",
                    "Scores query features against a support set; membership (episodes, supports, classes) is 1 where "
                    "a support image is of a class and 0 elsewhere, and every class needs a support image.",
                    "Once for each query or batch of queries, with the kept features of the support set.",
                ),
            ),
            {},
            _few_shot_export,
            _few_shot_episodes,
        ),
        Scheme(
            COSNet,
            (
                GraphRole(
                    "encoder",
                    "Turns preprocessed frames into features, targets and references alike.",
                    "Once for each frame; keep the features of the references.",
                ),
                GraphRole(
                    "attention",
                    "Turns a target's features and those of its references into the object's probability in the "
                    f"target, at the size of the frames; several references combine by {_WAYS}.",
                    "Once for each frame, with the kept features of the references.",
                ),
            ),
            {"references": None, "combination": MEAN.name},
            _video_export,
            _video_episodes,
        ),
    )
}
"""By the class of the network."""
