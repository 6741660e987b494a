"""What the declared blocks inside a network ask of its INT8 form."""

from __future__ import annotations

import onnx
from torch import nn

from edgeattn.blocks import BLOCKS
from edgeattn.export.metadata import metadata_of, module_scopes


def declared_exclusions(network: nn.Module, model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the torch module paths that the blocks inside a network keep out of INT8.

    Blocks are found by their class; a path that the graph does not hold (folded away, or an output left out) is none.

    Args:
        network: the network that the graph was exported from.
        model: its graph, whose nodes carry their module paths.
    """
    held = {scope for node in model.graph.node for scope in module_scopes(metadata_of(node))}
    policies = [
        (spec.build, spec.int8_exclude) for spec in BLOCKS if spec.int8_exclude and isinstance(spec.build, type)
    ]
    found = (
        f"{path}.{inner}" if path else inner
        for path, module in network.named_modules()
        for block, inside in policies
        if isinstance(module, block)
        for inner in inside
    )
    return tuple(path for path in dict.fromkeys(found) if path in held)
