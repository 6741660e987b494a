"""Calibration sources: .npz files, folders of images, iterables; and what is refused."""

from __future__ import annotations

import contextlib
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector
from PIL import Image

from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.export.calibration import calibration_samples, input_shapes, input_types
from edgeattn.export.calibration_methods import METHODS, PERCENTILE, MagnitudeHistogram
from edgeattn.export.calibration_statistics import KEPT_BATCHES, observe
from edgeattn.foundation import UserError
from edgeattn.models import MODELS

ONE = {"image": (None, 3, None, None)}
PAIR = {"first": (None, 3, None, None), "second": (None, 3, None, None)}


def preprocess(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32) / 255


def array(count: int, seed: int = 0, size: tuple[int, int] = (4, 5)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, *size)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images whose pixels all hold ten times their number, beside files that are no images."""
    for index in reversed(range(10)):
        suffix = (".png", ".PNG", ".bmp")[index % 3]
        Image.new("RGB", (12, 9), (10 * index, 0, 255)).save(tmp_path / f"frame_{index}{suffix}")
    (tmp_path / "labels.txt").write_text("not an image")
    (tmp_path / "more.png").mkdir()
    return tmp_path


def test_shapes_of_a_model() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> net (float[N,3,8,W] a, float[2,3,8,8] b) => (float[N,3,8,W] y) '
        "<float w = {1.0}> { y = Relu (a) }"
    )
    assert input_shapes(model) == {"a": (None, 3, 8, None), "b": (2, 3, 8, 8)}


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    first, second = array(9), array(9, seed=1)
    np.savez(path, first=first, second=second, other=np.arange(3))
    samples = calibration_samples(path, inputs=PAIR)
    batches = list(samples)
    assert [tuple(batch) for batch in batches] == [("first", "second")] * 9
    np.testing.assert_array_equal(np.concatenate([batch["second"] for batch in batches]), second)
    assert samples.count == 9
    assert len(list(samples)) == 9  # read anew
    assert len(list(calibration_samples(path, inputs=PAIR, limit=8))) == 8


def test_static_batches(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, image=array(12))
    samples = calibration_samples(path, inputs={"image": (4, 3, 4, 5)})
    assert [batch["image"].shape for batch in samples] == [(4, 3, 4, 5)] * 3
    assert samples.count == 12
    with pytest.raises(UserError, match="batches of 5"):
        calibration_samples(path, inputs={"image": (5, 3, 4, 5)})


def test_folder(folder: Path) -> None:
    samples = calibration_samples(folder, inputs=ONE, size=(6, 8), preprocess=preprocess)
    batches = list(samples)
    assert [batch["image"].shape for batch in batches] == [(1, 3, 6, 8)] * 10
    assert [round(float(batch["image"][0, 0, 0, 0]) * 255) for batch in batches] == list(range(0, 100, 10))


def test_images_are_resized_bilinearly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for index in range(8):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    expected = np.asarray(Image.fromarray(pixels).resize((10, 8), Image.Resampling.BILINEAR))
    batch = next(iter(calibration_samples(tmp_path, inputs=ONE, size=(8, 10), preprocess=preprocess)))
    np.testing.assert_array_equal(batch["image"], preprocess(expected))


def test_folder_of_pairs(folder: Path) -> None:
    samples = calibration_samples(folder, inputs=PAIR, size=(6, 8), preprocess=preprocess, minimum=5)
    reds = [[round(float(batch[name][0, 0, 0, 0]) * 255) for name in PAIR] for batch in samples]
    assert reds == [[0, 10], [20, 30], [40, 50], [60, 70], [80, 90]]
    (folder / "frame_9.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="multiple of 2"):
        calibration_samples(folder, inputs=PAIR, size=(6, 8), preprocess=preprocess, minimum=4)


def test_iterables_are_streamed() -> None:
    drawn = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for index in range(20):
            drawn.append(index)
            yield {"image": array(2, seed=index), "unused": np.zeros(1)}

    samples = calibration_samples(stream(), inputs=ONE, limit=9)
    iterator = iter(samples)
    next(iterator)
    assert drawn == [0]
    rest = list(iterator)
    assert drawn[:5] == [0, 1, 2, 3, 4]
    assert rest[-1]["image"].shape[0] == 1
    assert samples.count == 9
    assert set(rest[0]) == {"image"}


def test_fingerprint_follows_content(tmp_path: Path, folder: Path) -> None:
    data = array(8)
    np.savez(tmp_path / "a.npz", image=data)
    np.savez_compressed(tmp_path / "b.npz", image=data)
    stream = [{"image": data[i : i + 1]} for i in range(8)]
    prints = [calibration_samples(s, inputs=ONE).fingerprint for s in (tmp_path / "a.npz", tmp_path / "b.npz", stream)]
    assert len(set(prints)) == 1
    assert len(prints[0]) == 64
    swapped = calibration_samples(stream[::-1], inputs=ONE).fingerprint
    changed = calibration_samples([*stream[:-1], {"image": data[7:] + 1e-6}], inputs=ONE).fingerprint
    assert len({prints[0], swapped, changed}) == 3
    images = [calibration_samples(folder, inputs=ONE, size=(6, 8), preprocess=preprocess) for _ in range(2)]
    assert images[0].fingerprint == images[1].fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": array(7)}, "7 calibration samples"),
        ({"picture": array(8)}, "no array image"),
        ({"image": array(8)[:, :1]}, r"8?.*shape 1x1x4x5, but the model takes \?x3x\?x\?"),
        ({"image": array(8).astype(np.float64)}, "float64"),
        ({"image": np.full((8, 3, 4, 5), np.nan, np.float32)}, "NaN"),
        ({"image": np.float32(3)}, "0 calibration samples"),
        ({"image": np.array([object()] * 8)}, "cannot be read"),
        ({}, "no array image"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        list(calibration_samples(path, inputs=ONE))
    assert str(path) in str(caught.value)


def test_unequal_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", first=array(8), second=array(9))
    with pytest.raises(UserError, match="differ"):
        calibration_samples(tmp_path / "a.npz", inputs=PAIR)
    with pytest.raises(UserError, match=r"\[1, 2\] samples"):
        list(calibration_samples([{"first": array(1), "second": array(2)}], inputs=PAIR))


class Trap:
    """Would create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, image=array(8))
    files = {
        "cut.npz": good.read_bytes()[:-200],
        "text.npz": b"hello",
        "empty.npz": b"",
        "pickle.npz": pickle.dumps(Trap(tmp_path / "sprung")),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            calibration_samples(tmp_path / name, inputs=ONE)
    np.save(tmp_path / "plain.npy", array(8))
    with pytest.raises(UserError, match=r"not a \.npz"):
        calibration_samples(tmp_path / "plain.npy", inputs=ONE)
    assert not (tmp_path / "sprung").exists()


def test_bad_folders(tmp_path: Path, folder: Path) -> None:
    def read(path: Path, **changes: object) -> list:
        options = {"inputs": ONE, "size": (6, 8), "preprocess": preprocess} | changes
        return list(calibration_samples(path, **options))  # type: ignore[arg-type]

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.md").write_text("nothing here")
    with pytest.raises(UserError, match="holds no images"):
        read(empty)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing")
    with pytest.raises(UserError, match="at least 11"):
        read(folder, minimum=11)
    with pytest.raises(UserError, match="below the minimum"):
        read(folder, limit=4)
    with pytest.raises(UserError, match="need a size"):
        read(folder, size=None)
    with pytest.raises(UserError, match="preprocessing"):
        read(folder, preprocess=lambda image: image)
    (folder / "frame_5.bmp").write_bytes(b"BM but no bitmap")
    with pytest.raises(UserError, match=r"frame_5\.bmp cannot be read"):
        read(folder)


def test_bad_batches() -> None:
    with pytest.raises(UserError, match="but not 'second'"):
        list(calibration_samples([{"first": array(1)}], inputs=PAIR))
    with pytest.raises(UserError, match="too few"):
        list(calibration_samples([], inputs=ONE))
    with pytest.raises(UserError, match="takes 1x3x4x5"):
        list(calibration_samples([{"image": array(1, size=(4, 6))}], inputs={"image": (1, 3, 4, 5)}))


@pytest.mark.parametrize("kind", ["normal", "relu"])
def test_thresholds_are_those_of_onnxruntime(kind: str) -> None:
    """Its calibrators see all batches at once; ours saw one after the other, the largest number last."""
    rng = np.random.default_rng(0)
    batches = [rng.laplace(0, size, (3, 4000)).astype(np.float32) for size in (0.2, 1.0, 3.0)]
    if kind == "relu":
        batches = [np.maximum(batch, 0) for batch in batches]
    histogram = MagnitudeHistogram()
    for batch in batches:
        histogram.add(batch)
    magnitudes = np.abs(np.concatenate(batches)).ravel()
    assert histogram.peak == magnitudes.max()
    assert histogram.counts.sum() == magnitudes.size
    theirs = HistogramCollector("percentile", True, 4096, 128, PERCENTILE, "same")
    theirs.collect({"x": batches})
    with contextlib.redirect_stdout(io.StringIO()):
        threshold = float(theirs.compute_collection_result()["x"][1])
    ours = METHODS.get("percentile").threshold
    assert ours is not None
    assert ours(histogram) == pytest.approx(threshold, rel=2e-3)


def test_thresholds_minimise_what_they_say() -> None:
    magnitudes = np.abs(np.random.default_rng(1).laplace(0, 1, 200_000)).astype(np.float32)
    histogram = MagnitudeHistogram()
    histogram.add(magnitudes)

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.mean((np.clip(np.round(magnitudes / step), -127, 127) * step - magnitudes) ** 2))

    chosen = {method.name: method.threshold(histogram) for method in METHODS if method.threshold is not None}
    candidates = histogram.peak * np.arange(16, 129) / 128
    best = min(map(error, candidates))
    assert error(chosen["mse"]) <= 1.02 * best < error(histogram.peak)
    # A smooth distribution has information up to its end; a handful of outliers has none.
    assert np.quantile(magnitudes, 0.999) < chosen["entropy"] <= histogram.peak
    outliers = MagnitudeHistogram()
    outliers.add(np.concatenate([np.random.default_rng(2).normal(0, 1, 200_000), [60.0, -59.0, 61.0]]))
    entropy = METHODS.get("entropy").threshold
    assert entropy is not None
    assert 3 < entropy(outliers) < 12
    silent = MagnitudeHistogram()
    silent.add(np.zeros(5))
    assert silent.peak == 0
    silent.add(magnitudes)
    assert silent.counts.sum() == magnitudes.size + 5


def test_histograms_do_not_depend_on_batches() -> None:
    numbers = np.random.default_rng(2).normal(0, 1, 60_000).astype(np.float32)
    numbers[0] = 8.0
    whole, parts = MagnitudeHistogram(), MagnitudeHistogram()
    whole.add(numbers)
    for part in np.split(numbers * np.float32(1), 30):
        parts.add(part)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    growing = MagnitudeHistogram()
    for number in (1e-6, 1.0, 1e6):
        growing.add(np.float32([number]))
    assert growing.counts.sum() == 3
    assert growing.counts.size * growing.width == pytest.approx(1e6, rel=1e-3)


def test_one_batch_is_in_memory() -> None:
    """No reference to the inputs or activations of a batch stays, beside the few batches that are kept on purpose."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> net (float[N,3,8,8] image) => (float[N,3,8,8] y) { y = Relu (image) }'
    )
    alive: list[weakref.ref] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(30):
            batch = array(1, seed=seed, size=(8, 8))
            alive.append(weakref.ref(batch))
            yield {"image": batch}
            del batch
            assert sum(reference() is not None for reference in alive) <= KEPT_BATCHES + 3

    for method in METHODS:
        alive.clear()
        samples = calibration_samples(stream(), inputs={"image": (None, 3, 8, 8)})
        seen = observe(model, samples, ["image", "y"], by_channel=["image"], method=method)
        assert seen.activations["y"].peak > 3
        assert len(seen.batches) == KEPT_BATCHES


def test_overlap_with_evaluation_data(tmp_path: Path) -> None:
    data = array(10)
    np.savez(tmp_path / "a.npz", image=data)
    samples = calibration_samples(tmp_path / "a.npz", inputs=ONE)
    assert samples.shared_with({"image": array(1, seed=seed)} for seed in range(20, 25)) == 0
    assert samples.shared_with([{"image": data[3:6]}, {"image": array(2, seed=30)}]) == 3


def test_masks_and_other_types() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> net (float[N,4] x, bool[N,4] mask) => (float[N,4] y) { y = Relu (x) }'
    )
    inputs, types = input_shapes(model), input_types(model)
    batches = [{"x": np.zeros((8, 4), np.float32), "mask": np.zeros((8, 4), bool)}]
    assert calibration_samples(batches, inputs=inputs, types=types).count == 8
    with pytest.raises(UserError, match=r"'mask'.*float32.*preprocessed bool"):
        list(calibration_samples([{**batches[0], "mask": batches[0]["x"]}], inputs=inputs, types=types))


def test_pipeline_warns_of_shared_images(tmp_path: Path) -> None:
    spec = MODELS.get("ccnet-digits")
    assert spec.samples is not None
    for index, sample in enumerate(spec.samples(8)):
        Image.fromarray(sample.images[0]).save(tmp_path / f"{index}.png")
    request = ExportRequest("ccnet-digits", int8=True, calibration=tmp_path, images=tmp_path, sample_count=5)
    run = ExportRun(request, tmp_path / "run")
    run.directory.describe(run.facts)
    assert any("5 of the 5 samples" in note for note in run.notes["calibration"])
    bundled = ExportRun(ExportRequest("ccnet-digits", int8=True, sample_count=20), tmp_path / "other")
    bundled.directory.describe(bundled.facts)
    assert not bundled.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_method": "mse"}, "a calibration method is asked for, but no INT8 form"),
        ({"int8_attention": True}, "INT8 attention is asked for, but no INT8 form"),
        ({"int8": True, "int8_attention": True, "plugins": True}, "plugin nodes compute attention in FP16"),
        ({"int8": True, "calibration_method": "max"}, "unknown calibration method 'max'"),
    ],
)
def test_idle_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportRun(ExportRequest("ccnet-digits", **options), tmp_path / "run")
