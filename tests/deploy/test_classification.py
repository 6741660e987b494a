"""Classifiers and networks of fixed size from checkpoint to evidence: one label an image, judged by top-1."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from edgeattn.cli.console import CONSOLE, parity_table
from edgeattn.deploy.bundle import BundleRequest, make_bundle
from edgeattn.deploy.device import segment as device_segment
from edgeattn.deploy.device.__main__ import main as device
from edgeattn.deploy.device.golden import Comparison, Golden, labels_of
from edgeattn.deploy.evidence import EvaluationSamples
from edgeattn.deploy.files import compare_files
from edgeattn.deploy.pipeline import ExportRequest, ExportRun
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, ModelSpec, OutputSpec, Sample
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.models.deployable import LABELS, PROBABILITIES, Deployment
from edgeattn.models.zoo.declare import IMAGENET_RGB, score_labels

SIZE = (32, 40)
CLASSES = ("cat", "dog & <wolf>", "owl", "newt")


class Classifier(nn.Module):
    """Two convolutions and their mean; the second one makes one number of each half, which fixes the size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.scores = nn.Linear(16 * 20, len(CLASSES))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.second(torch.relu(self.first(image))))
        return self.scores(nn.functional.avg_pool2d(features, 2).flatten(1))


def photos(count: int, seed: int) -> list[np.ndarray]:
    """Images of one colour each with noise, so that the classes spread."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 200, 3) + rng.integers(0, 56, (*SIZE, 3))).astype(np.uint8) for _ in range(count)]


def declared() -> ModelSpec:
    samples = [Sample((image,), np.array([[[index % 4]]])) for index, image in enumerate(photos(12, 1))]
    calibration = [Sample((image,), None) for image in photos(16, 2)]
    return ModelSpec(
        name="tiny-classifier",
        summary="tiny",
        network=Classifier,
        arguments={},
        small={},
        original="tiny_original:Classifier",
        inputs=("image",),
        outputs=(OutputSpec("scores", "scores"),),
        preprocessing=IMAGENET_RGB,
        size=SIZE,
        classes=CLASSES,
        labels=score_labels,
        fixed_size="the last layer reads every position",
        samples=lambda count: iter(samples[:count]),
        calibration=lambda count: iter(calibration[:count]),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    return save_checkpoint(Classifier(), tmp_path_factory.mktemp("weights") / "tiny.safetensors", {})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    module = types.ModuleType("tiny_original")
    module.Classifier = Classifier  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_original", module)
    spec = declared()
    monkeypatch.setattr(MODELS, "_members", {**MODELS._members, spec.name: spec})
    return spec


def test_a_classifier_is_judged_by_its_labels(checkpoint: Path, tmp_path: Path) -> None:
    run = ExportRun(
        ExportRequest("tiny-classifier", str(checkpoint), fp16=True, int8=True, sample_count=12), tmp_path / "run"
    )
    record = run.run()
    assert record["verdict"] == "PASS", [entry["reasons"] for entry in record["forms"]]
    original = record["original"]
    assert (original["metric"], len(original["by_class"])) == ("top-1", 4)
    assert original["value"] * 12 == pytest.approx(round(original["value"] * 12))
    for entry in record["forms"]:
        assert entry["label_agreement"] * 12 == pytest.approx(round(entry["label_agreement"] * 12))
        assert entry["score"]["metric"] == "top-1"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for part in ("points of top-1", "Accuracy by class", "original: ", "target: cat", "dog &amp; &lt;wolf&gt;"):
        assert part in page
    assert "exported mask" not in page
    with CONSOLE.capture() as captured:
        CONSOLE.print(parity_table("tiny", record))
    assert "top-1" in captured.get()


def test_a_wrong_classifier_fails_in_its_own_metric(checkpoint: Path, tmp_path: Path) -> None:
    run = ExportRun(ExportRequest("tiny-classifier", str(checkpoint), sample_count=6), tmp_path / "run")
    (form, *_) = run.make_forms()
    graph = onnx.load(form.path)
    (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name.endswith("scores.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 0, 99], np.float32), bias.name))
    onnx.save(graph, tmp_path / "wrong.onnx")
    record = compare_files("tiny-classifier", str(checkpoint), [tmp_path / "wrong.onnx"], sample_count=6)
    (entry,) = record["forms"]
    assert entry["verdict"] == "FAIL"
    assert entry["label_agreement"] < 1
    assert entry["score"]["value"] == pytest.approx(1 / 6)  # of six targets, one is the fourth class
    page = tmp_path / "page"
    compare_files("tiny-classifier", str(checkpoint), [tmp_path / "wrong.onnx"], sample_count=6, output=page)
    assert '<span class="fail">newt</span>' in (page / "report.html").read_text(encoding="utf-8")


def test_the_whole_graph_with_a_fixed_size(checkpoint: Path, tmp_path: Path) -> None:
    """uint8 in, labels out, INT8 calibrated on uint8 images of a folder; only the batch is open, and a note says so."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(photos(8, 3)):
        Image.fromarray(image).save(folder / f"{index}.png")
    request = ExportRequest(
        "tiny-classifier",
        str(checkpoint),
        fp16=True,
        int8=True,
        dynamic=True,
        preprocess=True,
        postprocess=LABELS,
        calibration=folder,
        target="jetpack-6.2-orin",
        sample_count=12,
    )
    run = ExportRun(request, tmp_path / "run")
    record = run.run()
    assert record["verdict"] == "PASS", [entry["reasons"] for entry in record["forms"]]
    assert {report["verdict"] for report in record["support"]} == {"accepted"}
    assert run.notes["export"] == [
        "only the batch varies; height and width stay 32x40: the last layer reads every position."
    ]
    for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        graph = onnx.load(tmp_path / "run" / name).graph
        (taken,), (given,) = graph.input, graph.output
        kind = taken.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.UINT8
        assert [dim.dim_param or dim.dim_value for dim in kind.shape.dim] == ["batch", 32, 40, 3]
        assert (given.name, given.type.tensor_type.elem_type) == (LABELS, onnx.TensorProto.INT32)
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())["run"]
    assert (facts["preprocess"], facts["postprocess"], facts["layout"]) == (True, LABELS, "official")
    make_bundle(
        BundleRequest(
            tmp_path / "run", "jetpack-6.2-orin", tmp_path / "b.tar", checkpoint=checkpoint, axes=("batch=1:1:2",)
        )
    )
    assert device(["unpack", str(tmp_path / "b.tar"), "-o", str(tmp_path / "bundle")]) == 0
    chosen = ("--bundle", str(tmp_path / "bundle"), "--engine", "onnxruntime", "--precision", "fp32")
    assert device(["build", *chosen]) == device(["verify", *chosen]) == 0
    verified = json.loads((tmp_path / "bundle" / "work" / "verify.fp32.json").read_text())
    assert (verified["metric"], verified["label_agreement"], verified["outputs"]) == ("top-1", 1.0, {})
    assert device(["run", *chosen, str(folder), "-o", str(tmp_path / "named")]) == 0
    assert len(json.loads((tmp_path / "named" / "labels.json").read_text())) == 8
    again = compare_files("tiny-classifier", str(checkpoint), [tmp_path / "run" / "model.onnx"], sample_count=3)
    assert again["verdict"] == "PASS"
    assert again["forms"][0]["outputs"] == {}


def test_labels_that_differ_without_reason_fail(checkpoint: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        "tiny-classifier", str(checkpoint), preprocess=True, postprocess=LABELS, dynamic=True, sample_count=6
    )
    run = ExportRun(request, tmp_path / "run")
    (form, *_) = run.make_forms()
    graph = onnx.load(form.path)
    (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name.endswith("scores.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 0, 99], np.float32), bias.name))
    onnx.save(graph, form.path)
    (entry,) = run.judge([form])["forms"]
    assert entry["verdict"] == "FAIL"
    assert "labels differ, but of the original's only 0 lie so close" in entry["reasons"][0]


def test_folders_of_classes_give_the_truth(registered: ModelSpec, tmp_path: Path) -> None:
    def folders(name: str, *classes: str) -> Path:
        for index, image in enumerate(photos(2 * len(classes), 5)):
            place = tmp_path / name / classes[index % len(classes)]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index}.png")
        return tmp_path / name

    def labels(folder: Path, count: int) -> list[int]:
        samples = EvaluationSamples(registered, folder, SIZE, count)
        assert len(samples) == count
        return [int(sample.target.item()) for sample in samples]  # type: ignore[union-attr]

    assert labels(folders("named", "newt", "cat"), 4) == [0, 3, 0, 3]
    assert labels(folders("numbered", "2", "1"), 3) == [1, 2, 1]
    assert labels(folders("ordered", "n01", "n02", "n03", "n04"), 5) == [0, 1, 2, 3, 0]
    with pytest.raises(UserError, match="'wolf', which is no class of tiny-classifier"):
        labels(folders("unknown", "cat", "wolf"), 1)


def test_sizes_that_a_network_does_not_take(checkpoint: Path, tmp_path: Path) -> None:
    def export(**fields: object) -> None:
        ExportRun(ExportRequest("tiny-classifier", str(checkpoint), **fields), tmp_path / "run")  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"does not take the size 64x64; .*every position\. Export it at 32x40"):
        export(size=(64, 64))
    with pytest.raises(UserError, match="extra sizes are given, but height and width of tiny-classifier cannot vary"):
        export(dynamic=True, extra_sizes=((64, 64),))
    export(size=(40, 32))  # as many positions, so the network takes it


def test_targets_of_whole_images_survive_resizing() -> None:
    sample = Sample((np.zeros((10, 12, 3), np.uint8),), np.array([[[3]]])).resized((20, 24))
    assert sample.images[0].shape == (20, 24, 3)
    assert sample.target.tolist() == [[[3]]]  # type: ignore[union-attr]


@pytest.mark.parametrize("after", [None, LABELS, PROBABILITIES])
def test_the_device_reads_labels_as_the_model_declares(registered: ModelSpec, after: str | None) -> None:
    deployed = Deployment(postprocess=after).spec(registered)
    (output,) = (entry for entry in deployed.outputs if not entry.auxiliary)
    values = torch.randn(3, 4)
    value = registered.labels({"scores": values}, SIZE).int() if after == LABELS else values
    meanings = [{"name": output.name, "meaning": output.meaning}]
    expected = deployed.labels({output.name: value}, SIZE).numpy()
    np.testing.assert_array_equal(labels_of({output.name: value.numpy()}, meanings, SIZE), expected)
    comparison = Comparison(4, SIZE, meanings, "top-1")
    for row in range(3):
        part = {output.name: value[row : row + 1].numpy()}
        comparison.add(Golden({}, part, expected[row : row + 1], np.array([[[0]]])), part)
    record = comparison.judge({"relative_l2": 0.0, "label_agreement": 1.0, "task_drop": 0.0})
    assert record["verdict"] == "PASS"
    assert (record["metric"], record["score"]) == ("top-1", pytest.approx((expected == 0).mean()))
    assert bool(record["outputs"]) == (after != LABELS)


@pytest.mark.parametrize("aligned", [True, False])
def test_the_device_resizes_as_the_model_declares(aligned: bool) -> None:
    for small, large in (((5, 6), (33, 45)), ((9, 7), (4, 7)), ((1, 1), (8, 8))):
        logits = torch.randn(1, 6, *small, generator=torch.Generator().manual_seed(2))
        resized = nn.functional.interpolate(logits, large, mode="bilinear", align_corners=aligned)
        meanings = [{"name": "logits", "meaning": "logits", "align_corners": aligned}]
        found = labels_of({"logits": logits.numpy()}, meanings, large)
        assert (found == resized.argmax(dim=1, keepdim=True).numpy()).mean() > 0.99


def test_the_device_names_the_class_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(2, 9)
    for name, image in zip("ab", images, strict=True):
        np.save(tmp_path / f"{name}.npy", image)
    model = {
        "inputs": ["image"],
        "outputs": [{"name": LABELS, "meaning": LABELS}],
        "size": list(SIZE),
        "classes": list(CLASSES),
        "preprocessing": {**dataclasses.asdict(IMAGENET_RGB), "in_graph": True},
    }
    manifest = types.SimpleNamespace(content={"model": model}, precision=lambda name: ("fp32", {}))

    class Session:
        inputs = {"image": np.dtype(np.uint8)}  # noqa: RUF012

        def run(self, feed):
            assert feed["image"].shape == (1, *SIZE, 3)
            brightest = int(np.array_equal(feed["image"][0], images[1]))
            return {LABELS: np.array([[[[brightest]]]], np.int32)}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(device_segment, "open_session", lambda *_: Session())
    backend = types.SimpleNamespace(measured=lambda: "a test")
    record = device_segment.segment(
        types.SimpleNamespace(manifest=manifest),  # type: ignore[arg-type]
        None,
        backend,  # type: ignore[arg-type]
        lambda line: None,
        images=[tmp_path / "a.npy", tmp_path / "b.npy"],
        output=tmp_path / "out",
    )
    assert record["labels"]["b"] == {"label": 1, "class": "dog & <wolf>"}
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == record["labels"]
