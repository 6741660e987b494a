"""Recognition networks with a few attention blocks: Learn To Pay Attention, CGNL, GloRe, A2-Net."""

from __future__ import annotations

import functools

from edgeattn.blocks.learn_to_pay import AttnVGG
from edgeattn.models.glore import FRAMES, GloReResNet
from edgeattn.models.inserted import a2_resnet, cgnl_resnet
from edgeattn.models.learn_to_pay import FIXED, AttnResNet
from edgeattn.models.spec import Layout, Preprocessing
from edgeattn.models.variants import numbered_classes
from edgeattn.models.zoo.declare import ORIGINALS, classes_of, classification

_CIFAR_RGB = Preprocessing("RGB", 1 / 255, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_GLORE_RGB = Preprocessing("RGB", 1 / 255, (124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3)
_SMALL_RESNET = {"num_classes": 7, "base_width": 8}

_ltpa = functools.partial(
    classification,
    preprocessing=_CIFAR_RGB,
    size=(32, 32),
    classes=numbered_classes(100),
    fixed_size=FIXED,
    test_sizes=((32, 32),),
    told=classes_of("classify.weight"),
)

# Maps of the attention are left out: with them an export needs the layers of the global feature.
for _place, _before in (("before", True), ("after", False)):
    for _suffix, _weights, _softmax in (("", "softmax", True), ("-sigmoid", "sigmoid", False)):
        _choice = {"normalize_attn": _softmax, "before": _before, "return_maps": False}
        _ltpa(
            f"ltpa-vgg-{_place}{_suffix}",
            f"Learn To Pay Attention, VGG, {_weights} attention {_place} pooling, CIFAR-100 (ICLR 2018)",
            _choice,
            network=AttnVGG,
            small={**_choice, "num_classes": 7, "base_channels": 4},
            original=f"{ORIGINALS}.learn_to_pay:AttnVGG",
            layouts=(Layout(listing="ltpa-vgg"),),
        )
_ltpa(
    "ltpa-resnet164",
    "Learn To Pay Attention, ResNet-164, two levels, CIFAR-100 (ICLR 2018)",
    {},
    network=AttnResNet,
    small={"num_classes": 7, "units": 2, "widths": (4, 8, 16, 32)},
    original=f"{ORIGINALS}.learn_to_pay_resnet:AttnResNet",
)

_BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
_KINDS = {"cgnl": "CGNL", "cgnlx": "CGNL with a Gaussian kernel", "nl": "plain non-local block"}

_cgnl = functools.partial(classification, network=cgnl_resnet, original=f"{ORIGINALS}.inserted:CGNLResNet")

for _kind, _title in _KINDS.items():
    for _depth, _blocks in _BLOCKS.items():
        _cgnl(
            f"{_kind}-{_depth}-cub",
            f"{_title}, ResNet-{_depth[1:]}, CUB-200 (NeurIPS 2018)",
            {"kind": _kind, "num_classes": 200, "blocks": _blocks},
            small={"kind": _kind, "blocks": (1, 1, 2, 1), **_SMALL_RESNET},
            size=(448, 448),
            classes=numbered_classes(200),
            # The Gaussian kernel is a constant: it has the same state.
            layouts=(Layout(listing=f"{_kind.removesuffix('x')}-{_depth}-cub"),),
        )
for _kind in ("cgnl", "cgnlx"):
    _cgnl(
        f"{_kind}-r50",
        f"{_KINDS[_kind]}, ResNet-50, ImageNet (NeurIPS 2018)",
        {"kind": _kind},
        small={"kind": _kind, "blocks": (1, 1, 2, 1), **_SMALL_RESNET},
        layouts=(Layout(listing="cgnl-r50"),),
    )

_glore = functools.partial(
    classification,
    network=GloReResNet,
    original=f"{ORIGINALS}.glore_network:GloReResNet",
    preprocessing=_GLORE_RGB,
    test_sizes=((33, 49), (40, 56)),
    told=classes_of("classifier.weight"),
)
# The units are cubic and not normalised: random weights in several of them, on a large map, would leave the range.
_SMALL_GLORE = {
    "num_classes": 7,
    "blocks": (1, 1, 2, 2),
    "places": {3: (1,), 4: (2,)},
    "stem_width": 4,
    "base_width": 4,
}
_UNITS = {"r50": {}, "r101": {"blocks": (3, 4, 23, 3), "places": {3: (1, 3), 4: (6, 12, 18)}}}

for _depth, _arguments in _UNITS.items():
    _glore(
        f"glore-{_depth}-kinetics",
        f"GloRe, 3-D ResNet-{_depth[1:]}-lite, clips of 8 frames, Kinetics-400 (CVPR 2019)",
        _arguments,
        small=_SMALL_GLORE,
        inputs=tuple(f"frame_{index}" for index in range(1, FRAMES + 1)),
        classes=numbered_classes(400),
        layouts=(Layout(listing=f"glore-{_depth}-kinetics"),),
    )
_glore(
    "glore-r50",
    "GloRe, ResNet-50-lite, images: the published video network without its time axis (CVPR 2019)",
    {"num_classes": 1000, "dimensions": 2},
    small={"dimensions": 2, **_SMALL_GLORE},
    layouts=(Layout(listing="glore-r50"),),
)

classification(
    "a2-r50",
    "A2-Net, ResNet-50 with five double attention blocks, as the paper describes it (NeurIPS 2018)",
    {},
    network=a2_resnet,
    small={"blocks": (1, 1, 3, 1), **_SMALL_RESNET},
    original=f"{ORIGINALS}.inserted:A2ResNet",
)
