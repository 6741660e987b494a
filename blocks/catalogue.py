"""The catalogue of all blocks as a Markdown page, `docs/blocks.md`."""

from __future__ import annotations

from edgeattn.blocks.spec import BLOCKS, BlockSpec, Variant

_HEAD = """# Blocks

Every attention block that edgeattn rebuilds, with the variants that checkpoints come in. This page is generated from
the declarations (`make docs`); the tests fail when it is out of date. What is stated here is tested for every variant:
equality with an independent original in FP32 and FP64, export with dynamic axes, FP16, INT8.

A variant's own state names load directly; names marked "mapped" load through the variant's key map
(`load_checkpoint(..., key_map=BLOCKS.get(block).variant(name).key_map)`).
"""


def axes_of(spec: BlockSpec, variant: Variant) -> str:
    """Return the symbols of the axes that may vary, in order, or "none"."""
    symbols = dict.fromkeys(symbol for axes in spec.dynamic_axes(variant) for symbol in axes.values())
    return ", ".join(symbols) or "none"


def plugins_of(spec: BlockSpec) -> str:
    """Return the plugin operations that the cores of any variant may become."""
    return ", ".join(dict.fromkeys(plugin for variant in spec.variants for plugin in spec.plugins(variant)))


def dynamic_axes_of(spec: BlockSpec) -> str:
    """Return the dynamic axes of all variants; variants that agree are not repeated."""
    return "; ".join(dict.fromkeys(axes_of(spec, variant) for variant in spec.variants))


def catalogue() -> str:
    """Return the page."""
    summary = ["| block | year | variants | dynamic axes | plugin |", "| --- | --- | --- | --- | --- |"]
    for spec in sorted(BLOCKS, key=lambda spec: spec.name):
        link = f"[`{spec.name}`](#{spec.name})"
        cells = (link, str(spec.year), str(len(spec.variants)), dynamic_axes_of(spec), plugins_of(spec))
        summary.append(f"| {' | '.join(cells)} |")
    sections = [_section(spec) for spec in sorted(BLOCKS, key=lambda spec: spec.name)]
    return "\n".join([_HEAD, *summary, "", *sections])


def _section(spec: BlockSpec) -> str:
    """Return the section of one block."""
    lines = [
        f"## {spec.name}",
        "",
        f"{spec.title[0].upper()}{spec.title[1:]}. {spec.paper}.",
        "",
        f"- class: `{spec.build.__module__}.{spec.build.__qualname__}`",
        f"- code: {spec.code}",
        f"- FP16: {spec.precision}",
        f"- INT8: {spec.int8}",
        "",
        "| variant | constructor (small example) | inputs | dynamic axes | state names | plugin |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in spec.variants:
        arguments = ", ".join(f"{name}={value!r}" for name, value in variant.arguments.items())
        inputs = ", ".join(
            f"{entry.name} ({', '.join(str(axis) for axis in entry.axes)})" for entry in spec.inputs_of(variant)
        )
        cells = (
            variant.name,
            f"`{arguments}`",
            inputs,
            axes_of(spec, variant),
            "mapped" if variant.key_map else "own",
            ", ".join(spec.plugins(variant)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    fixed = [
        f"- {axis} is fixed in {variant.name}: {reason}"
        for variant in spec.variants
        for axis, reason in variant.fixed.items()
    ]
    published = [
        f"- published ({variant.name}): {variant.published.network}; "
        + ", ".join(f"{name}={value!r}" for name, value in variant.published.arguments.items())
        + "; "
        + ", ".join(f"{name} {value}" for name, value in variant.published.sizes.items())
        for variant in spec.variants
        if variant.published
    ]
    return "\n".join([*lines, "", *fixed, *published, ""])
