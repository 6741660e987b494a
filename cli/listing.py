"""`edgeattn list`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.catalogue import dynamic_axes_of, plugins_of
from edgeattn.cli.console import CONSOLE
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.plugins_trt import PLUGINS
from edgeattn.targets import BUILT_IN, Catalogue, Target, catalogue


def _name(header: str) -> Column:
    """Return the column of names, which have to stay whole to be copied."""
    return Column(header, no_wrap=True)


def _blocks() -> Table:
    table = Table(_name("block"), "what it is", show_lines=True)
    for block in BLOCKS:
        facts = {
            "variants": ", ".join(variant.name for variant in block.variants),
            "dynamic axes": dynamic_axes_of(block),
            "in FP16": block.precision,
            "in INT8": block.int8,
            "plugin": plugins_of(block) or "none",
        }
        table.add_row(block.name, "\n".join([block.paper, *(f"{name}: {fact}" for name, fact in facts.items())]))
    return table


def _models() -> Table:
    table = _compact(_name("model"), "what it is")
    for model in MODELS:
        size = f"{model.size[0]}x{model.size[1]}{' only' if model.fixed_size else ''}"
        layouts = ", ".join(layout.name for layout in model.layouts)
        weights = "weights bundled" if model.checkpoint else f"weights: {layouts}"
        table.add_row(model.name, f"{model.summary}\n[dim]{model.task}, {size}, {weights}[/]")
    return table


def _plugins() -> Table:
    table = Table(_name("operation"), "inputs", "what it computes")
    for plugin in PLUGINS:
        table.add_row(plugin.op_type, ", ".join(tensor.name for tensor in plugin.inputs), plugin.summary)
    return table


def _targets() -> Group:
    known = catalogue()
    refused = Table("not supported", "why, and what to do")
    for entry in known.unsupported:
        refused.add_row(entry.summary, f"{entry.reason} {entry.instead}")
    return Group(
        "A target is SOFTWARE-HARDWARE, such as jetpack-6.2-orin-nx-16. A family of hardware, as in jetpack-6.2-orin, "
        "has only the figures that its modules share; jetpack-6.2 will do where there is one family.",
        _software(known),
        "Where no hardware is named, it is as above. Rates are dense peaks. Nobody has confirmed a figure marked ?.",
        _hardware(known),
        *([_own(known.own)] if known.own else []),
        refused,
        f"Sources of the figures: {BUILT_IN}",
    )


def _compact(*headers: Column | str) -> Table:
    """Return a table of many columns that fits 80 characters."""
    return Table(*headers, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _software(known: Catalogue) -> Table:
    headers = (_name("software"), _name("TensorRT"), "CUDA", "PTX", "cuDNN", _name("Python"), "hardware")
    table = _compact(*headers)
    figures = ("tensorrt_full", "cuda", "ptx_isa", "cudnn", "python")
    for hardware, stacks in itertools.groupby(known.software, lambda stack: stack.hardware):
        runs_on = ", ".join(hardware)
        for stack in stacks:
            target = next(target for target in known.targets if target.software == stack.name)
            table.add_row(stack.name, *(_figure(target, figure) for figure in figures), runs_on)
            runs_on = ""
    return table


def _hardware(known: Catalogue) -> Table:
    table = _compact(_name("hardware"), "SM", "GiB", "GB/s", "INT8 TOPS", "FP16 TFLOPS", "DLA", "shared KiB")
    figures = ("sm", "memory_gib", "bandwidth_gb_s", "int8_tops", "fp16_tflops", "dla_cores", "shared_memory_kib")
    for part in known.hardware:
        target = next(target for target in known.targets if target.hardware == part.name)
        name = f"  {part.name}" if part.family else part.name
        table.add_row(name, *(_figure(target, figure) for figure in figures))
    return table


def _own(targets: Sequence[Target]) -> Table:
    table = Table(_name("target of your own"), "what it is", "TensorRT", "CUDA", "SM")
    for target in targets:
        figures = (_figure(target, figure) for figure in ("tensorrt_full", "cuda", "sm"))
        table.add_row(target.name, target.summary, *figures)
    return table


def _figure(target: Target, figure: str) -> str:
    """Return a figure of a target as text, with a question mark when nobody has confirmed it."""
    value = getattr(target, figure)
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = ".".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text}?" if figure.removesuffix("_full") in target.unverified else text


_LISTINGS = {"blocks": _blocks, "models": _models, "plugins": _plugins, "targets": _targets}


def list_declarations(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(_LISTINGS)}.", show_default=False)],
) -> None:
    """List the blocks, models, plugin operations or deployment targets."""
    if what not in _LISTINGS:
        raise UserError(f"edgeattn cannot list {what!r}. It lists {', '.join(_LISTINGS)}.")
    CONSOLE.print(_LISTINGS[what]())
