"""Attention classifiers of ResNet-50 size on ImageNet: official, PytorchInsight's and timm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeattn.models.classifier_resnet import ClassifierResNet
from edgeattn.models.classifiers import (
    bam_resnet,
    cbam_resnet,
    eca_resnet,
    resnest,
    scnet,
    se_resnet,
    sge_resnet,
    sk_resnet,
    sk_resnet_dense,
)
from edgeattn.models.spec import Layout, Preprocessing, Told
from edgeattn.models.zoo.declare import ORIGINALS, classes_of, classification

# Networks whose states have the same names share a small form with the options of all of them.
_SMALL = {"num_classes": 7, "blocks": (1, 1), "base_width": 8}
_SMALL_KERNELS = {"k_sizes": (3, 5)}
_ECA_TOLD = {
    **classes_of("fc.weight"),
    "k_sizes": Told(tuple(f"layer{stage}.0.eca.conv.weight" for stage in range(1, 5)), axis=2),
}
_SMALL_STEM = {"stem": (4, 6)}
_FEW_GROUPS = {"groups": 4, "group_width": 32, "ceil_pool": True}
_SMALL_SE = {**_FEW_GROUPS, "stride_on_first": True}
_CONVOLUTIONS = {"bias": True, "convolutions": True}

# SENet's models/SE-ResNet-50.prototxt; SKNet's are trained in the same way.
_CAFFE_BGR = Preprocessing("BGR", 1.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))

_TIMM_SE = {r"\.se\.fc1\.": ".se.fc.0.", r"\.se\.fc2\.": ".se.fc.2."}
_TIMM_SE_LEGACY = {
    r"^layer0\.": "",
    r"^last_linear\.": "fc.",
    r"\.se_module\.fc1\.": ".se.fc.0.",
    r"\.se_module\.fc2\.": ".se.fc.2.",
}
_TIMM_SK = {r"\.conv([13])\.conv\.": r".conv\1.", r"\.conv([13])\.bn\.": r".bn\1."}
_TIMM_ECA = {r"\.se\.conv\.": ".eca.conv."}
_TIMM_CBAM = {
    r"\.se\.channel\.fc1\.": ".cbam.ChannelGate.mlp.1.",
    r"\.se\.channel\.fc2\.": ".cbam.ChannelGate.mlp.3.",
    r"\.se\.spatial\.conv\.(conv|bn)\.": r".cbam.SpatialGate.spatial.\1.",
}


def _caffe_sk() -> dict[str, str]:
    """Return the key map from tensors called layer.parameter, after the layers of the official Caffe SKNet-50."""
    layers = {
        "1x1_reduce": ("conv1", "bn1"),
        "3x3g32": ("conv2.paths.0.conv", "conv2.paths.0.bn"),
        "3x3g32d2": ("conv2.paths.1.conv", "conv2.paths.1.bn"),
        "B_fc1": ("conv2.attn.fc_reduce", "conv2.attn.bn"),
        "B_fc2": ("conv2.attn.fc_select", ""),
        "1x1_increase": ("conv3", "bn3"),
        "1x1_proj": ("downsample.0", "downsample.1"),
    }
    keys = {r"^conv1/7x7_s2\.": "conv1.", r"^conv1/7x7_s2/bn\.": "bn1.", r"^classifier\.": "fc."}
    for stage, count in enumerate((3, 4, 6, 3)):
        for position in range(count):
            for layer, (convolution, norm) in layers.items():
                published, ours = f"^conv{stage + 2}_{position + 1}/{layer}", f"layer{stage + 1}.{position}"
                keys[rf"{published}\."] = f"{ours}.{convolution}."
                if norm:
                    keys[rf"{published}/bn\."] = f"{ours}.{norm}."
    return keys


def _classifier(
    name: str,
    summary: str,
    network: Callable[..., ClassifierResNet],
    arguments: Mapping[str, object],
    *layouts: Layout,
    small: Mapping[str, object] | None = None,
    **fields: Any,
) -> None:
    """Register a classifier.

    Args:
        name: see `ModelSpec`.
        summary: see `ModelSpec`.
        network: its constructor; the original has the same name.
        arguments: its arguments.
        layouts: see `ModelSpec`.
        small: what the small form has besides, or instead of, `arguments` and `_SMALL`.
        fields: further fields of `ModelSpec`.
    """
    classification(
        name,
        summary,
        arguments,
        network=network,
        small={**_SMALL, **arguments, **(small or {})},
        original=f"{ORIGINALS}.classifier_resnet:{network.__name__}",
        layouts=layouts,
        **fields,
    )


_classifier(
    "se-resnet50",
    "SE-ResNet-50 (CVPR 2018), official",
    se_resnet,
    {},
    Layout(listing="se-resnet50"),
    small={"blocks": (1, 2)},
)
_classifier(
    "se-resnet50-insight",
    "SE-ResNet-50 with biases in the gates, PytorchInsight",
    se_resnet,
    {"bias": True},
    Layout("insight", listing="se-resnet50-insight"),
)
_classifier(
    "se-resnet50-timm",
    "SE-ResNet-50, timm's seresnet50",
    se_resnet,
    _CONVOLUTIONS,
    Layout("timm", _TIMM_SE, "se-resnet50-timm"),
    small=_SMALL_SE,
)
_classifier(
    "se-resnet50-legacy",
    "SE-ResNet-50 converted from Caffe, timm's legacy_seresnet50",
    se_resnet,
    {**_CONVOLUTIONS, "stride_on_first": True, "ceil_pool": True},
    Layout("timm", _TIMM_SE_LEGACY, "se-resnet50-legacy"),
    small=_SMALL_SE,
)
_classifier(
    "se-resnext50-timm",
    "SE-ResNeXt-50 32x4d, timm's seresnext50_32x4d",
    se_resnet,
    {**_CONVOLUTIONS, "groups": 32, "group_width": 4},
    Layout("timm", _TIMM_SE, "se-resnext50-timm"),
    small=_SMALL_SE,
)
_classifier(
    "sknet50",
    "SKNet-50 (CVPR 2019), official, converted from Caffe",
    sk_resnet,
    {"ceil_pool": True},
    Layout("caffe", _caffe_sk(), "sknet50"),
    small=_FEW_GROUPS,
    preprocessing=_CAFFE_BGR,
)
_classifier(
    "sk-resnet50-insight",
    "SK-ResNet-50 with a dense and a grouped branch, PytorchInsight",
    sk_resnet_dense,
    {},
    Layout("insight", listing="sk-resnet50-insight"),
    small={"base_width": 16, "groups": 4},
)
_classifier(
    "sk-resnet50-timm",
    "SK-ResNet-50 whose branches share the input's channels, timm's skresnet50",
    sk_resnet,
    {"groups": 1, "group_width": 64, "rd_divisor": 8, "split_input": True},
    Layout("timm", _TIMM_SK, "sk-resnet50-timm"),
)
_classifier(
    "sk-resnext50-timm",
    "SK-ResNeXt-50 32x4d, timm's skresnext50_32x4d",
    sk_resnet,
    {},
    Layout("timm", _TIMM_SK, "sk-resnext50-timm"),
    small=_FEW_GROUPS,
)
_classifier(
    "eca-resnet50",
    "ECA-ResNet-50 (CVPR 2020), official",
    eca_resnet,
    {},
    Layout(listing="eca-resnet50"),
    small=_SMALL_KERNELS,
    told=_ECA_TOLD,
)
_classifier(
    "eca-resnet50-k3",
    "ECA-ResNet-50 with kernels of 3, what the official code trains unless told otherwise",
    eca_resnet,
    {"k_sizes": (3, 3, 3, 3)},
    Layout(listing="eca-resnet50-k3"),
    small=_SMALL_KERNELS,
    told=_ECA_TOLD,
)
_classifier(
    "eca-resnet50d-timm",
    "ECA-ResNet-50 with deep stem and pooled shortcuts, timm's ecaresnet50d",
    eca_resnet,
    {"k_sizes": (5, 5, 5, 7), "avg_down": True, "stem": (32, 32)},
    Layout("timm", _TIMM_ECA, "eca-resnet50d-timm"),
    small=_SMALL_STEM,
    told=_ECA_TOLD,
)
_classifier(
    "eca-resnet50t-timm",
    "ECA-ResNet-50 with tiered stem and pooled shortcuts, timm's ecaresnet50t",
    eca_resnet,
    {"k_sizes": (5, 5, 5, 7), "avg_down": True, "stem": (24, 32)},
    Layout("timm", _TIMM_ECA, "eca-resnet50t-timm"),
    small=_SMALL_STEM,
    told=_ECA_TOLD,
    size=(256, 256),
)
_classifier(
    "sge-resnet50",
    "SGE-ResNet-50 (2019), official",
    sge_resnet,
    {},
    Layout(listing="sge-resnet50"),
    small={"groups": 4},
)
_classifier("cbam-resnet50", "CBAM-ResNet-50 (ECCV 2018), official", cbam_resnet, {}, Layout(listing="cbam-resnet50"))
_classifier(
    "cbam-resnet50-timm",
    "CBAM-ResNet-50, timm's resnet50 with attn_layer cbam",
    cbam_resnet,
    {"bias": False, "convolutions": True, "mean_first": True},
    Layout("timm", _TIMM_CBAM, "cbam-resnet50-timm"),
)
_classifier("bam-resnet50", "BAM-ResNet-50 (BMVC 2018), official", bam_resnet, {}, Layout(listing="bam-resnet50"))
_classifier(
    "resnest50",
    "ResNeSt-50 (CVPRW 2022), official and timm's resnest50d",
    resnest,
    {"stem": (32, 32)},
    Layout(listing="resnest50"),
    Layout("timm", listing="resnest50-timm"),
    small=_SMALL_STEM,
)
for _radix, _cardinality, _width in (
    (1, 1, 64),
    (2, 1, 64),
    (4, 1, 64),
    (1, 2, 40),
    (2, 2, 40),
    (4, 2, 40),
    (1, 4, 24),
):
    _form = f"{_radix}s{_cardinality}x{_width}d"
    _listing = f"resnest50-fast-{_form}"
    _classifier(
        _listing,
        f"ResNeSt-50 {_form} of the ablation study, which pools before the attention",
        resnest,
        {
            "radix": _radix,
            "cardinality": _cardinality,
            "bottleneck_width": _width,
            "avd_first": True,
            "stem": (32, 32),
        },
        Layout(listing=_listing),
        *([Layout("timm", listing=f"{_listing}-timm")] if (_radix, _cardinality) in ((4, 2), (1, 4)) else []),
        small={**_SMALL_STEM, "radix": 1 if _radix == 1 else 4, "cardinality": 2, "bottleneck_width": 64},
    )
_classifier(
    "scnet50",
    "SCNet-50 (CVPR 2020), official",
    scnet,
    {},
    Layout(listing="scnet50"),
)
_classifier(
    "scnet50-v1d",
    "SCNet-50 with deep stem and average pools, official",
    scnet,
    {"pooled": True, "stem": (32, 32)},
    Layout(listing="scnet50-v1d"),
    small=_SMALL_STEM,
)
