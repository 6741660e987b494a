"""Few-shot classification: CAN, declared as a 5-way 1-shot episode, which is one graph with a fixed set of images.

`deploy/few_shot.py` exports the two graphs for any numbers of classes, support images and queries.
"""

from __future__ import annotations

import functools

from edgeattn.models.can import CAN
from edgeattn.models.spec import Layout
from edgeattn.models.variants import numbered_classes
from edgeattn.models.zoo.declare import ORIGINALS, classes_of, classification

_can = functools.partial(
    classification,
    network=CAN,
    small={"num_classes": 4, "base_width": 4, "map_size": (3, 2), "reduction": 2},
    original=f"{ORIGINALS}.can:CAN",
    inputs=(*(f"support_{index}" for index in range(1, 6)), "query"),
    size=(84, 84),
    classes=numbered_classes(5),
    told=classes_of("clasifier.weight"),
    fixed_size="the meta learner of the cross attention has one weight per position of the features",
    test_sizes=((48, 32),),
)

_can(
    "can-resnet12",
    "CAN, ResNet-12, 5-way 1-shot, miniImageNet (NeurIPS 2019)",
    {},
    layouts=(Layout(listing="can-resnet12"),),
)
_can(
    "can-resnet12-tiered",
    "CAN, ResNet-12, 5-way 1-shot, tieredImageNet (NeurIPS 2019)",
    {"num_classes": 351},
    layouts=(Layout(listing="can-resnet12-tiered"),),
)
