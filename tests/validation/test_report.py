"""The report shows what was measured, and needs nothing but itself."""

import base64
import dataclasses
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeattn.validation.metrics import TensorComparison
from edgeattn.validation.records import (
    Form,
    FormParity,
    Parity,
    Picture,
    SizeCheck,
    TaskScore,
)
from edgeattn.validation.report import palette, write_report
from edgeattn.validation.runners import FormFacts, Latency
from edgeattn.validation.tolerance import Arithmetic, tolerance

CLASSES = ("background", "cat & <dog>")
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, (2, 24, 32))
MANIFEST = {
    "target": "jetpack-6.2-orin-nx-16",
    "checkpoint": {"file": "tiny.safetensors", "sha256": "ab" * 32},
    "stages": [{"name": "export", "opset": 18}],
    "note": "<script>alert(1)</script>",
}


def form_parity(name, precision, error, reasons=()):
    comparison = TensorComparison()
    reference = RNG.standard_normal((1, 2, 24, 32)).astype(np.float32)
    comparison.add(reference, reference + np.float32(error) * RNG.standard_normal(reference.shape).astype(np.float32))
    return FormParity(
        form=Form(name, Path(f"/somewhere/else/{name}.onnx"), precision, plugin="plugin" in name),
        facts=FormFacts(nodes=37, plugin_nodes=3 * ("plugin" in name), bytes=1_234_567, fp16=False, qdq=False),
        measured="CPU, ONNX Runtime 9.9.9",
        outputs={} if "broken" in name else {"logits": comparison.result()},
        label_agreement=float("nan") if "broken" in name else 0.98765,
        score=TaskScore("mIoU", 0.81234, (0.9, float("nan"))),
        task_drop=0.00567,
        tolerance=tolerance(precision, Arithmetic(12, 576, 9), peak=12.0, rms=3.0),
        reasons=reasons,
        latency=None if "broken" in name else Latency(12.345, 10, 2),
    )


@pytest.fixture(scope="module")
def parity():
    flipped = LABELS.copy()
    flipped[0, :2, :5] = 1 - flipped[0, :2, :5]
    images = tuple(RNG.integers(0, 256, (24, 32, 3), np.uint8) for _ in range(2))
    return Parity(
        model="tiny",
        classes=CLASSES,
        samples=200,
        unlabelled=0,
        original=TaskScore("mIoU", 0.81801, (0.9, 0.7)),
        original_latency=Latency(20.0, 10, 2),
        forms=(
            form_parity("fp32", "fp32", 1e-7),
            form_parity("fp32 plugin", "fp32", 1e-7),
            form_parity("fp16", "fp16", 1e-3, ("label agreement 98.765% is below 99.500%",)),
            form_parity("broken int8", "int8", 1.0, ("ONNX Runtime cannot load it: <no & reason>",)),
        ),
        sizes=(
            SizeCheck("fp32", (97, 129), {"logits": 3.2e-7}, 1.0, ()),
            SizeCheck("fp32 plugin", (97, 129), {}, float("nan"), (), skipped="the form takes one fixed size"),
        ),
        pictures=(Picture(images, LABELS, LABELS, {"fp32": LABELS, "fp16": flipped}),),
        environment={"onnxruntime": "9.9.9"},
    )


@pytest.fixture(scope="module")
def page(parity, tmp_path_factory):
    path = write_report(parity, tmp_path_factory.mktemp("run") / "report.html", manifest=MANIFEST)
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """Collects text and references, and checks that tags close in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.sources = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def reader(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def images_of(reader):
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in reader.sources)
    return [Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :]))) for source in reader.sources]


def test_needs_no_network(page, reader):
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert len(page) < 4e6


def test_fits_a_phone_and_both_colour_schemes(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media (max-width" in page


def test_says_what_was_measured_and_where(reader):
    text = " ".join(" ".join(reader.text).split())
    assert "nothing here ran on TensorRT, a GPU or a Jetson" in text
    assert "on 200 images" in text
    assert "The original reaches 81.80 points" in text
    for expected in ("98.765%", "81.23", "0.57", "CPU, ONNX Runtime 9.9.9", "1.23 MB", "12.3 ms", "97x129", "3.2e-07"):
        assert expected in text
    assert "skipped: the form takes one fixed size" in text
    assert "10 of 768 pixels differ" in text
    assert "/somewhere" not in text


def test_verdicts_and_reasons(reader):
    text = " ".join(" ".join(reader.text).split())
    assert text.startswith("tiny: parity FAIL")
    assert "fp16 fails: label agreement 98.765% is below 99.500%" in text
    assert "broken int8 fails: ONNX Runtime cannot load it: <no & reason>" in text
    assert "fp32 fails" not in text


def test_tolerances_come_with_their_derivation(reader, parity):
    text = "".join(reader.text)
    for entry in parity.forms:
        assert entry.tolerance.derivation in text
    assert "fp32, fp32 plugin" in text
    assert "at most 1.0e-05" in text
    assert "at least 99.500%" in text
    assert "within 1.00 points of the original" in text


def test_manifest_is_shown_and_escaped(page, reader):
    text = " ".join(reader.text)
    for expected in ("checkpoint.sha256", "ab" * 32, "stages.0.opset", "computed with.onnxruntime", CLASSES[1]):
        assert expected in text
    assert "<script" not in page


def test_pictures_show_masks_and_differences(reader):
    figures = images_of(reader)[1:]
    inputs, rest = 2 * 1, 2 * (2 + 2 * 2)
    assert len(figures) == inputs + rest
    assert {figure.size for figure in figures} == {(32, 24)}
    colours = np.asarray(palette(2), np.uint8)
    per_frame = [np.asarray(figure.convert("RGB")) for figure in figures[: len(figures) // 2]]
    for mask in per_frame[1:4]:
        np.testing.assert_array_equal(mask, colours[LABELS[0]])
    exact, flipped = per_frame[4], per_frame[6]
    assert len(np.unique(exact.reshape(-1, 3), axis=0)) == 1
    differing = (flipped != exact).any(-1)
    assert differing.sum() == 10
    assert differing[:2, :5].all()


def test_large_images_are_reduced(parity, tmp_path):
    labels = np.zeros((1, 600, 800), np.int64)
    photo = RNG.integers(0, 256, (600, 800, 3), np.uint8)
    picture = Picture((photo,), None, labels, {"fp32": labels})
    large = dataclasses.replace(parity, pictures=(picture,) * 6, unlabelled=6)
    path = write_report(large, tmp_path / "report.html", manifest={})
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert {image.size for image in images_of(reader)[1:]} == {(192, 144)}
    assert path.stat().st_size < 4e6
    assert "6 of the images have no target" in "".join(reader.text)


def test_palette_has_distinct_colours():
    assert len(set(palette(21))) == 21
    assert palette(1) == palette(21)[:1]
