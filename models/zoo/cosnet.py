"""COSNet: official, and the bundled small one."""

from __future__ import annotations

import functools

from edgeattn.models import digits
from edgeattn.models.cosnet import COSNet
from edgeattn.models.spec import Layout, OutputSpec
from edgeattn.models.zoo.declare import CAFFE_BGR, CENTRED_RGB, CHECKPOINTS, ORIGINALS, declare, object_labels

_SMALL = {"blocks": (1, 1, 2, 1), "base_width": 8, "aspp_depth": 32, "channels": 48, "dilations": (2, 4, 6)}

_cosnet = functools.partial(
    declare,
    network=COSNet,
    small=_SMALL,
    original=f"{ORIGINALS}.cosnet:COSNet",
    inputs=("target", "reference"),
    outputs=(
        OutputSpec("mask_target", "probability"),
        OutputSpec("mask_reference", "probability"),
        OutputSpec("saliency_reference", "probability", auxiliary=True),
    ),
    labels=object_labels,
    classes=("background", "shared object"),
)

_cosnet(
    "cosnet-r101",
    "COSNet, ResNet-101, DAVIS (CVPR 2019)",
    {},
    preprocessing=CAFFE_BGR,
    size=(473, 473),
    layouts=(Layout(listing="cosnet-r101"),),
)
_cosnet(
    "cosnet-digits",
    "small COSNet trained to find the handwritten digit that two frames share, bundled",
    _SMALL,
    preprocessing=CENTRED_RGB,
    size=(digits.HEIGHT, digits.WIDTH),
    checkpoint=CHECKPOINTS / "cosnet-digits.safetensors",
    samples=functools.partial(digits.held_out, "pair"),
    calibration=functools.partial(digits.calibration, "pair"),
)
