"""Inference around a network equals the published evaluations, restated here step by step."""

from __future__ import annotations

import dataclasses
import functools
from math import ceil

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import nn

from edgeattn.foundation import UserError
from edgeattn.models import MODELS, OutputSpec
from edgeattn.models.deployable import LABELS, Deployment
from edgeattn.models.zoo.declare import CAFFE_BGR, class_labels
from edgeattn.validation.inference import CCNET, MMSEG, SegmentationNetwork, SlidingWindow

CLASSES = 4


class Tiny(nn.Module):
    """A strided convolution that sees neighbours, so that windows differ from the whole image at their borders."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.convolution = nn.Conv2d(3, CLASSES, 5, stride=4, padding=2)
        nn.init.normal_(self.convolution.weight, std=0.1, generator=generator)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, image):
        return self.convolution(image)


NETWORK = Tiny().eval()


def declared(*, aligned=True):
    return dataclasses.replace(
        MODELS.get("ccnet-digits"),
        name="tiny",
        outputs=(OutputSpec("logits", "logits"),),
        classes=tuple("abcd"),
        preprocessing=CAFFE_BGR,
        labels=functools.partial(class_labels, align_corners=aligned),
    )


def photo(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def network(spec, size=None, seen=None, module=NETWORK):
    def run(feed):
        if seen is not None:
            seen.append(feed["image"].shape)
        with torch.no_grad():
            produced = module(torch.from_numpy(feed["image"]))
        return {"logits": (produced if isinstance(produced, torch.Tensor) else produced[0]).numpy()}

    return SegmentationNetwork(spec, run, size)


def ccnet_sliding(image, tile, classes):
    """What CCNet's `predict_sliding` does with (1, 3, H, W), channels last out."""
    interp = nn.Upsample(size=tile, mode="bilinear", align_corners=True)
    height, width = image.shape[2:]
    stride = ceil(tile[0] * (1 - 1 / 3))
    tile_rows = int(ceil((height - tile[0]) / stride) + 1)
    tile_columns = int(ceil((width - tile[1]) / stride) + 1)
    total = np.zeros((1, height, width, classes))
    counts = np.zeros((1, height, width, classes))
    for row in range(tile_rows):
        for column in range(tile_columns):
            right = min(column * stride + tile[1], width)
            bottom = min(row * stride + tile[0], height)
            left, top = max(right - tile[1], 0), max(bottom - tile[0], 0)
            part = image[:, :, top:bottom, left:right]
            missing = tile[0] - part.shape[2], tile[1] - part.shape[3]
            padded = np.pad(part, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])), "constant")
            with torch.no_grad():
                found = interp(NETWORK(torch.from_numpy(padded))).numpy().transpose(0, 2, 3, 1)
            counts[0, top:bottom, left:right] += 1
            total[:, top:bottom, left:right] += found[0, : part.shape[2], : part.shape[3]]
    return total / counts


@pytest.mark.parametrize("size", [(60, 90), (48, 48), (40, 70), (97, 35), (49, 100)], ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_windows_as_ccnet(size, flip):
    spec, image, tile = declared(), photo(*size), (48, 48)
    given = spec.preprocessing(image)
    expected = ccnet_sliding(given, tile, CLASSES)
    if flip:
        mirrored = ccnet_sliding(given[:, :, :, ::-1].copy(), tile, CLASSES)
        expected = 0.5 * (expected + mirrored[:, :, ::-1])
    found = network(spec).predict(image, SlidingWindow(tile, flip=flip))
    np.testing.assert_allclose(found.transpose(1, 2, 0), expected[0], rtol=1e-4, atol=1e-3)


def mmseg_sliding(image, crop, stride, *, aligned):
    """What mmsegmentation's `slide_inference` does with (1, 3, H, W)."""
    height, width = image.shape[2:]
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    total, counts = torch.zeros(1, CLASSES, height, width), torch.zeros(1, 1, height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            part = image[:, :, top:bottom, left:right]
            with torch.no_grad():
                logits = F.interpolate(NETWORK(part), part.shape[2:], mode="bilinear", align_corners=aligned)
            total += F.pad(logits, (left, width - right, top, height - bottom))
            counts[:, :, top:bottom, left:right] += 1
    assert (counts > 0).all()
    return total / counts


@pytest.mark.parametrize("size", [(60, 90), (40, 70), (30, 33)], ids=str)
@pytest.mark.parametrize("aligned", [False, True])
def test_windows_as_mmseg(size, aligned):
    spec, image, crop, stride = declared(aligned=aligned), photo(*size), (40, 48), (24, 31)
    given = torch.from_numpy(spec.preprocessing(image))
    merged = []
    for scale in (0.75, 1.0, 1.5):
        scaled = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
        for flip in (False, True):
            resized = F.interpolate(given, scaled, mode="bilinear", align_corners=False)
            logits = mmseg_sliding(resized.flip(3) if flip else resized, crop, stride, aligned=aligned)
            logits = logits.flip(3) if flip else logits
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=aligned)
            merged.append(logits.softmax(dim=1))
    seen = []
    plan = SlidingWindow(crop, stride, flip=True, scales=(0.75, 1.0, 1.5), convention=MMSEG)
    found = network(spec, seen=seen).predict(image, plan)
    np.testing.assert_allclose(found, torch.cat(merged).mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)
    if size == (30, 33):
        assert (1, 3, 30, 33) in seen  # small images are not padded


def test_scaling_as_ccnet_scales():
    """The scaled image that the windows are cut from is that of scipy's zoom."""
    spec, image = declared(), photo(30, 37)
    seen = []

    def run(feed):
        seen.append(feed["image"])
        return {"logits": np.zeros((1, CLASSES, 4, 4), np.float32)}

    SegmentationNetwork(spec, run).predict(image, SlidingWindow((100, 100), scales=(1.5,)))
    expected = scipy.ndimage.zoom(spec.preprocessing(image), (1, 1, 1.5, 1.5), order=1, prefilter=False)
    height, width = expected.shape[2:]
    np.testing.assert_allclose(seen[0][:, :, :height, :width], expected, rtol=1e-4, atol=1e-2)
    assert not seen[0][:, :, height:].any()


def test_whole_images_and_graphs_of_fixed_size():
    spec, image = declared(), photo(60, 90)
    with torch.no_grad():
        logits = NETWORK(torch.from_numpy(spec.preprocessing(image)))
    expected = F.interpolate(logits, (60, 90), mode="bilinear", align_corners=True)[0]
    np.testing.assert_allclose(network(spec).predict(image), expected.numpy(), rtol=1e-5, atol=1e-5)
    seen = []
    fixed = network(spec, (48, 48), seen)
    assert fixed.predict(image).shape == (CLASSES, 60, 90)
    for convention in (CCNET, MMSEG):  # windows of an image that is smaller are padded, whatever the convention
        fixed.predict(photo(30, 90), SlidingWindow((48, 48), (40, 40), convention=convention))
    assert set(seen) == {(1, 3, 48, 48)}
    with pytest.raises(UserError, match=r"takes 48x48, and the window is 40x40"):
        fixed.predict(image, SlidingWindow((40, 40)))


def test_graphs_that_preprocess_get_pixels():
    spec, deployment = declared(), Deployment(preprocess=True)
    raw = network(deployment.spec(spec), (48, 48), module=deployment.network(spec, NETWORK))
    plain = network(spec, (48, 48))
    plan = SlidingWindow((48, 48), flip=True)
    large, small = photo(60, 90), photo(30, 90)
    np.testing.assert_allclose(raw.predict(large, plan), plain.predict(large, plan), rtol=1e-3, atol=1e-2)
    # The border is the mean colour rounded to 8 bits, half a level off at most.
    reach = 0.5 * float(NETWORK.convolution.weight.detach().abs().sum(dim=(1, 2, 3)).max())
    assert np.abs(raw.predict(small, plan) - plain.predict(small, plan)).max() <= reach


@pytest.mark.parametrize(("size", "crop"), [((769, 769), (769, 769)), ((1024, 2048), (769, 769)), ((5, 7), (9, 9))])
def test_windows_cover_the_image_and_stay_inside(size, crop):
    seen = np.zeros(size, bool)
    for rows, columns in SlidingWindow(crop).windows(size):
        assert 0 <= rows.start < rows.stop <= size[0]
        assert 0 <= columns.start < columns.stop <= size[1]
        seen[rows, columns] = True
    assert seen.all()
    assert SlidingWindow((769, 769)).steps == (513, 513)


def test_bad_plans_are_refused():
    for fields in ({"stride": (0, 4)}, {"scales": ()}, {"scales": (0.0,)}, {"crop": (0, 8)}):
        with pytest.raises(UserError, match="do not exist"):
            SlidingWindow(**{"crop": (8, 8), **fields})
    with pytest.raises(UserError, match="leaves gaps"):
        SlidingWindow((8, 8), (4, 9))
    with pytest.raises(UserError, match="cosnet-digits takes target, reference"):
        SegmentationNetwork(MODELS.get("cosnet-digits"), lambda feed: feed)
    with pytest.raises(UserError, match="without --with-postprocess"):
        SegmentationNetwork(Deployment(postprocess=LABELS).spec(declared()), lambda feed: feed)
