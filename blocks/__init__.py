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
from edgeattn.blocks.rcca import RCCAModule
from edgeattn.blocks.spec import BLOCKS, BlockSpec

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
    "RCCAModule",
]
