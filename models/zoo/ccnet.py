"""CCNet: official, and the bundled small one."""

from __future__ import annotations

import functools

from edgeattn.models import digits
from edgeattn.models.ccnet import CCNet
from edgeattn.models.spec import Layout, OutputSpec
from edgeattn.models.zoo.declare import (
    CAFFE_BGR,
    CENTRED_RGB,
    CHECKPOINTS,
    CITYSCAPES,
    ORIGINALS,
    classes_of,
    segmentation,
)

_SMALL = {"num_classes": 11, "recurrence": 2, "blocks": (1, 1, 2, 1), "stem_width": 16, "base_width": 8}

_ccnet = functools.partial(
    segmentation,
    network=CCNet,
    small=_SMALL,
    original=f"{ORIGINALS}.ccnet:CCNet",
    told=classes_of("head.bottleneck.3.weight"),
    free=("recurrence",),
    outputs=(OutputSpec("logits", "logits"), OutputSpec("dsn_logits", "logits", auxiliary=True)),
)

_ccnet(
    "ccnet-r101",
    "CCNet, ResNet-101, Cityscapes (ICCV 2019)",
    {"num_classes": 19, "recurrence": 2},
    preprocessing=CAFFE_BGR,
    size=(769, 769),
    classes=CITYSCAPES,
    layouts=(Layout(listing="ccnet-r101"),),
)
_ccnet(
    "ccnet-digits",
    "small CCNet trained on handwritten digits over photographs, bundled",
    _SMALL,
    preprocessing=CENTRED_RGB,
    size=(digits.HEIGHT, digits.WIDTH),
    classes=digits.CLASSES,
    checkpoint=CHECKPOINTS / "ccnet-digits.safetensors",
    samples=functools.partial(digits.held_out, "segmentation"),
    calibration=functools.partial(digits.calibration, "segmentation"),
)
