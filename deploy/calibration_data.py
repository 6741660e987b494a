"""The images that reduced precision is calibrated on: the user's, or those that come with a model."""

from __future__ import annotations

from pathlib import Path

from edgeattn.export.calibration import CalibrationSamples, calibration_samples
from edgeattn.foundation import UserError
from edgeattn.models import ModelSpec
from edgeattn.validation.model_data import model_data

CALIBRATION_COUNT = 64
"""Bundled images that INT8 is calibrated on."""


def calibration_data(
    spec: ModelSpec, source: Path | None, size: tuple[int, int], shape: tuple[int | None, ...], *, int8: bool
) -> CalibrationSamples | None:
    """Open calibration images. They are never random: INT8 cannot do without them; FP16 and BF16 can.

    Args:
        spec: the model.
        source: folder of images or .npz; the model's bundled training images when None.
        size: (height, width) that images are resized to.
        shape: of each input of the graph; None where it may vary.
        int8: an INT8 form is to be made.

    Returns:
        The samples; None where there are none, and no INT8 form needs them.

    Raises:
        UserError: INT8 has no images, or the source cannot be used.
    """
    shapes = dict.fromkeys(spec.inputs, shape)
    if source is not None:
        return model_data(source, spec, size, shapes)
    if spec.calibration is None:
        if not int8:
            return None
        raise UserError(
            f"INT8 needs real images, and none are bundled with {spec.name}. Give a folder of images or an .npz file "
            "with --calibration."
        )
    bundled = [spec.network_inputs(sample.resized(size)) for sample in spec.calibration(CALIBRATION_COUNT)]
    return calibration_samples(bundled, inputs=shapes, types=dict.fromkeys(shapes, spec.input_type))


def unmeasured_note(spec: ModelSpec) -> str:
    """Return what a user should read where FP16 is made without data."""
    return (
        f"no data is bundled with {spec.name}, so only declared policies decide what stays FP32. Give typical images "
        "with --calibration to measure it."
    )
