"""`edgeattn demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.cli.console import conclude, progress_bars
from edgeattn.deploy.demo import DEMO_REQUESTS
from edgeattn.deploy.pipeline import ExportRun


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run directories.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(min=1, help="How many held-out samples parity is judged on.")] = 200,
) -> None:
    """Export the two bundled trained models in every form and prove parity, on this machine's CPU.

    Exit status 1 when a form fails parity.
    """
    results = {}
    for name, make_request in DEMO_REQUESTS.items():
        with progress_bars(f"{name}: ") as progress:
            results[name] = ExportRun(make_request(samples), output / name, progress).run()
    conclude(results, {name: output / name for name in results})
