"""Times COSNet on a stream of frames: two graphs with kept references against the whole network for each frame.

    python benchmarks/cosnet_streaming.py [CASE ...]

Cases: cosnet-digits (bundled weights, 128x160) and cosnet-r101 (random weights, 473x473; minutes). Writes
benchmarks/results/cosnet_streaming.json; cases that are not named keep their earlier result. Times are those of this
machine's processor under the load that is recorded with them, and no proxy for a GPU's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from edgeattn.deploy.video import VideoRequest, segment_video
from edgeattn.foundation import write_text
from edgeattn.models import MODELS, digits

RESULT = Path(__file__).parent / "results" / "cosnet_streaming.json"


@dataclass(frozen=True)
class Case:
    """What to time.

    Attributes:
        frames: length of the stream.
        compared: frames that the whole network segments too.
        trained: use the bundled weights, not random ones.
    """

    frames: int
    compared: int
    trained: bool


CASES = {"cosnet-digits": Case(48, 8, True), "cosnet-r101": Case(6, 1, False)}


def write_frames(folder: Path, count: int) -> Path:
    """Write photographs with digits as the frames of a stream."""
    images = (image for sample in digits.held_out("pair", (count + 1) // 2) for image in sample.images)
    folder.mkdir()
    for index, image in enumerate(islice(images, count)):
        Image.fromarray(image).save(folder / f"{index:05}.png")
    return folder


def random_weights(model: str, path: Path) -> Path:
    """Write the weights of an untrained network."""
    torch.manual_seed(0)
    save_file(MODELS.get(model).build().state_dict(), path)
    return path


def measure(model: str, case: Case) -> dict[str, Any]:
    """Return the record of a stream, with the load of the machine before and after."""
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = VideoRequest(model, compared=case.compared)
        if not case.trained:
            request = replace(request, checkpoint=str(random_weights(model, folder / "random.safetensors")))
        frames = write_frames(folder / "frames", case.frames)
        record = segment_video(frames, folder / "masks", request).record
    return {
        "weights": "bundled" if case.trained else "random: only times and differences mean something",
        **{key: record[key] for key in ("size", "frames", "encoder_runs", "seconds", "frames_per_second", "threads")},
        "references": len(record["references"]),
        "combination": record["combination"]["name"],
        "against_whole_network": record["against_whole_network"],
        "measured_on": record["measured_on"],
        "processors": os.cpu_count(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run the cases that are named, or all."""
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"unknown case {unknown[0]!r}. Choose of {', '.join(CASES)}.")
    torch.set_num_threads(1)
    console = Console()
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    table = Table("model", "frames", "refs", "encoded", "frames/s", "whole s", "streamed s", "saved")
    for name in names:
        results[name] = found = measure(name, CASES[name])
        whole = found["against_whole_network"]
        table.add_row(
            name,
            *(str(found[key]) for key in ("frames", "references", "encoder_runs")),
            f"{found['frames_per_second']:.2f}",
            f"{whole['seconds_per_frame_whole']:.3f}",
            f"{whole['seconds_per_frame_streamed']:.3f}",
            f"{whole['share_of_time_saved']:.1%}",
        )
        write_text(RESULT, json.dumps(results, indent=1) + "\n")
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; written to {RESULT}")


if __name__ == "__main__":
    main()
