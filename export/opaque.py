"""Attention cores as opaque torch operators, which the exporter writes as single nodes of domain `edgeattn`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnxscript
import torch
from torch import nn

from edgeattn.blocks import AttentionCore
from edgeattn.plugins_trt import DOMAIN, PLUGINS, PluginSpec, spec_of


class OpaqueCore(nn.Module):
    """Calls a core through its torch operator `edgeattn::<declaration>`, which tracing does not look into.

    Args:
        core: the core to hide; its `forward` is what the operator computes.
    """

    def __init__(self, core: AttentionCore) -> None:
        super().__init__()
        self.core = core

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the core's outputs from its inputs."""
        return _operator(type(self.core), spec_of(self.core.op_type, len(inputs)))(*inputs)


@functools.cache
def _operator(core: type[AttentionCore], spec: PluginSpec) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    """Register the torch operator of a declaration, once, computed and shaped by the core's own `forward`."""
    arguments = ", ".join(f"Tensor {tensor.name}" for tensor in spec.inputs)
    results = "Tensor" if len(spec.outputs) == 1 else f"({', '.join(['Tensor'] * len(spec.outputs))})"
    compute = core().forward

    def run(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return compute(*inputs)

    operator = torch.library.custom_op(
        f"{DOMAIN}::{spec.name}", run, mutates_args=(), schema=f"({arguments}) -> {results}"
    )
    operator.register_fake(run)
    return operator


def hide_cores(model: nn.Module) -> nn.Module:
    """Replace every attention core inside `model`, in place, by its opaque operator."""
    for parent in list(model.modules()):
        if isinstance(parent, OpaqueCore):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, AttentionCore):
                setattr(parent, name, OpaqueCore(child))
    return model


def translation_table() -> dict[Callable[..., object], onnxscript.values.Op]:
    """Return, for torch's exporter, the ONNX operator of every opaque torch operator registered so far."""
    opset = onnxscript.values.Opset(DOMAIN, 1)
    table: dict[Callable[..., object], onnxscript.values.Op] = {}
    namespace = getattr(torch.ops, DOMAIN)
    for spec in PLUGINS:
        if spec.name in dir(namespace) or hasattr(namespace, spec.name):
            table[getattr(namespace, spec.name).default] = onnxscript.values.Op(opset, spec.op_type, spec.schema())
    return table
