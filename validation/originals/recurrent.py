"""Recurrent units, original: the modules of torch.nn themselves, which are the published code.

Paper: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., EMNLP 2014 (GRU).
Behaviour: pytorch/pytorch, `torch/nn/modules/rnn.py`.
"""

from __future__ import annotations

import torch
from torch import nn


class LSTM(nn.LSTM):
    """torch.nn.LSTM with its results side by side.

    Args:
        unrolled: of the block; this module knows no difference.
        arguments: of torch.nn.LSTM.
    """

    def __init__(self, *, unrolled: bool = False, **arguments: int) -> None:
        super().__init__(**arguments)

    def forward(self, x: torch.Tensor, *initial: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Return outputs, h and c."""
        outputs, last = super().forward(x, (initial[0], initial[1]) if initial else None)
        return outputs, *last


class GRU(nn.GRU):
    """torch.nn.GRU with its results side by side.

    Args:
        unrolled: of the block; this module knows no difference.
        arguments: of torch.nn.GRU.
    """

    def __init__(self, *, unrolled: bool = False, **arguments: int) -> None:
        super().__init__(**arguments)

    def forward(self, x: torch.Tensor, *initial: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Return outputs and h."""
        return super().forward(x, *initial)


class RNN(nn.RNN):
    """torch.nn.RNN, with tanh, with its results side by side.

    Args:
        unrolled: of the block; this module knows no difference.
        arguments: of torch.nn.RNN.
    """

    def __init__(self, *, unrolled: bool = False, **arguments: int) -> None:
        super().__init__(**arguments)

    def forward(self, x: torch.Tensor, *initial: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Return outputs and h."""
        return super().forward(x, *initial)


class LSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell with its state as two arguments."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next h and c."""
        return super().forward(x, (h, c))


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell."""
