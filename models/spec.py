"""`ModelSpec`: the single declaration of a whole network, and the samples it is judged on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from edgeattn.foundation import Registry

_LISTINGS = Path(__file__).parent / "listings"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network input: `(pixel * scale - mean) / std`, channels first.

    Attributes:
        colour_order: "RGB" or "BGR".
        scale: factor on the 0..255 pixel values (1/255 for 0..1 networks).
        mean: per channel, in the colour order, after scaling.
        std: per channel, in the colour order, after scaling.
    """

    colour_order: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Turn an RGB image (H, W, 3) uint8 into a float32 array (1, 3, H, W)."""
        ordered = image if self.colour_order == "RGB" else image[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        normal = (ordered.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], dtype=np.float32)


@dataclass(frozen=True)
class OutputSpec:
    """One output of the network's forward, in order.

    Attributes:
        name: name of the ONNX output.
        meaning: "logits" (class axis 1, reduced resolution), "probability" (after the sigmoid, input resolution) or
            "scores" (batch, classes).
        auxiliary: used in training only; left out of exported graphs unless asked for.
    """

    name: str
    meaning: str
    auxiliary: bool = False


@dataclass(frozen=True)
class Sample:
    """One evaluation sample.

    Attributes:
        images: the RGB images (H, W, 3) uint8, one for each network input, in order.
        target: integer labels (K, H, W), one map for each labelled image (K = 1, or 2 for a frame pair), or None where
            the truth is not known.
    """

    images: tuple[np.ndarray, ...]
    target: np.ndarray | None

    def resized(self, size: tuple[int, int]) -> Sample:
        """Return the sample at (height, width) = `size`: images bilinear, labels nearest."""
        height, width = size
        if all(image.shape[:2] == size for image in self.images):
            return self

        def scale(array: np.ndarray, method: Image.Resampling) -> np.ndarray:
            return np.asarray(Image.fromarray(array).resize((width, height), method))

        images = tuple(scale(image, Image.Resampling.BILINEAR) for image in self.images)
        if self.target is None:
            return Sample(images, None)
        nearest = [scale(labels.astype(np.int32), Image.Resampling.NEAREST) for labels in self.target]
        return Sample(images, np.stack(nearest).astype(np.int64))


@dataclass(frozen=True)
class Layout:
    """One published form of a network's state_dict.

    Attributes:
        name: unique within the network, such as "official" or "timm".
        key_map: replacement template by pattern (see `edgeattn.models.checkpoint`) from published names to ours; empty
            where the names are the same.
        listing: file of published names and shapes in `models/listings/`, without its ending; None where no file lists
            them, because the network was trained here.
    """

    name: str = "official"
    key_map: Mapping[str, str] = field(default_factory=dict)
    listing: str | None = None

    def published_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Return the published names and shapes; None where no file lists them."""
        if self.listing is None:
            return None
        listed = json.loads((_LISTINGS / f"{self.listing}.json").read_text(encoding="utf-8"))
        return {name: tuple(shape) for name, shape in listed["keys"].items()}


@dataclass(frozen=True)
class ModelSpec:
    """A network that carries attention blocks.

    Attributes:
        name: unique name on the command line.
        summary: one line for listings, with paper and year.
        network: the class or function that constructs the network.
        arguments: what the network is constructed with.
        small: arguments of a small network of the same structure, for tests.
        original: `module:class` of the independent original, which takes the same arguments and state.
        layouts: published forms of the state, the network's own first.
        inputs: ONNX names of the image inputs, each (batch, 3, height, width).
        outputs: what the network's forward returns, in order.
        preprocessing: from image to network input.
        size: (height, width) that the model was trained at.
        classes: class names by label.
        labels: main outputs by name, and the (height, width) of the input, to integer labels (batch, K, H, W).
        fixed_size: why height and width cannot vary; empty where they can.
        test_sizes: (height, width) of test images; the first one is the example of an export.
        checkpoint: bundled trained weights, if any.
        samples: held-out samples, first `count` of them; or None where no data is bundled.
        calibration: images for INT8 calibration, disjoint from `samples`.
    """

    name: str
    summary: str
    network: Callable[..., nn.Module]
    arguments: Mapping[str, object]
    small: Mapping[str, object]
    original: str
    inputs: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    preprocessing: Preprocessing
    size: tuple[int, int]
    classes: tuple[str, ...]
    labels: Callable[[Mapping[str, torch.Tensor], tuple[int, int]], torch.Tensor]
    layouts: tuple[Layout, ...] = (Layout(),)
    fixed_size: str = ""
    test_sizes: tuple[tuple[int, int], ...] = ((65, 97), (72, 88))
    checkpoint: Path | None = None
    samples: Callable[[int], Iterator[Sample]] | None = None
    calibration: Callable[[int], Iterator[Sample]] | None = None

    def build(self) -> nn.Module:
        """Return the untrained network, in `eval` mode."""
        return self.network(**self.arguments).eval()

    @property
    def main_outputs(self) -> tuple[str, ...]:
        """Names of the outputs that inference needs."""
        return tuple(output.name for output in self.outputs if not output.auxiliary)

    def network_inputs(self, sample: Sample) -> dict[str, np.ndarray]:
        """Return the preprocessed inputs of one sample by ONNX name, each float32 (1, 3, H, W)."""
        return {name: self.preprocessing(image) for name, image in zip(self.inputs, sample.images, strict=True)}


MODELS: Registry[ModelSpec] = Registry("model")
