"""Real handwritten digits on real photographs: the data of the two bundled models.

The digits are scikit-learn's (1797 scans of 8x8 pixels, UCI ML hand-written digits), the photographs its two sample
images. Digits and image regions of the held-out samples are disjoint from those of the training samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from edgeattn.models.spec import Sample

HEIGHT, WIDTH = 128, 160

HALVES = 0.2
"""Probability that a repeated digit shows only half of itself."""

CLASSES = ("background", *(f"digit {digit}" for digit in range(10)))


@dataclass(frozen=True)
class Material:
    """Digits and photographs of one split.

    Attributes:
        digits: scans (count, 8, 8), float32 ink coverage 0..1.
        labels: digit 0..9 of each scan.
        photos: RGB photographs (height, width, 3) uint8.
    """

    digits: np.ndarray
    labels: np.ndarray
    photos: tuple[np.ndarray, ...]


@functools.cache
def material(split: str) -> Material:
    """Return the digits and photo regions of "train" or "test": every fifth digit and the right third are held out."""
    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % 5 == 0
    chosen = held_out if split == "test" else ~held_out
    photos = []
    for photo in load_sample_images().images:
        border = photo.shape[1] * 2 // 3
        photos.append(photo[:, border:] if split == "test" else photo[:, :border])
    return Material((bunch.images[chosen] / 16).astype(np.float32), bunch.target[chosen], tuple(photos))


def _background(photos: tuple[np.ndarray, ...], rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of a random photograph, resized to the image size, with random exposure; float 0..255."""
    photo = photos[rng.integers(len(photos))]
    height = int(rng.integers(96, 260))
    width = min(height * WIDTH // HEIGHT, photo.shape[1])
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    crop = Image.fromarray(photo[top : top + height, left : left + width]).resize(
        (WIDTH, HEIGHT), Image.Resampling.BILINEAR
    )
    exposed = np.asarray(crop, np.float32) * rng.uniform(0.6, 1.2)
    return exposed[:, ::-1] if rng.random() < 0.5 else exposed


def _place(occupied: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return the top left corner of a free square of `side` pixels, or None when thirty tries find none."""
    for _ in range(30):
        top, left = int(rng.integers(HEIGHT - side + 1)), int(rng.integers(WIDTH - side + 1))
        if not occupied[top : top + side, left : left + side].any():
            return top, left
    return None


def _stands_out(colour: np.ndarray, patch: np.ndarray) -> bool:
    """Whether a colour differs from a patch's mean colour by at least 90 levels in some channel."""
    return bool(np.abs(colour - patch.mean(axis=(0, 1))).max() >= 90)


def _ink_colour(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random colour that stands out from the patch."""
    while not _stands_out(colour := rng.uniform(0, 255, 3), patch):
        pass
    return colour


def _half(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (side, side) that keeps the upper, lower, left or right half."""
    kept = np.zeros((side, side), np.float32)
    kept[: side // 2] = 1
    return np.rot90(kept, int(rng.integers(4)))


@dataclass
class _Canvas:
    """An image being composed, with the labels of its pixels."""

    image: np.ndarray
    labels: np.ndarray
    occupied: np.ndarray

    @classmethod
    def on_photo(cls, photos: tuple[np.ndarray, ...], rng: np.random.Generator) -> _Canvas:
        shape = (HEIGHT, WIDTH)
        return cls(_background(photos, rng).copy(), np.zeros(shape, np.int64), np.zeros(shape, bool))

    def paste(
        self,
        digit: np.ndarray,
        label: int,
        rng: np.random.Generator,
        *,
        colour: np.ndarray | None = None,
        fragment: bool = False,
    ) -> bool:
        """Blend a digit at a random free place; pixels with at least 30 % ink take `label`.

        Args:
            digit: ink coverage 0..1 (8, 8).
            label: label of its pixels.
            rng: source of place and size.
            colour: RGB ink colour; a random one that stands out when None.
            fragment: show only one half of the digit (upper, lower, left or right).

        Returns:
            False, and nothing is pasted, when no place is free or the given colour does not stand out there.
        """
        side = int(rng.integers(52, 85))
        place = _place(self.occupied, side, rng)
        if place is None:
            return False
        top, left = place
        ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
        if fragment:
            ink = ink * _half(side, rng)
        area = np.s_[top : top + side, left : left + side]
        if colour is not None and not _stands_out(colour, self.image[area]):
            return False
        ink_colour = _ink_colour(self.image[area], rng) if colour is None else colour
        opacity = np.minimum(ink * 1.6, 1.0)[..., None]
        self.image[area] = self.image[area] * (1 - opacity) + ink_colour * opacity
        self.labels[area][ink >= 0.3] = label
        self.occupied[area] = True
        return True

    def finish(self, rng: np.random.Generator) -> np.ndarray:
        """Add sensor noise and return the uint8 image."""
        return (self.image + rng.normal(0, 4, self.image.shape)).clip(0, 255).astype(np.uint8)


def segmentation_sample(source: Material, rng: np.random.Generator) -> Sample:
    """Compose one image with two to four writings of one digit, of which all but the first may be mere halves.

    A half often fits several digits; which one it is shows elsewhere in the image, so that segmenting it takes context.
    The target holds 0 for background and 1 + digit elsewhere.
    """
    canvas = _Canvas.on_photo(source.photos, rng)
    digit = rng.integers(10)
    writings = rng.choice(np.flatnonzero(source.labels == digit), size=rng.integers(2, 5), replace=False)
    for index, writing in enumerate(writings):
        canvas.paste(source.digits[writing], 1 + int(digit), rng, fragment=index > 0 and rng.random() < HALVES)
    return Sample((canvas.finish(rng),), canvas.labels[None])


def pair_sample(source: Material, rng: np.random.Generator) -> Sample:
    """Compose two frames that share one digit; the other digits differ in class from it and between the frames.

    The shared digit keeps its shape and, but for a jitter, its colour; place, size and background change. The target
    (2, height, width) marks the shared digit with 1.
    """
    shared = int(rng.integers(len(source.digits)))
    others = [digit for digit in rng.permutation(10) if digit != source.labels[shared]]
    colour = rng.uniform(0, 255, 3)
    images, targets = [], []
    for frame in range(2):
        jittered = (colour + rng.normal(0, 12, 3)).clip(0, 255)
        while not (canvas := _Canvas.on_photo(source.photos, rng)).paste(
            source.digits[shared], 1, rng, colour=jittered
        ):
            pass
        for digit in others[frame * 2 : frame * 2 + rng.integers(1, 3)]:
            index = rng.choice(np.flatnonzero(source.labels == digit))
            canvas.paste(source.digits[index], 0, rng)
        images.append(canvas.finish(rng))
        targets.append(canvas.labels)
    return Sample(tuple(images), np.stack(targets))


def held_out(make: str, count: int) -> Iterator[Sample]:
    """Yield the first `count` held-out samples of "segmentation" or "pair"; the same ones every time."""
    yield from _stream(make, "test", 2024, count)


def calibration(make: str, count: int) -> Iterator[Sample]:
    """Yield `count` samples made of training material, for calibrating INT8."""
    yield from _stream(make, "train", 7, count)


def _stream(make: str, split: str, seed: int, count: int) -> Iterator[Sample]:
    compose = {"segmentation": segmentation_sample, "pair": pair_sample}[make]
    source = material(split)
    for index in range(count):
        yield compose(source, np.random.default_rng((seed, index)))
