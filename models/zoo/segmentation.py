"""Segmentation networks in the layouts of their authors: DANet, EMANet, OCNet, PSANet, ANN."""

from __future__ import annotations

import functools

from edgeattn.models.ann import ANN
from edgeattn.models.danet import DANet
from edgeattn.models.emanet import EMANet
from edgeattn.models.ocnet import OCNetASP, OCNetBase, OCNetPyramid
from edgeattn.models.psanet import PSANet
from edgeattn.models.spec import Layout, OutputSpec, Preprocessing
from edgeattn.models.variants import numbered_classes
from edgeattn.models.zoo.declare import CITYSCAPES, IMAGENET_RGB, ORIGINALS, classes_of, segmentation

PASCAL_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv/monitor"),
)
_CAFFE_MEAN = (102.9801, 115.9465, 122.7717)
"""Means of blue, green and red."""

_SMALL = {"num_classes": 5, "stem_width": 8, "base_width": 4}
_LOGITS = OutputSpec("logits", "logits")
_DSN = (_LOGITS, OutputSpec("dsn_logits", "logits", auxiliary=True))

_danet = functools.partial(
    segmentation,
    network=DANet,
    original=f"{ORIGINALS}.danet:DANet",
    outputs=(
        _LOGITS,
        OutputSpec("position_logits", "logits", auxiliary=True),
        OutputSpec("channel_logits", "logits", auxiliary=True),
    ),
    preprocessing=IMAGENET_RGB,
    size=(768, 768),
    classes=CITYSCAPES,
    told=classes_of("head.conv8.1.weight"),
)
_danet(
    "danet-r101",
    "DANet, ResNet-101, Cityscapes (CVPR 2019); as released, with a 7x7 stem",
    {"num_classes": 19},
    small=_SMALL | {"blocks": (1, 1, 2, 2), "multi_dilation": (2, 4)},
    layouts=(Layout(listing="danet-r101"),),
)
_danet(
    "danet-r101-deep-stem",
    "DANet, ResNet-101, Cityscapes; as the official code trains it by default, with a stem of three convolutions",
    {"num_classes": 19, "deep_stem": True},
    small=_SMALL | {"blocks": (1, 1, 1, 1), "deep_stem": True},
    layouts=(Layout(listing="danet-r101-deep-stem"),),
)

segmentation(
    "emanet-r101",
    "EMANet, ResNet-101, PASCAL VOC (ICCV 2019)",
    {"num_classes": 21},
    network=EMANet,
    small=_SMALL | {"blocks": (1, 1, 1, 2), "grids": (1, 2), "bases": 6},
    original=f"{ORIGINALS}.emanet:EMANet",
    preprocessing=IMAGENET_RGB,
    size=(513, 513),
    classes=PASCAL_VOC,
    told=classes_of("fc2.weight"),
    layouts=(Layout(listing="emanet-r101"),),
)

# The official data reader turns the colours to RGB, but subtracts the means in the order of BGR.
_ocnet = functools.partial(
    segmentation,
    outputs=_DSN,
    preprocessing=Preprocessing("RGB", 1.0, _CAFFE_MEAN, (1.0, 1.0, 1.0)),
    size=(769, 769),
    classes=CITYSCAPES,
    told=classes_of("cls.weight"),
)
_ocnet(
    "ocnet-base-r101",
    "OCNet with base object context, ResNet-101, Cityscapes (arXiv 2018)",
    {"num_classes": 19},
    network=OCNetBase,
    small=_SMALL | {"blocks": (1, 1, 1, 1)},
    original=f"{ORIGINALS}.ocnet:OCNetBase",
    layouts=(Layout(listing="ocnet-base-r101"),),
)
_ocnet(
    "ocnet-pyramid-r101",
    "OCNet with pyramid object context, ResNet-101, Cityscapes (arXiv 2018)",
    {"num_classes": 19},
    network=OCNetPyramid,
    small=_SMALL | {"blocks": (1, 1, 1, 1), "sizes": (1,)},
    original=f"{ORIGINALS}.ocnet:OCNetPyramid",
    layouts=(Layout(listing="ocnet-pyramid-r101"),),
)
_ocnet(
    "ocnet-asp-r101",
    "OCNet with atrous spatial pyramid object context, ResNet-101, Cityscapes (arXiv 2018)",
    {"num_classes": 19},
    network=OCNetASP,
    small=_SMALL | {"blocks": (1, 1, 1, 1), "dilations": (2, 3, 5)},
    original=f"{ORIGINALS}.ocnet:OCNetASP",
    layouts=(Layout(listing="ocnet-asp-r101"),),
)

_psanet = functools.partial(
    segmentation,
    network=PSANet,
    small=_SMALL | {"blocks": (1, 1, 1, 1), "mask": (9, 9)},
    original=f"{ORIGINALS}.psanet:PSANet",
    outputs=(_LOGITS, OutputSpec("aux_logits", "logits", auxiliary=True)),
    preprocessing=IMAGENET_RGB,
    told=classes_of("cls.4.weight"),
    test_sizes=((65, 81), (49, 97)),  # the second one is wider than the masks reach
)
for _depth, _blocks in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))):
    for _suffix, _data, _classes, _side, _mask in (
        ("", "Cityscapes", CITYSCAPES, 705, 89),
        ("-ade20k", "ADE20K", numbered_classes(150), 465, 59),
        ("-voc2012", "PASCAL VOC", PASCAL_VOC, 465, 59),
    ):
        _psanet(
            f"psanet-r{_depth}{_suffix}",
            f"PSANet, ResNet-{_depth}, {_data} (ECCV 2018)",
            {"num_classes": len(_classes), "mask": (_mask, _mask), "blocks": _blocks},
            size=(_side, _side),
            classes=_classes,
            layouts=(Layout(listing=f"psanet-r{_depth}{_suffix}"),),
        )

segmentation(
    "ann-r101",
    "ANN, asymmetric non-local blocks, ResNet-101, Cityscapes (ICCV 2019)",
    {"num_classes": 19},
    network=ANN,
    small=_SMALL | {"blocks": (1, 1, 1, 2), "psp_size": (1, 3)},
    original=f"{ORIGINALS}.ann:ANN",
    outputs=_DSN,
    preprocessing=Preprocessing("BGR", 1.0, _CAFFE_MEAN, (1.0, 1.0, 1.0)),
    size=(769, 769),
    classes=CITYSCAPES,
    told=classes_of("cls.weight"),
    layouts=(Layout(listing="ann-r101"),),
)
