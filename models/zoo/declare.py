"""What the declarations of networks share: registration, labels, preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from edgeattn.models.spec import ModelSpec, OutputSpec, Preprocessing, Told
from edgeattn.models.variants import MODELS, numbered_classes

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
ORIGINALS = "edgeattn.validation.originals"
CAFFE_BGR = Preprocessing("BGR", 1.0, (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0))
CENTRED_RGB = Preprocessing("RGB", 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
IMAGENET_RGB = Preprocessing("RGB", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)


def classes_of(parameter: str) -> dict[str, Told]:
    """Say that the rows of a parameter, the last layer's weight, tell the number of classes."""
    return {"num_classes": Told((parameter,))}


def class_labels(
    outputs: Mapping[str, torch.Tensor], size: tuple[int, int], *, align_corners: bool = True
) -> torch.Tensor:
    """Return (batch, 1, height, width) labels: the largest of the logits resized to `size`."""
    logits = F.interpolate(outputs["logits"], size=size, mode="bilinear", align_corners=align_corners)
    return logits.argmax(dim=1, keepdim=True)


def object_labels(outputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Return (batch, 2, height, width) labels: 1 where the object's probability exceeds a half, per frame."""
    del size  # the probabilities already have the input's size
    return (torch.cat([outputs["mask_target"], outputs["mask_reference"]], dim=1) > 0.5).long()


def score_labels(outputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Return (batch, 1, 1, 1) labels: the class with the largest score."""
    del size  # one label for each image
    return outputs["scores"].argmax(dim=1)[:, None, None, None]


def declare(name: str, summary: str, arguments: Mapping[str, object], **fields: Any) -> ModelSpec:
    """Register a network; `fields` are those of `ModelSpec`."""
    return MODELS.add(ModelSpec(name=name, summary=summary, arguments=arguments, **fields))


segmentation = functools.partial(
    declare,
    inputs=("image",),
    outputs=(OutputSpec("logits", "logits"),),
    labels=class_labels,
)
"""Register a segmentation network: one image in, logits out, resized with aligned corners."""

classification = functools.partial(
    declare,
    inputs=("image",),
    outputs=(OutputSpec("scores", "scores"),),
    labels=score_labels,
    preprocessing=IMAGENET_RGB,
    size=(224, 224),
    classes=numbered_classes(1000),
    told=classes_of("fc.weight"),
)
"""Register an ImageNet classifier: one image in, scores (batch, classes) out."""
