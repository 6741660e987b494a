"""Sliding-window, flip and multi-scale inference around a segmentation network, as published evaluations do it.

The network is whatever computes outputs from inputs: a PyTorch module, an ONNX form or an engine behind a runner.
Both conventions lay the same grid of windows, of which the last ones are moved back inside the image, and average what
the network says where windows overlap. They differ in what `Convention` declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.foundation import UserError
from edgeattn.models.spec import ModelSpec, Sample

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""From the network's inputs by name, for one image, to its outputs by name."""


@dataclass(frozen=True)
class Convention:
    """How a published evaluation lays windows and merges what is predicted.

    Attributes:
        name: unique name on the command line.
        source: where it is published.
        pads: an image smaller than the window is padded to it, at the bottom and the right, with zeros behind the
            preprocessing; otherwise the network gets the small image itself, unless its graph has a fixed size.
        merges_probabilities: flips and scales average probabilities; otherwise logits.
        aligned_zoom: images are scaled with aligned corners; otherwise with aligned edges of pixels.
    """

    name: str
    source: str
    pads: bool
    merges_probabilities: bool
    aligned_zoom: bool

    def scaled(self, length: int, scale: float) -> int:
        """Return the length that an axis is scaled to."""
        return round(length * scale) if self.aligned_zoom else int(length * scale + 0.5)


CCNET = Convention(
    "ccnet",
    "speedinghzl/CCNet at 1fae6c6, evaluate.py: predict_sliding and predict_multiscale, as its main calls them: one "
    "scale, no flip. For other scales that code adds arrays of different sizes and fails, and it mirrors flipped "
    "logits back along their rows; here they are resized to the image, and mirrored along their columns. Where the "
    "image is so much smaller than the window that it would lay none, here there is one",
    pads=True,
    merges_probabilities=False,
    aligned_zoom=True,
)
MMSEG = Convention(
    "mmseg",
    "open-mmlab/mmsegmentation at 0067e6d, mmseg/models/segmentors/encoder_decoder.py: slide_inference, inference and "
    "aug_test. Images are scaled behind the normalisation, without rounding to 8 bits again",
    pads=False,
    merges_probabilities=True,
    aligned_zoom=False,
)
CONVENTIONS = {convention.name: convention for convention in (CCNET, MMSEG)}
"""Conventions by name."""


@dataclass(frozen=True)
class SlidingWindow:
    """How an image is taken apart for a network, and put together again.

    Attributes:
        crop: (height, width) of a window.
        stride: (down, right) from one window to the next; two thirds of the window's height both ways when None, as
            CCNet's evaluation has it.
        flip: also predict the mirrored image.
        scales: factors that the image is scaled by.
        convention: how windows are laid and merged.

    Raises:
        UserError: a size, stride or scale is not positive, or a stride exceeds the window, so that it leaves gaps.
    """

    crop: tuple[int, int]
    stride: tuple[int, int] | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    convention: Convention = CCNET

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0 or min(*self.crop, *self.steps) < 1:
            raise UserError(
                f"windows of {self.crop} with the stride {self.steps} at the scales {self.scales} do not exist. Give "
                "positive numbers."
            )
        if any(step > length for step, length in zip(self.steps, self.crop, strict=True)):
            raise UserError(
                f"the stride {self.steps} exceeds the window {self.crop}, which leaves gaps. Give a smaller stride."
            )

    @property
    def steps(self) -> tuple[int, int]:
        """The stride that is used."""
        if self.stride is not None:
            return self.stride
        step = math.ceil(self.crop[0] * (1 - 1 / 3))
        return step, min(step, self.crop[1])

    def windows(self, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of each window in an image of (height, width) = `size`, row by row."""
        rows, columns = (
            [_window(index * step, length, whole) for index in range(_count(whole, length, step))]
            for whole, length, step in zip(size, self.crop, self.steps, strict=True)
        )
        yield from ((row, column) for row in rows for column in columns)


def _count(whole: int, length: int, step: int) -> int:
    """Return how many windows an axis needs."""
    return math.ceil(max(whole - length, 0) / step) + 1


def _window(start: int, length: int, whole: int) -> slice:
    """Return a window that begins at `start`, or earlier where it would leave the image."""
    stop = min(start + length, whole)
    return slice(max(stop - length, 0), stop)


class SegmentationNetwork:
    """A network of one image input and logits, as inference around it sees it.

    Args:
        spec: the model, see `edgeattn.models.deployable` for graphs that preprocess.
        run: computes the outputs.
        size: (height, width) that the graph is fixed to; None where it takes any.

    Raises:
        UserError: the network takes several images, or its output is not logits.
    """

    def __init__(self, spec: ModelSpec, run: Run, size: tuple[int, int] | None = None) -> None:
        main = [output for output in spec.outputs if not output.auxiliary]
        if len(spec.inputs) != 1 or [output.meaning for output in main] != ["logits"]:
            raise UserError(
                f"windows are merged by the logits of one image, but {spec.name} takes {', '.join(spec.inputs)} and "
                f"gives {', '.join(output.meaning for output in main)}. Take a form without --with-postprocess, or "
                "whole images."
            )
        self.spec, self.run, self.size = spec, run, size
        self.output = main[0].name

    def logits(self, pixels: Tensor) -> Tensor:
        """Return logits (classes, height, width) at the size of what is given.

        Args:
            pixels: (3, height, width), preprocessed or, where the graph preprocesses, 0..255.
        """
        feed = pixels[None].numpy()
        if self.spec.preprocessing.in_graph:
            feed = feed.round().clip(0, 255).transpose(0, 2, 3, 1).astype(np.uint8)
        outputs = self.run({self.spec.inputs[0]: np.ascontiguousarray(feed)})
        return self._resized(torch.from_numpy(np.asarray(outputs[self.output], np.float32))[0], tuple(pixels.shape[1:]))

    def predict(self, image: np.ndarray, plan: SlidingWindow | None = None) -> np.ndarray:
        """Return the score of each class for each pixel, float32 (classes, height, width).

        Args:
            image: RGB (height, width, 3) uint8.
            plan: windows, flips and scales; the whole image at once when None, resized to a fixed graph's size and
                the logits back.

        Returns:
            Logits; probabilities where the plan's convention merges those.

        Raises:
            UserError: the graph has a fixed size that is not the window's.
        """
        pixels = self._pixels(image)
        if plan is None:
            resized = pixels if self.size is None else _zoomed(pixels, self.size, aligned=False)
            return self._resized(self.logits(resized), image.shape[:2]).numpy()
        if self.size is not None and self.size != plan.crop:
            raise UserError(
                f"the graph takes {self.size[0]}x{self.size[1]}, and the window is {plan.crop[0]}x{plan.crop[1]}. Make "
                "them equal, or export with --dynamic."
            )
        merged = [self._scaled(pixels, scale, plan) for scale in plan.scales]
        return torch.stack(merged).mean(dim=0).numpy()

    def _scaled(self, pixels: Tensor, scale: float, plan: SlidingWindow) -> Tensor:
        """Return the scores at one scale, at the image's own size, over both directions where asked for."""
        rule, (height, width) = plan.convention, pixels.shape[1:]
        size = rule.scaled(height, scale), rule.scaled(width, scale)
        given = pixels if size == (height, width) else _zoomed(pixels, size, aligned=rule.aligned_zoom)
        directions = []
        for flipped in (False, True)[: 1 + plan.flip]:
            logits = self._slide(given.flip(2) if flipped else given, plan)
            logits = self._resized(logits.flip(2) if flipped else logits, (height, width))
            directions.append(logits.softmax(dim=0) if rule.merges_probabilities else logits)
        return torch.stack(directions).mean(dim=0)

    def _slide(self, pixels: Tensor, plan: SlidingWindow) -> Tensor:
        """Return the mean logits of all windows over each pixel."""
        total: Tensor | None = None
        count = torch.zeros(pixels.shape[1:])
        for rows, columns in plan.windows((pixels.shape[1], pixels.shape[2])):
            window = pixels[:, rows, columns]
            height, width = window.shape[1:]
            if plan.convention.pads or self.size is not None:
                window = self._padded(window, plan.crop)
            logits = self.logits(window)[:, :height, :width]
            if total is None:
                total = torch.zeros(len(logits), *pixels.shape[1:])
            total[:, rows, columns] += logits
            count[rows, columns] += 1
        assert total is not None
        return total / count

    def _pixels(self, image: np.ndarray) -> Tensor:
        """Return what the network takes of an image, channels first."""
        array = self.spec.network_inputs(Sample((image,), None))[self.spec.inputs[0]][0]
        if self.spec.preprocessing.in_graph:
            array = array.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))

    def _padded(self, window: Tensor, size: tuple[int, int]) -> Tensor:
        """Return a window with zeros behind the preprocessing at the bottom and the right."""
        rule = self.spec.preprocessing
        border = torch.zeros(3)
        if rule.in_graph:
            mean = torch.tensor(rule.mean) / rule.scale
            border = mean if rule.colour_order == "RGB" else mean.flip(0)
        padded = border[:, None, None].repeat(1, *size)
        padded[:, : window.shape[1], : window.shape[2]] = window
        return padded

    def _resized(self, logits: Tensor, size: tuple[int, ...]) -> Tensor:
        if tuple(logits.shape[1:]) == size:
            return logits
        return _zoomed(logits, size, aligned=self.spec.align_corners)


def _zoomed(planes: Tensor, size: tuple[int, ...], *, aligned: bool) -> Tensor:
    """Return (channels, height, width) = `size`, bilinear."""
    return F.interpolate(planes[None], size=tuple(size), mode="bilinear", align_corners=aligned)[0]
