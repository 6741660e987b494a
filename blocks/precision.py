"""What keeps blocks finite in FP16: the mark of steps that stay in FP32, and the energy of a masked position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

LOWEST = -65504.0
"""Energy of what must not be attended to: the lowest finite FP16 number, so that no precision meets an infinity."""


class Fp32Step(nn.Module):
    """A parameter-free step of a block that stays in FP32 when the rest of the model becomes FP16.

    `edgeattn.export.fp16` finds it by this class in the nodes' metadata. Mark the smallest closed region that needs the
    range or digits: products that sum over positions, their normalisers, the path in between. Softmax with the energies
    before it, reductions and norms stay FP32 by themselves and need no mark.

    Args:
        function: the step; takes and returns tensors.
    """

    def __init__(self, function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Apply the function."""
        return self.function(*inputs)
