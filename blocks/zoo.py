"""Declarations of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeattn.blocks.abn import ABN
from edgeattn.blocks.co_attention import AFFINITIES, CoAttention
from edgeattn.blocks.criss_cross import CrissCrossAttention
from edgeattn.blocks.rcca import RCCAModule
from edgeattn.blocks.spec import BLOCKS, BlockSpec

_ORIGINALS = "edgeattn.validation.originals"
Preset = Mapping[str, Any]
Example = Callable[[Preset, int, int, int], tuple[tuple[int, ...], ...]]
_NCHW = {0: "batch", 2: "height", 3: "width"}
_SOFTMAX_IN_FP32 = "energies, mask and softmax stay in FP32; the sum over values runs in FP16"
_CCNET = "CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019"
_CCNET_CODE = "https://github.com/speedinghzl/CCNet"
_COSNET = "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks, CVPR 2019"
_COSNET_CODE = "https://github.com/carrierlxk/COSNet"


def _one_map(channels_argument: str) -> Example:
    """Return an example function for blocks with one feature map, whose channels are a constructor argument."""

    def example(preset: Preset, batch: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        return ((batch, preset[channels_argument], height, width),)

    return example


def _frame_pair(preset: Preset, batch: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    shape = (batch, preset["channels"], height, width)
    return shape, shape


def _frame_group(preset: Preset, batch: int, height: int, width: int) -> tuple[tuple[int, ...], ...]:
    return (batch, preset["channels"], height, width), (batch, 3, preset["channels"], height, width)


BLOCKS.add(
    BlockSpec(
        name="abn",
        paper="In-Place Activated BatchNorm for Memory-Optimized Training of DNNs, CVPR 2018",
        year=2018,
        code="https://github.com/mapillary/inplace_abn",
        build=ABN,
        original=f"{_ORIGINALS}.abn:ABN",
        test_preset={"channels": 6},
        published_preset={"channels": 512},
        example=_one_map("channels"),
        dynamic_axes=(_NCHW,),
    )
)
BLOCKS.add(
    BlockSpec(
        name="criss-cross",
        paper=_CCNET,
        year=2019,
        code=_CCNET_CODE,
        build=CrissCrossAttention,
        original=f"{_ORIGINALS}.criss_cross:CrissCrossAttention",
        test_preset={"in_dim": 16},
        published_preset={"in_dim": 512},
        example=_one_map("in_dim"),
        dynamic_axes=(_NCHW,),
        key_maps={"mmcv": {r"gamma\.scale": "gamma"}},
        plugin="CrissCrossAttention",
        precision=_SOFTMAX_IN_FP32,
    )
)
BLOCKS.add(
    BlockSpec(
        name="rcca",
        paper=_CCNET,
        year=2019,
        code=_CCNET_CODE,
        build=RCCAModule,
        original=f"{_ORIGINALS}.rcca:RCCAModule",
        test_preset={"in_channels": 64, "out_channels": 16, "num_classes": 5, "recurrence": 2},
        published_preset={"in_channels": 2048, "out_channels": 512, "num_classes": 19, "recurrence": 2},
        example=_one_map("in_channels"),
        dynamic_axes=(_NCHW,),
        plugin="CrissCrossAttention",
        precision=_SOFTMAX_IN_FP32,
    )
)
for affinity in AFFINITIES:
    for gate in (True, False):
        for group in (False, True):
            name = f"co-attention-{affinity}" + ("-gated" if gate else "") + ("-group" if group else "")
            BLOCKS.add(
                BlockSpec(
                    name=name,
                    paper=_COSNET,
                    year=2019,
                    code=_COSNET_CODE,
                    build=CoAttention,
                    original=f"{_ORIGINALS}.co_attention:CoAttention",
                    test_preset={"channels": 12, "affinity": affinity, "gate": gate},
                    published_preset={"channels": 256, "affinity": affinity, "gate": gate},
                    example=_frame_group if group else _frame_pair,
                    dynamic_axes=(_NCHW, {0: "batch", 3: "height", 4: "width"}) if group else (_NCHW, _NCHW),
                    method="forward_group" if group else "forward",
                    plugin="CoAttentionOneWay" if group else "CoAttention",
                    precision=_SOFTMAX_IN_FP32,
                )
            )
