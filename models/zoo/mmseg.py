"""mmsegmentation: networks that carry attention in their decode head, with ResNet-50 and ResNet-101."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from edgeattn.models.mmseg import EncoderDecoder
from edgeattn.models.mmseg_heads import HEADS
from edgeattn.models.spec import Layout, OutputSpec
from edgeattn.models.zoo.declare import CITYSCAPES, IMAGENET_RGB, ORIGINALS, class_labels, classes_of, segmentation

_BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
_SMALL = {"num_classes": 5, "blocks": (1, 1, 1, 1), "base_width": 8}


def _mmseg(
    name: str, title: str, venue: str, head: str, *, small: Mapping[str, object] | None = None, **fields: Any
) -> None:
    """Declare one network with both backbones.

    Args:
        name: what mmsegmentation calls its configurations.
        title: what the paper calls the network.
        venue: of the paper.
        head: class of the decode head.
        small: options of the decode head in the small network.
        fields: other fields of `ModelSpec`.
    """
    logits = [OutputSpec(output, "logits", auxiliary=index > 0) for index, output in enumerate(HEADS[head].logits)]
    for backbone, blocks in _BLOCKS.items():
        full_name = f"{name}-{backbone}-mmseg"
        segmentation(
            full_name,
            f"{title}, ResNet-{backbone[1:]}, mmsegmentation, Cityscapes ({venue})",
            {"head": head, "num_classes": len(CITYSCAPES), "blocks": blocks},
            network=EncoderDecoder,
            small={"head": head, **_SMALL, "options": small or {}},
            original=f"{ORIGINALS}.mmseg:EncoderDecoder",
            outputs=(*logits, OutputSpec("auxiliary_logits", "logits", auxiliary=True)),
            labels=functools.partial(class_labels, align_corners=False),
            preprocessing=IMAGENET_RGB,
            size=(512, 1024),
            classes=CITYSCAPES,
            told=classes_of(HEADS[head].classifier),
            layouts=(Layout("mmseg", HEADS[head].key_map, full_name),),
            **fields,
        )


_mmseg("ccnet", "CCNet", "ICCV 2019", "CCHead")
_mmseg("nonlocal", "Non-local network", "CVPR 2018", "NLHead")
_mmseg("gcnet", "GCNet", "ICCVW 2019", "GCHead")
_mmseg("danet", "DANet", "CVPR 2019", "DAHead")
_mmseg("emanet", "EMANet", "ICCV 2019", "EMAHead", small={"num_bases": 6})
_mmseg("ann", "ANN", "ICCV 2019", "ANNHead", small={"key_pool_scales": (1, 3)})
_mmseg("apcnet", "APCNet", "CVPR 2019", "APCHead", small={"pool_scales": (1, 3)})
_mmseg(
    "psanet",
    "PSANet",
    "ECCV 2018",
    "PSAHead",
    small={"mask_size": (7, 9)},
    fixed_size="whether the features' height and width are odd decides how they are resized",
    test_sizes=((65, 97),),
)
