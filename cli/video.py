"""`edgeattn video`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeattn.cli import options
from edgeattn.cli.console import CONSOLE, parse_size, progress_bars
from edgeattn.deploy.evidence import BUNDLED
from edgeattn.deploy.video import COMBINATIONS, MEAN, VideoRequest, segment_video
from edgeattn.deploy.video.stream import PRECISIONS, RECORD, REFERENCES


def video(
    source: Annotated[Path, typer.Argument(help="Video file, or folder of frames in the order of their names.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the masks, and of graphs and record.")],
    model: options.Model = None,
    checkpoint: Annotated[str, typer.Option(help=f"Trained weights (.safetensors, .pth), or '{BUNDLED}'.")] = BUNDLED,
    layout: options.Layout = None,
    references: Annotated[
        int, typer.Option(min=1, help="Frames that all are compared with, evenly spaced.")
    ] = REFERENCES,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the references at random instead.")] = None,
    combination: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {entry.summary}" for name, entry in COMBINATIONS.items()) + ".")
    ] = MEAN.name,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the network; the model's own by default.")] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write frames with their masks on top.")] = False,
    precision: Annotated[
        str, typer.Option(help=f"{' or '.join(PRECISIONS)}; FP16 is emulated, INT8 calibrated on frames of the video.")
    ] = PRECISIONS[0],
    compared: Annotated[
        int, typer.Option("--compare", min=0, help="Frames on which the whole network is timed too; 0 for none.")
    ] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads within an operation.")] = 1,
) -> None:
    """Write a mask for each frame of a video: the object that its frames share.

    Every frame is encoded once; the references' features are kept. Exit status 2 when the input cannot be used.
    """
    request = VideoRequest(
        model=options.chosen_model(checkpoint, model),
        checkpoint=checkpoint,
        layout=layout,
        references=references,
        seed=seed,
        combination=combination,
        size=parse_size(size) if size else None,
        overlay=overlay,
        precision=precision,
        compared=compared,
        threads=threads,
    )
    with progress_bars() as progress:
        masks = segment_video(source, output, request, progress=progress)
    for line in _summary(masks.record):
        CONSOLE.print(line, highlight=False, markup=False)
    CONSOLE.print(f"{len(masks.files)} masks: {output}, record: {output / RECORD}", highlight=False, markup=False)


def _summary(record: Mapping[str, Any]) -> list[str]:
    """Return what a user should read of the record."""
    lines = [
        f"{record['frames_per_second']:.2f} frames per second, {record['encoder_runs']} encoder runs "
        f"({record['measured_on']})",
        f"the object covers {record['object_share']:.1%} of the pixels",
    ]
    if isinstance(whole := record["against_whole_network"], Mapping):
        lines.append(
            f"{whole['share_of_time_saved']:.0%} of the time saved against {whole['runs_per_frame']} runs of the whole "
            f"network per frame (on {whole['frames']} frames)"
        )
    return [*lines, *(f"note: {note}" for note in record["notes"])]
