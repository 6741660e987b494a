"""A long-term feature bank as two graphs: one encodes clips once, one looks short-term features up among them.

What turns clips and regions into features is the user's own network (I3D or SlowFast in the papers), with a graph of
its own; these two graphs take its features. A video's clips are encoded as they come and kept by time; the bank of a
moment is then a window over them:

    encoded = encode(features of clips)                      once for each clip
    bank    = encoded of the clips of the window, with empty_slot where a slot has none
    output  = attend(short-term features of the moment, bank)    for each moment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from edgeattn.blocks.feature_bank import FeatureBankNonLocal
from edgeattn.deploy.pipeline import save_model
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.to_onnx import to_onnx
from edgeattn.foundation import UserError

_ROIS, _SLOTS = 2, 3
"""Sizes of the example: each another number, and none of them 1, so that both stay dynamic."""


@dataclass(frozen=True)
class FeatureBankGraphs:
    """The two graphs of a non-local feature bank operator.

    Attributes:
        encode: `bank` (1, slots, lt_feat_channels) to `encoded` (1, slots, latent_channels); slots do not mix, so they
            may be encoded in any portions.
        attend: `short_term` (rois, st_feat_channels) and `encoded` to `output` (rois, st_feat_channels +
            latent_channels); all regions share the bank. Numbers of slots and regions are dynamic.
        empty_slot: what a slot without a feature is encoded to, (latent_channels,): training gives it a zero vector,
            which stays in the softmax, so it has to be in the bank.
    """

    encode: onnx.ModelProto
    attend: onnx.ModelProto
    empty_slot: np.ndarray

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write `encode.onnx` and `attend.onnx` and return their paths.

        Args:
            folder: where to; created when missing.
        """
        return save_model(self.encode, folder / "encode.onnx"), save_model(self.attend, folder / "attend.onnx")

    def window(self, encoded: Sequence[np.ndarray | None]) -> np.ndarray:
        """Return the bank (1, slots, latent_channels) of a moment.

        Args:
            encoded: what `encode` gave for the clip of each slot (latent_channels,); None where a slot has no clip.

        Raises:
            UserError: no slot.
        """
        if not encoded:
            raise UserError("the window of a feature bank holds no slot. Give one entry for each slot, None if empty.")
        return np.stack([self.empty_slot if slot is None else slot for slot in encoded])[None]


def feature_bank_graphs(block: FeatureBankNonLocal, *, opset: int = DEFAULT_OPSET) -> FeatureBankGraphs:
    """Export a feature bank operator as two graphs, so that a clip is encoded once for all windows it lies in.

    Args:
        block: the trained operator.
        opset: version of the standard operators.
    """
    bank = torch.rand(1, _SLOTS, block.lt_feat_conv.weight.shape[1])
    encode = to_onnx(
        block,
        [bank],
        input_names=["bank"],
        output_names=["encoded"],
        dynamic_axes=[{1: "slots"}],
        opset=opset,
        method="encode_bank",
    )
    with torch.no_grad():
        encoded = block.encode_bank(bank)
        empty = block.encode_bank(torch.zeros_like(bank[:, :1]))
    attend = to_onnx(
        block,
        [torch.rand(_ROIS, block.st_feat_conv.weight.shape[1]), torch.rand_like(encoded)],
        input_names=["short_term", "encoded"],
        output_names=["output"],
        dynamic_axes=[{0: "rois"}, {1: "slots"}],
        opset=opset,
        method="attend",
    )
    return FeatureBankGraphs(encode, attend, empty[0, 0].numpy())
