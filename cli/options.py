"""Options that several commands take, and the model that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeattn.deploy.evidence import BUNDLED
from edgeattn.deploy.tuning.modules import GRANULARITIES
from edgeattn.export.calibration_methods import METHODS
from edgeattn.foundation import UserError
from edgeattn.models.inspection import ModelGuess, guess_model

Checkpoint = Annotated[str, typer.Argument(help=f"Trained weights (.safetensors, .pth), or '{BUNDLED}'.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model (`edgeattn list models`) or variant (ccnet-r101:num_classes=21). Guessed from a file's tensors."
    ),
]
Layout = Annotated[str | None, typer.Option(help="Published layout of the weights; told from their names by default.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input; the model's own by default.")]
Opset = Annotated[int | None, typer.Option(help="ONNX opset; the target's by default.")]
CalibrationMethod = Annotated[
    str, typer.Option(help=f"How INT8 ranges are chosen: {', '.join(method.name for method in METHODS)}.")
]
CalibrationCache = Annotated[
    Path | None, typer.Option(help="Folder where runs share calibration results, by data and graph.")
]
CalibrationImages = Annotated[
    Path | None, typer.Option(help="Images or .npz that INT8 is calibrated on; bundled training images by default.")
]
Int8Attention = Annotated[bool, typer.Option("--int8-attention", help="Attention products have an INT8 form too.")]
Granularity = Annotated[
    str, typer.Option(help=f"{' or '.join(GRANULARITIES)}: innermost modules, or all below --depth names.")
]
Depth = Annotated[int | None, typer.Option(min=1, help="Names in the path of a block; 2 by default.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that evaluate; one per processor by default.")]


def guessed_model(checkpoint: str) -> ModelGuess:
    """Return the one declared network that a checkpoint's tensors fit.

    Raises:
        UserError: bundled weights, or tensors that fit no network or several.
    """
    if checkpoint == BUNDLED:
        raise UserError(f"'{BUNDLED}' is the weights of many models. Choose one with --model.")
    return guess_model(checkpoint)


def chosen_model(checkpoint: str, model: str | None) -> str:
    """Return the name of the model that was given, or that a checkpoint's tensors tell.

    Raises:
        UserError: see `guessed_model`.
    """
    return guessed_model(checkpoint).model if model is None else model
