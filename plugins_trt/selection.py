"""What a kernel library is to hold: operations with their sizes, data types and layouts, for targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeattn.foundation import UserError
from edgeattn.plugins_trt.registry import PLUGINS
from edgeattn.plugins_trt.spec import ELEMENT_BYTES, LAYOUTS, PluginSpec
from edgeattn.plugins_trt.variants import KernelVariant, variants_of
from edgeattn.targets import SMS, TARGETS


@dataclass(frozen=True)
class Operation:
    """An operation at one set of sizes.

    Attributes:
        spec: the operation.
        static: values of the sizes that are compiled in.
        elements: data types of its tensors.
    """

    spec: PluginSpec
    static: Mapping[str, int]
    elements: tuple[str, ...] = tuple(ELEMENT_BYTES)


@dataclass(frozen=True)
class Destination:
    """What kernels for one CUDA architecture have to suit.

    Attributes:
        ptx_isa: newest PTX ISA that every driver takes, such as 85 for 8.5.
        shared_memory: most shared memory one block may use, in bytes.
    """

    ptx_isa: int
    shared_memory: int


def destinations(targets: Sequence[str] = (), sms: Mapping[int, int] | None = None) -> dict[int, Destination]:
    """Return what to compile for, by CUDA architecture; what suits all targets of an architecture where there are more.

    Args:
        targets: names of deployment targets.
        sms: further architectures, each with the newest PTX ISA that its driver takes.

    Raises:
        UserError: an unknown target or architecture, or nothing to compile for.
    """
    wanted = [(target.sm, target.ptx_isa, 1024 * target.shared_memory_kib) for target in map(TARGETS.get, targets)]
    for sm, isa in (sms or {}).items():
        if sm not in SMS:
            raise UserError(f"no kernel can be built for sm_{sm}. Known architectures: {', '.join(map(str, SMS))}.")
        wanted.append((sm, isa, SMS[sm].shared_memory_bytes))
    if not wanted:
        raise UserError("nothing to build for. Name a target (--target), or an architecture (--sm 87 --ptx-isa 85).")
    return {
        sm: Destination(
            min(isa for other, isa, _ in wanted if other == sm),
            min(shared for other, _, shared in wanted if other == sm),
        )
        for sm in sorted({sm for sm, _, _ in wanted})
    }


def all_destinations() -> dict[int, Destination]:
    """Return what suits every known target; for architectures without one, what suits the oldest driver they have."""
    names = [target.name for target in TARGETS]
    served = {target.sm for target in TARGETS}
    return destinations(names, {sm: SMS[sm].minimum_ptx_isa for sm in SMS if sm not in served})


def pair_sms(sms: Sequence[int], ptx_isas: Sequence[int]) -> dict[int, int]:
    """Return the PTX ISA of each CUDA architecture.

    Raises:
        UserError: not one for each, or an architecture twice.
    """
    if len(sms) != len(ptx_isas) or len({*sms}) != len(sms):
        raise UserError(
            f"the architectures {', '.join(map(str, sms)) or 'none'} and the PTX ISAs "
            f"{', '.join(map(str, ptx_isas)) or 'none'} are not pairs. Give each --sm once, with its --ptx-isa."
        )
    return dict(zip(sms, ptx_isas, strict=True))


def preset_operations(names: Sequence[str] = ()) -> list[Operation]:
    """Return operations at the sizes of published models.

    Args:
        names: names of operations, or of operators, which stand for all their forms; all when empty.

    Raises:
        UserError: an unknown name, or one without kernels.
    """
    return [Operation(spec, static) for spec in chosen_specs(names) for static in spec.presets]


def sized_operations(sizes: Sequence[Mapping[str, int]], names: Sequence[str] = ()) -> list[Operation]:
    """Return operations at given sizes.

    Args:
        sizes: sets of sizes, each with all that the operations compile in.
        names: see `preset_operations`.

    Raises:
        UserError: a set lacks a size of a chosen operation, or names one that it does not compile in.
    """
    specs = chosen_specs(names)
    for spec in specs:
        for static in sizes:
            if static.keys() != {*spec.static}:
                raise UserError(
                    f"{spec.name} compiles in {', '.join(spec.static) or 'no sizes'}, but the sizes given are "
                    f"{', '.join(static)}. Choose the operations that they are for with --operation."
                )
    return [Operation(spec, {name: static[name] for name in spec.static}) for spec in specs for static in sizes]


def parse_sizes(text: str) -> dict[str, int]:
    """Return the sizes of a text such as "head_channels=64,channels=512".

    Raises:
        UserError: another form, or a size outside 1 to 65536.
    """
    parts = [re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,6})\s*", part) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if len(sizes) != len(parts) or not all(1 <= size <= 65536 for size in sizes.values()):
        raise UserError(f"the sizes {text!r} are not NAME=NUMBER pairs, such as --size head_channels=64,channels=512.")
    return sizes


def chosen_specs(names: Sequence[str] = ()) -> list[PluginSpec]:
    """Return the declarations with kernels that names stand for (see `preset_operations`)."""
    runnable = [spec for spec in PLUGINS if spec.launches]
    for name in names:
        if not any(name in (spec.name, spec.op_type) for spec in runnable):
            raise UserError(
                f"no operation {name!r} has kernels. These have: {', '.join(spec.name for spec in runnable)}."
            )
    return [spec for spec in runnable if not names or {spec.name, spec.op_type} & {*names}]


def variants(
    operations: Sequence[Operation],
    sms: Sequence[int],
    elements: Sequence[str] = (),
    layouts: Sequence[str] = LAYOUTS,
) -> list[KernelVariant]:
    """Return the kernel variants of operations, each once.

    Args:
        operations: the operations.
        sms: CUDA architectures.
        elements: data types in place of the operations' own.
        layouts: layouts of 4-D tensors; operations without such tensors have linear kernels only.

    Raises:
        UserError: an unknown data type or layout, or no kernel for a combination.
    """
    found: dict[tuple[object, ...], KernelVariant] = {}
    for sm in sms:
        for operation in operations:
            for element in elements or operation.elements:
                for layout in layouts if operation.spec.has_maps else LAYOUTS[:1]:
                    for variant in variants_of(operation.spec, element, layout, sm, operation.static):
                        key = (operation.spec.name, variant.launch.name, element, layout, sm, *variant.static.items())
                        found.setdefault(key, variant)
    return list(found.values())
