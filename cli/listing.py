"""`edgeattn list`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from edgeattn.blocks import BLOCKS
from edgeattn.blocks.catalogue import dynamic_axes_of, plugins_of
from edgeattn.cli.console import CONSOLE
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.plugins_trt import PLUGINS
from edgeattn.targets import TARGETS


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
    table = Table(_name("model"), "what it is", "size", "weights")
    for model in MODELS:
        weights = "bundled" if model.checkpoint else "yours"
        table.add_row(model.name, model.summary, f"{model.size[0]}x{model.size[1]}", weights)
    return table


def _plugins() -> Table:
    table = Table(_name("operation"), "inputs", "what it computes")
    for plugin in PLUGINS:
        table.add_row(plugin.op_type, ", ".join(tensor.name for tensor in plugin.inputs), plugin.summary)
    return table


def _targets() -> Table:
    table = Table(_name("target"), "what it is", "TensorRT", "CUDA", "SM")
    for target in TARGETS:
        table.add_row(target.name, target.summary, _dotted(target.tensorrt), _dotted(target.cuda), f"sm_{target.sm}")
    return table


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


_LISTINGS = {"blocks": _blocks, "models": _models, "plugins": _plugins, "targets": _targets}


def list_declarations(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(_LISTINGS)}.", show_default=False)],
) -> None:
    """List the blocks, models, plugin operations or deployment targets."""
    if what not in _LISTINGS:
        raise UserError(f"edgeattn cannot list {what!r}. It lists {', '.join(_LISTINGS)}.")
    CONSOLE.print(_LISTINGS[what]())
