"""The registry of plugin declarations."""

from __future__ import annotations

from edgeattn.foundation import Registry, UserError
from edgeattn.plugins_trt.spec import PluginSpec

PLUGINS: Registry[PluginSpec] = Registry("plugin")


def spec_of(op_type: str, input_count: int) -> PluginSpec:
    """Return the declaration that a node of domain `edgeattn` refers to.

    Args:
        op_type: the node's operator name.
        input_count: number of the node's inputs, which tells optional inputs apart.

    Raises:
        UserError: no such operation, or not with that many inputs.
    """
    candidates = [spec for spec in PLUGINS if spec.op_type == op_type]
    for spec in candidates:
        if len(spec.inputs) == input_count:
            return spec
    known = ", ".join(f"{spec.op_type} with {len(spec.inputs)} inputs" for spec in candidates or PLUGINS)
    raise UserError(f"edgeattn has no operation {op_type} with {input_count} inputs. It knows: {known}.")
