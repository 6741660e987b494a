"""Declarations of the networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.models import digits
from edgeattn.models.ccnet import CCNet
from edgeattn.models.cosnet import COSNet
from edgeattn.models.spec import MODELS, ModelSpec, OutputSpec, Preprocessing

_ORIGINALS = "edgeattn.validation.originals"
_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_CAFFE_BGR = Preprocessing("BGR", 1.0, (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0))
_CENTRED_RGB = Preprocessing("RGB", 1 / 255, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
_CCNET_OUTPUTS = (OutputSpec("logits", "logits"), OutputSpec("dsn_logits", "logits", auxiliary=True))
_COSNET_OUTPUTS = (
    OutputSpec("mask_target", "probability"),
    OutputSpec("mask_reference", "probability"),
    OutputSpec("saliency_reference", "probability", auxiliary=True),
)
_CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)


def class_labels(outputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Return (batch, 1, height, width) labels: the largest of the logits resized to `size` with aligned corners."""
    logits = F.interpolate(outputs["logits"], size=size, mode="bilinear", align_corners=True)
    return logits.argmax(dim=1, keepdim=True)


def object_labels(outputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Return (batch, 2, height, width) labels: 1 where the object's probability exceeds a half, per frame."""
    del size  # the probabilities already have the input's size
    return (torch.cat([outputs["mask_target"], outputs["mask_reference"]], dim=1) > 0.5).long()


def _declare(
    network: Callable[..., nn.Module],
    name: str,
    summary: str,
    arguments: Mapping[str, object],
    **fields: Any,
) -> ModelSpec:
    """Register a network built with `arguments`, which its original takes as well."""
    return MODELS.add(
        ModelSpec(
            name=name,
            summary=summary,
            build=lambda: network(**arguments).eval(),
            original_arguments=arguments,
            **fields,
        )
    )


_ccnet = functools.partial(
    _declare,
    CCNet,
    original=f"{_ORIGINALS}.ccnet:CCNet",
    inputs=("image",),
    outputs=_CCNET_OUTPUTS,
    labels=class_labels,
)
_cosnet = functools.partial(
    _declare,
    COSNet,
    original=f"{_ORIGINALS}.cosnet:COSNet",
    inputs=("target", "reference"),
    outputs=_COSNET_OUTPUTS,
    labels=object_labels,
    classes=("background", "shared object"),
)

_ccnet(
    "ccnet-r101",
    "CCNet, ResNet-101, Cityscapes (ICCV 2019)",
    {"num_classes": 19, "recurrence": 2},
    preprocessing=_CAFFE_BGR,
    size=(769, 769),
    classes=_CITYSCAPES,
)
_cosnet(
    "cosnet-r101",
    "COSNet, ResNet-101, DAVIS (CVPR 2019)",
    {},
    preprocessing=_CAFFE_BGR,
    size=(473, 473),
)
_ccnet(
    "ccnet-digits",
    "small CCNet trained on handwritten digits over photographs, bundled",
    {"num_classes": 11, "recurrence": 2, "blocks": (1, 1, 2, 1), "stem_width": 16, "base_width": 8},
    preprocessing=_CENTRED_RGB,
    size=(digits.HEIGHT, digits.WIDTH),
    classes=digits.CLASSES,
    checkpoint=_CHECKPOINTS / "ccnet-digits.safetensors",
    samples=functools.partial(digits.held_out, "segmentation"),
    calibration=functools.partial(digits.calibration, "segmentation"),
)
_cosnet(
    "cosnet-digits",
    "small COSNet trained to find the handwritten digit that two frames share, bundled",
    {"blocks": (1, 1, 2, 1), "base_width": 8, "aspp_depth": 32, "channels": 48, "dilations": (2, 4, 6)},
    preprocessing=_CENTRED_RGB,
    size=(digits.HEIGHT, digits.WIDTH),
    checkpoint=_CHECKPOINTS / "cosnet-digits.safetensors",
    samples=functools.partial(digits.held_out, "pair"),
    calibration=functools.partial(digits.calibration, "pair"),
)
