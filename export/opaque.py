"""Attention cores as opaque torch operators, which the exporter writes as single nodes of domain `edgeattn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from torch import nn

from edgeattn.blocks import AttentionCore
from edgeattn.plugins_trt import DOMAIN, PLUGINS, PluginSpec, spec_of
from edgeattn.plugins_trt.onnx_form import operator_schema


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
        return _operator(self.core, spec_of(self.core.op_type, len(inputs)))(*inputs)


Operator = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]
_operators: dict[str, Operator] = {}


def _operator(core: AttentionCore, spec: PluginSpec) -> Operator:
    """Return the torch operator of a declaration, computed and shaped by the core's own `forward`."""
    if spec.name not in _operators:
        _operators[spec.name] = _register(core, spec)
    return _operators[spec.name]


def _register(core: AttentionCore, spec: PluginSpec) -> Operator:
    """Register a torch operator; torch allows it once in a process."""
    arguments = ", ".join(f"Tensor {tensor.name}" for tensor in spec.inputs)
    results = "Tensor" if len(spec.outputs) == 1 else f"({', '.join(['Tensor'] * len(spec.outputs))})"
    compute = core.forward

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


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return, for torch's exporter, the ONNX operator of every opaque torch operator registered so far."""
    opset = onnxscript.values.Opset(DOMAIN, 1)
    namespace = getattr(torch.ops, DOMAIN)
    return {
        getattr(namespace, spec.name).default: onnxscript.values.Op(opset, spec.op_type, operator_schema(spec))
        for spec in PLUGINS
        if spec.name in _operators
    }
