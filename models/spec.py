"""`ModelSpec`: the single declaration of a whole network, and the samples it is judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from edgeattn.blocks.recognition import Shapes
from edgeattn.foundation import UserError
from edgeattn.models.checkpoint import renamed_key

Length = TypeVar("Length", int, "int | None")
"""A number of pixels or images; None where it may vary."""

MIOU, TOP_1 = "mIoU", "top-1"
"""Task metrics: mean intersection over union of the classes, and the share of images labelled right."""

_TASKS = {"logits": "segmentation", "probability": "object segmentation", "scores": "classification"}
"""What a network does, by the meaning of the first of its own outputs."""

_LISTINGS = Path(__file__).parent / "listings"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network input: `(pixel * scale - mean) / std`, channels first.

    Attributes:
        colour_order: "RGB" or "BGR".
        scale: factor on the 0..255 pixel values (1/255 for 0..1 networks).
        mean: per channel, in the colour order, after scaling.
        std: per channel, in the colour order, after scaling.
        in_graph: the exported graph does all this: its inputs are RGB images, uint8 (batch, height, width, 3).
    """

    colour_order: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    in_graph: bool = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Turn an RGB image (H, W, 3) uint8 into float32 (1, 3, H, W); into uint8 (1, H, W, 3) if the graph does it."""
        if self.in_graph:
            return np.array(image[None], order="C")
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
            "scores" (batch, classes); with a postprocessing in the graph "labels" or "probabilities", see
            `edgeattn.models.deployable`.
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
        target: integer labels (K, H, W), one map for each labelled image (K = 1, or 2 for a frame pair); (1, 1, 1)
            where an image as a whole has one label; None where the truth is not known.
    """

    images: tuple[np.ndarray, ...]
    target: np.ndarray | None

    def resized(self, size: tuple[int, int]) -> Sample:
        """Return the sample at (height, width) = `size`: images bilinear, labels nearest."""
        height, width = size
        if all(image.shape[:2] == size for image in self.images):
            return self
        one_label = self.target is not None and self.target.shape[1:] == (1, 1)  # of the whole image

        def scale(array: np.ndarray, method: Image.Resampling) -> np.ndarray:
            return np.asarray(Image.fromarray(array).resize((width, height), method))

        images = tuple(scale(image, Image.Resampling.BILINEAR) for image in self.images)
        if self.target is None or one_label:
            return Sample(images, self.target)
        nearest = [scale(labels.astype(np.int32), Image.Resampling.NEAREST) for labels in self.target]
        return Sample(images, np.stack(nearest).astype(np.int64))


@dataclass(frozen=True)
class Layout:
    """One published form of a network's state_dict.

    Attributes:
        name: unique within the network, such as "official" or "timm".
        key_map: replacement template by pattern (see `edgeattn.models.checkpoint`) from published names to ours; empty
            where the names are the same.
        listing: file of published names and shapes in `models/listings/`, without its ending; None where no state
            with names was published, or the network was trained here.
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

    def leaves_out(self, name: str) -> bool:
        """Say whether a published tensor has no place in the network, on purpose."""
        return "" in self.key_map.values() and not self.renamed(name)

    def renamed(self, name: str) -> str:
        """Return our name of a published tensor; empty where the layout leaves it out."""
        return renamed_key(self.key_map, name)

    def renamed_all(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return shape by our name of published tensors, without those that the layout leaves out."""
        return {ours: shape for name, shape in shapes.items() if (ours := self.renamed(name))}


@dataclass(frozen=True)
class Told:
    """Where the shapes of a state tell an argument of its network.

    Attributes:
        parameters: names of tensors; of several, each tells one number of a tuple.
        axis: whose length is the argument.
    """

    parameters: tuple[str, ...]
    axis: int = 0

    def read(self, shapes: Shapes) -> int | tuple[int, ...] | None:
        """Return the argument; None where the state lacks a tensor."""
        found = [shapes.get(name, ()) for name in self.parameters]
        if any(len(shape) <= self.axis for shape in found):
            return None
        sizes = tuple(shape[self.axis] for shape in found)
        return sizes if len(sizes) > 1 else sizes[0]


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
        told: arguments that the shapes of a state tell, so that a user's may be others; see `edgeattn.models.variants`.
        free: arguments that no weight depends on, which a user may choose otherwise.
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
    told: Mapping[str, Told] = field(default_factory=dict)
    free: tuple[str, ...] = ()
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

    @property
    def task(self) -> str:
        """What the network does."""
        return next(_TASKS[output.meaning] for output in self.outputs if output.meaning in _TASKS)

    @property
    def metric(self) -> str:
        """The task metric: `TOP_1` where the network scores classes of an image, else `MIOU`."""
        return TOP_1 if any(output.meaning == "scores" for output in self.outputs) else MIOU

    @property
    def align_corners(self) -> bool:
        """Whether the label rule resizes logits with aligned corners; a keyword of the rule, and true by default."""
        return bool(getattr(self.labels, "keywords", {}).get("align_corners", True))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a user may declare otherwise and results depend on: arguments, classes, preprocessing."""
        parts = (sorted(self.arguments.items()), self.classes, self.preprocessing, self.align_corners)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def image_axes(self) -> dict[int, str]:
        """Names of the axes of an input that may vary, by axis."""
        rows = 1 if self.preprocessing.in_graph else 2
        return {0: "batch"} if self.fixed_size else {0: "batch", rows: "height", rows + 1: "width"}

    @property
    def input_type(self) -> np.dtype:
        """Element type of the inputs."""
        return np.dtype(np.uint8 if self.preprocessing.in_graph else np.float32)

    def input_shape(self, batch: Length, size: tuple[Length, Length]) -> tuple[Length | int, ...]:
        """Return the shape of an input for (height, width) = `size`; None stands for what may vary."""
        height, width = size
        return (batch, height, width, 3) if self.preprocessing.in_graph else (batch, 3, height, width)

    def image_size(self, shapes: Iterable[tuple[int | None, ...]]) -> tuple[int, int] | None:
        """Return the (height, width) that the shapes of a graph's inputs fix, or None where it is open."""
        for shape in shapes:
            height, width = (shape[1:3] if self.preprocessing.in_graph else shape[2:4]) if len(shape) == 4 else (0, 0)
            if height and width:
                return height, width
        return None

    def layout(self, name: str) -> Layout:
        """Return the layout called `name`.

        Raises:
            UserError: there is none; the message lists those that exist.
        """
        for layout in self.layouts:
            if layout.name == name:
                return layout
        known = ", ".join(layout.name for layout in self.layouts)
        raise UserError(f"{self.name} has no layout {name!r}. Choose one of {known}, or leave the choice to the names.")

    def network_inputs(self, sample: Sample) -> dict[str, np.ndarray]:
        """Return the inputs of one sample by ONNX name, each of `input_shape` with a batch of one."""
        return {name: self.preprocessing(image) for name, image in zip(self.inputs, sample.images, strict=True)}
