"""Random parameters and buffers, so that no gate or statistic stays at its identity initialisation."""

from __future__ import annotations

import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and buffer of a module, in place, with values a trained network might hold.

    Weights of convolutions and linear layers get the variance that keeps activations of order one; running variances
    and the like stay positive; gates such as gamma, which start at zero, get values between 0.5 and 1.5.

    Args:
        module: what to fill.
        seed: equal seeds give equal values for equal state names.

    Returns:
        The module, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.state_dict(keep_vars=True).items()):
            if not value.is_floating_point():
                value.fill_(7)
            elif name.endswith("running_var") or name.endswith("gamma") or value.ndim == 0:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            else:
                noise = torch.randn(value.shape, generator=generator)
                fan_in = value[0].numel() if value.ndim > 1 else 4
                value.copy_(noise / fan_in**0.5)
    return module.eval()


def raise_gains(module: nn.Module, by: float) -> nn.Module:
    """Make the gains of all normalisations positive and larger, in place, and return the module.

    With random gains below 1 a deep network would forget its input.

    Args:
        module: a network after `randomise`.
        by: what is added to the magnitude of each gain.
    """
    with torch.no_grad():
        for norm in module.modules():
            gain = getattr(norm, "weight", None)
            if getattr(norm, "running_var", None) is not None and gain is not None:
                gain.abs_().add_(by)
    return module
