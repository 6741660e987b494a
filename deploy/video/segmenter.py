"""Runs the two graphs of a video segmenter, with the features of the references kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from edgeattn.foundation import UserError
from edgeattn.models import ModelSpec, Sample
from edgeattn.validation import runners
from edgeattn.validation.open_form import OpenForm, open_form


class VideoSegmenter:
    """Both graphs, opened; a context manager, inside which they run.

    Args:
        spec: the model, for its preprocessing.
        encoder: file of the encoder.
        attention: file of the attention.
        size: (height, width) that the graphs take.
        threads: ONNX Runtime's threads within an operation.

    Raises:
        UserError: a file is missing or no ONNX model.
    """

    def __init__(
        self, spec: ModelSpec, encoder: Path, attention: Path, size: tuple[int, int], *, threads: int = 1
    ) -> None:
        self.spec, self.size = spec, size
        self._encoder = open_form(encoder, name="encoder", threads=threads)
        self._attention = open_form(attention, name="attention", threads=threads)
        self._references: np.ndarray | None = None
        self._active = contextlib.ExitStack()
        self.encoder_runs = 0

    @property
    def measured(self) -> str:
        """Where and how the graphs are run, for the record."""
        return self._encoder.measured

    def __enter__(self) -> VideoSegmenter:
        for form in (self._encoder, self._attention):
            self._active.enter_context(form.runner)
        return self

    def __exit__(self, *_: object) -> None:
        self._active.close()

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Return the features (1, channels, h, w) of an RGB image (height, width, 3) uint8 of any size."""
        self.encoder_runs += 1
        return _run(self._encoder, {"frames": network_input(self.spec, image, self.size)}, "features")

    def refer_to(self, features: Sequence[np.ndarray]) -> None:
        """Keep the features of the references, each as `encode` returns them."""
        self._references = np.stack([feature[0] for feature in features])[None]

    def probability(self, features: np.ndarray) -> np.ndarray:
        """Return the object's probability (height, width), at the size of the graphs, from a target's features."""
        assert self._references is not None, "refer_to comes first"
        feed = {"target_features": features, "reference_features": self._references}
        return np.asarray(_run(self._attention, feed, "mask")[0, 0])


def network_input(spec: ModelSpec, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an RGB image (height, width, 3) uint8 of any size as the network takes it, (1, 3, *size)."""
    return spec.preprocessing(Sample((image,), None).resized(size).images[0])


def resized_probability(probability: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a probability (height, width) at another size, bilinear, as the published evaluation resizes it."""
    if probability.shape == size:
        return probability
    tensor = torch.from_numpy(probability)[None, None]
    return np.asarray(F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0])


def _run(form: OpenForm, feed: Mapping[str, np.ndarray], output: str) -> np.ndarray:
    try:
        return np.asarray(form.runner.infer(runners.feed_for(form.runner, form.facts, feed))[output])
    except runners.RUNTIME_ERRORS as error:
        raise UserError(f"{form.runtime} cannot run {form.path}: {error}.") from error
