"""Images and arrays that a user gives, as the inputs of a declared model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgeattn.export.calibration import (
    MINIMUM,
    CalibrationSamples,
    calibration_samples,
    image_files,
    read_image,
    require_minimum,
)
from edgeattn.foundation import UserError
from edgeattn.models.spec import ModelSpec, Sample


def model_data(
    source: Path,
    spec: ModelSpec,
    size: tuple[int, int] | None,
    shapes: Mapping[str, tuple[int | None, ...]],
    *,
    minimum: int = MINIMUM,
) -> CalibrationSamples:
    """Open a user's data.

    Args:
        source: a folder of images or a .npz file of network inputs.
        spec: the model; where its graph preprocesses, images stay uint8.
        size: (height, width) that images are resized to.
        shapes: shape of each input by name.
        minimum: fewest samples that are accepted.

    Raises:
        UserError: the source does not exist, is unreadable or holds too little.
    """
    types = dict.fromkeys(shapes, spec.input_type)
    if size is None or not (spec.preprocessing.in_graph and source.is_dir()):
        return calibration_samples(
            source, inputs=shapes, types=types, size=size, preprocess=spec.preprocessing, minimum=minimum
        )
    count, of_size = len(spec.inputs), size
    files = image_files(source)
    if len(files) % count:
        raise UserError(
            f"the calibration folder {source} holds {len(files)} images, but the model takes {count} at a time. Give a "
            f"multiple of {count}: consecutive images, by name, belong together."
        )
    groups = [files[start : start + count] for start in range(0, len(files), count)]
    require_minimum(len(groups), minimum, str(source))

    def read() -> Iterator[dict[str, np.ndarray]]:
        for group in groups:
            yield spec.network_inputs(Sample(tuple(read_image(file, of_size) for file in group), None))

    return CalibrationSamples(read, shapes, str(source), minimum, types=types)
