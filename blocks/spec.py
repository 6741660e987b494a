"""`BlockSpec`: the single declaration of an attention block and of the variants that checkpoints come in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from edgeattn.blocks.core import AttentionCore
from edgeattn.foundation import Registry

Arguments = Mapping[str, Any]
"""Constructor arguments of a block."""

Sizes = Mapping[str, int]
"""Size of every symbolic axis, such as `{"batch": 2, "height": 5, "width": 7}`."""

TEST_SIZES: tuple[Sizes, ...] = (
    MappingProxyType({"batch": 2, "height": 5, "width": 7, "frames": 3, "length": 11}),
    MappingProxyType({"batch": 1, "height": 9, "width": 4, "frames": 2, "length": 6}),
    MappingProxyType({"batch": 3, "height": 3, "width": 11, "frames": 5, "length": 17}),
    MappingProxyType({"batch": 3, "height": 1, "width": 6, "frames": 1, "length": 2}),
    MappingProxyType({"batch": 1, "height": 1, "width": 1, "frames": 1, "length": 1}),
)
"""Sizes that a block is tested at unless its declaration says otherwise; exports are traced at the first."""


def _mask(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return booleans, true (forbidden) for about a quarter of the last axis, never for its first entry."""
    mask = torch.rand(shape, generator=generator) < 0.25
    mask[..., 0] = False
    return mask


VALUES: Mapping[str, Callable[[tuple[int, ...], torch.Generator], torch.Tensor]] = {
    "normal": lambda shape, generator: torch.randn(shape, generator=generator),
    "fraction": lambda shape, generator: torch.rand(shape, generator=generator),
    "mask": _mask,
}
"""Examples of what inputs hold: activations (normally distributed), numbers from 0 to 1, masks (true is forbidden)."""


@dataclass(frozen=True)
class TensorInput:
    """One input of a block.

    Attributes:
        name: field name of the tensor.
        axes: per axis a number, the name of a constructor argument, or the symbol of a size ("batch", "height",
            "width", "frames", "length", ...).
        values: what the tensor holds, one of `VALUES`.
    """

    name: str
    axes: tuple[str | int, ...]
    values: str = "normal"

    def shape(self, arguments: Arguments, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape for constructor arguments and sizes; arguments go first."""
        return tuple(axis if isinstance(axis, int) else int({**arguments, **sizes}[axis]) for axis in self.axes)

    def dynamic_axes(self, arguments: Arguments, fixed: Mapping[str, str]) -> dict[int, str]:
        """Return the axes whose size may vary, with their symbols; `fixed` lists symbols that may not."""
        return {
            index: axis
            for index, axis in enumerate(self.axes)
            if isinstance(axis, str) and axis not in arguments and axis not in fixed
        }


FEATURE_MAP = TensorInput("x", ("batch", "channels", "height", "width"))
"""The input of most blocks; its channels are the constructor argument `channels`."""


@dataclass(frozen=True)
class Published:
    """A configuration that was published with trained weights or in a paper's tables; benchmarks run at it.

    Attributes:
        network: the network and data it belongs to, in words.
        arguments: constructor arguments.
        sizes: sizes of the symbolic axes, batch 1 included.
    """

    network: str
    arguments: Arguments
    sizes: Sizes


@dataclass(frozen=True)
class Overflow:
    """Inputs on which a block fails when all of it computes in FP16: the reason for its precision policy.

    Attributes:
        scale: standard deviation of the normally distributed inputs.
        sizes: sizes of the symbolic axes.
        arguments: constructor arguments where they differ from the variant's.
        state: factor by pattern (regular expression, searched) for parameters that have to be larger or smaller than
            `randomise` makes them.
    """

    scale: float
    sizes: Sizes
    arguments: Arguments = field(default_factory=dict)
    state: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One form of a block that checkpoints were trained with.

    Attributes:
        name: unique within the block, such as "official" or "mmcv".
        arguments: constructor arguments of a small block for tests.
        key_map: replacement template by pattern (see `edgeattn.models.checkpoint`) from published names to ours; empty
            where the names are the same.
        listings: published state_dict listings (`tests/data/state_dicts/`) by name, each with the constructor arguments
            that the listed module corresponds to.
        references: recorded outputs of the public implementation (`tests/data/reference/`) by name, each with the
            constructor arguments that the recorded module corresponds to.
        published: a published configuration, or None.
        inputs: the inputs, where they differ from the block's.
        sizes: test sizes, where they differ from the block's.
        fixed: symbols whose size the mathematics fixes, each with the reason.
        method: name of the method that takes the inputs.
        overflow: inputs on which the all-FP16 form fails, or None where it may run in FP16 altogether.
    """

    name: str
    arguments: Arguments
    key_map: Mapping[str, str] = field(default_factory=dict)
    listings: Mapping[str, Arguments] = field(default_factory=dict)
    references: Mapping[str, Arguments] = field(default_factory=dict)
    published: Published | None = None
    inputs: tuple[TensorInput, ...] | None = None
    sizes: tuple[Sizes, ...] | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)
    method: str = "forward"
    overflow: Overflow | None = None


@dataclass(frozen=True)
class BlockSpec:
    """An attention block that a published checkpoint may hold.

    Attributes:
        name: unique name.
        title: the block's name in words.
        paper: authors' title and venue.
        year: year of publication.
        code: where the published code is; several places separated by commas.
        build: the block's class; takes the keyword arguments of a variant.
        original: `module:class` of the independent original in `edgeattn.validation.originals`, same arguments.
        variants: the forms that checkpoints come in; the first is the official one.
        largest: for (constructor arguments, sizes), the number of elements of the largest tensor that the mathematics
            needs besides inputs, outputs and weights; a plain ONNX form stores nothing larger.
        precision: which inner steps stay in FP32 in an FP16 model, and why.
        int8: which convolutions and products an INT8 model quantises, and which it does not.
        int8_exclude: torch module paths inside the block whose convolutions stay in floating point in an INT8 model.
        inputs: the inputs, in the order of the method's arguments.
        sizes: sizes that tests use; exports are traced at the first; the smallest legal size is among them.
    """

    name: str
    title: str
    paper: str
    year: int
    code: str
    build: Callable[..., nn.Module]
    original: str
    variants: tuple[Variant, ...]
    largest: Callable[[Arguments, Sizes], int]
    precision: str
    int8: str
    int8_exclude: tuple[str, ...] = ()
    inputs: tuple[TensorInput, ...] = (FEATURE_MAP,)
    sizes: tuple[Sizes, ...] = TEST_SIZES

    def variant(self, name: str) -> Variant:
        """Return a variant by name."""
        return next(variant for variant in self.variants if variant.name == name)

    def inputs_of(self, variant: Variant) -> tuple[TensorInput, ...]:
        """Return the inputs of a variant."""
        return self.inputs if variant.inputs is None else variant.inputs

    def sizes_of(self, variant: Variant) -> tuple[Sizes, ...]:
        """Return the sizes that a variant is tested at."""
        return self.sizes if variant.sizes is None else variant.sizes

    def dynamic_axes(self, variant: Variant) -> tuple[dict[int, str], ...]:
        """Return, per input of a variant, the axes that may vary with their names."""
        return tuple(entry.dynamic_axes(variant.arguments, variant.fixed) for entry in self.inputs_of(variant))

    def plugins(self, variant: Variant) -> tuple[str, ...]:
        """Return the plugin operations that the cores of a variant may become."""
        with torch.device("meta"):
            modules = self.build(**variant.arguments).modules()
        return tuple(dict.fromkeys(module.op_type for module in modules if isinstance(module, AttentionCore)))

    def example_inputs(
        self, variant: Variant, sizes: Sizes, *, arguments: Arguments | None = None, seed: int = 0, scale: float = 1.0
    ) -> tuple[torch.Tensor, ...]:
        """Return example inputs, floating-point ones as float32.

        Args:
            variant: a variant of this block.
            sizes: size of every symbolic axis; further symbols are ignored.
            arguments: constructor arguments, where they differ from the variant's.
            seed: equal seeds give equal inputs.
            scale: standard deviation of the activations.
        """
        given = variant.arguments if arguments is None else arguments
        tensors = []
        for entry in self.inputs_of(variant):
            generator = torch.Generator().manual_seed(seed + zlib.crc32(entry.name.encode()))
            values = VALUES[entry.values](entry.shape(given, sizes), generator)
            tensors.append(values * scale if entry.values == "normal" else values)
        return tuple(tensors)


BLOCKS: Registry[BlockSpec] = Registry("block")
"""Every declared block; importing `edgeattn.blocks` fills it."""
