"""Export-friendly attention blocks and their registry."""

from edgeattn.blocks import zoo as _zoo  # noqa: F401  (fills the registry)
from edgeattn.blocks.abn import ABN
from edgeattn.blocks.co_attention import (
    AFFINITIES,
    CoAttention,
    CoAttentionBase,
    CoAttentionCore,
    CoAttentionOneWayCore,
)
from edgeattn.blocks.core import AttentionCore
from edgeattn.blocks.criss_cross import CrissCrossAttention, CrissCrossCore
from edgeattn.blocks.pixel_attention import PixelAttentionCore
from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.rcca import RCCAModule
from edgeattn.blocks.spec import BLOCKS, BlockSpec, Overflow, Published, TensorInput, Variant

__all__ = [
    "ABN",
    "AFFINITIES",
    "BLOCKS",
    "AttentionCore",
    "BlockSpec",
    "CoAttention",
    "CoAttentionBase",
    "CoAttentionCore",
    "CoAttentionOneWayCore",
    "CrissCrossAttention",
    "CrissCrossCore",
    "Fp32Step",
    "Overflow",
    "PixelAttentionCore",
    "Published",
    "RCCAModule",
    "TensorInput",
    "Variant",
]
