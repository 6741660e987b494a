"""Literal transcriptions of the published definitions, the reference of every parity check.

Each module is written from the paper and the public behaviour for clarity, not for speed or export. Names and shapes of
parameters and buffers are those of the official checkpoints. Everything has evaluation semantics: normalisation uses
the stored statistics and dropout is the identity. Nothing here shares code with `edgeattn.blocks` or `edgeattn.models`,
so an error has to be made twice to stay hidden. All modules run in FP64 after `.double()`.
"""

from edgeattn.validation.originals.abn import ABN
from edgeattn.validation.originals.ccnet import CCNet
from edgeattn.validation.originals.co_attention import CoAttention
from edgeattn.validation.originals.cosnet import COSNet
from edgeattn.validation.originals.criss_cross import CrissCrossAttention
from edgeattn.validation.originals.rcca import RCCAModule

__all__ = ["ABN", "CCNet", "COSNet", "CoAttention", "CrissCrossAttention", "RCCAModule"]
