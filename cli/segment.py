"""`edgeattn segment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from edgeattn.cli.console import CONSOLE, parse_size, progress_bars
from edgeattn.deploy.masks import Masks, write_masks
from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.validation.inference import CCNET, CONVENTIONS, SlidingWindow


def segment(
    file: Annotated[Path, typer.Argument(help="ONNX form of the model, or an engine built from it here.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    model: Annotated[str, typer.Option(help="Model declaration; see `edgeattn list models`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the masks and overlays.")],
    sliding: Annotated[bool, typer.Option("--sliding", help="In windows at the image's own size, not whole.")] = False,
    window: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of a window; the model's own size by default.")
    ] = None,
    stride: Annotated[str | None, typer.Option(help="DOWNxRIGHT from window to window; two thirds by default.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Also predict the mirrored image, and average.")] = False,
    scale: Annotated[list[float] | None, typer.Option(help="Factor on the image's size; repeatable, averaged.")] = None,
    convention: Annotated[
        str, typer.Option(help=f"Whose evaluation the windows follow: {' or '.join(CONVENTIONS)}.")
    ] = CCNET.name,
    plugin: Annotated[list[Path] | None, typer.Option(help="Plugin library that an engine needs; repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads within an operation.")] = 1,
) -> None:
    """Write a mask and an overlay for each image, at its own size.

    Exit status 2 when the input cannot be used.
    """
    plan = None
    if sliding:
        if convention not in CONVENTIONS:
            raise UserError(f"unknown convention {convention!r}. Choose {' or '.join(CONVENTIONS)}.")
        plan = SlidingWindow(
            parse_size(window) if window else MODELS.get(model).size,
            parse_size(stride) if stride else None,
            flip=flip,
            scales=tuple(scale or (1.0,)),
            convention=CONVENTIONS[convention],
        )
    elif window or stride or flip or scale:
        raise UserError("windows, flips and scales are asked for, but whole images. Add --sliding, or drop them.")
    with progress_bars() as progress:
        masks = write_masks(
            file,
            images,
            output,
            model=model,
            plan=plan,
            plugins=tuple(plugin or ()),
            threads=threads,
            progress=progress,
        )
    CONSOLE.print(_classes(masks))
    CONSOLE.print(f"{len(masks.files)} masks with overlays: {output} ({masks.measured})", highlight=False)


def _classes(masks: Masks) -> Table:
    table = Table("class", "share of pixels")
    for name, pixels in masks.occurring():
        table.add_row(name, f"{pixels / sum(masks.pixels):.2%}")
    return table
