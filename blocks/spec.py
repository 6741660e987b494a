"""`BlockSpec`: the single declaration of an attention block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgeattn.foundation import Registry


@dataclass(frozen=True)
class BlockSpec:
    """An attention block that a published checkpoint may hold.

    Attributes:
        name: unique name.
        paper: authors' title and venue.
        year: year of publication.
        code: where the published code is.
        build: constructor; takes the keyword arguments of a preset.
        original: `module:class` of the independent original in `edgeattn.validation.originals`.
        test_preset: constructor arguments that make a small block.
        published_preset: constructor arguments of the published network.
        example: for (constructor arguments, batch, height, width), the shapes of the inputs.
        method: name of the module's method that takes these inputs ("forward", or "forward_group").
        dynamic_axes: per input, the axes that may vary, with their names.
        key_maps: published variants other than the official one; each maps a pattern of published names to ours.
        plugin: name of the plugin operation the block's core may become, or None.
        precision: which inner steps stay in FP32 in an FP16 model, in words.
    """

    name: str
    paper: str
    year: int
    code: str
    build: Callable[..., nn.Module]
    original: str
    test_preset: Mapping[str, Any]
    published_preset: Mapping[str, Any]
    example: Callable[[Mapping[str, Any], int, int, int], tuple[tuple[int, ...], ...]]
    dynamic_axes: tuple[Mapping[int, str], ...]
    method: str = "forward"
    key_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    plugin: str | None = None
    precision: str = "all of it may run in FP16"

    def example_inputs(
        self, preset: Mapping[str, Any], batch: int, height: int, width: int, *, seed: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Return normally distributed float32 inputs for a block built with `preset`."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator) for shape in self.example(preset, batch, height, width))


BLOCKS: Registry[BlockSpec] = Registry("block")
