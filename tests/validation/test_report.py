"""The report shows what was measured, and needs nothing but itself."""

import base64
import dataclasses
import html.parser
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgeattn.foundation import UserError
from edgeattn.validation.records import Picture
from edgeattn.validation.report import palette, render_report, write_report
from edgeattn.validation.report_charts import Scale, spread
from edgeattn.validation.report_divergence import divergence_section
from edgeattn.validation.report_page import decimal, points
from edgeattn.validation.report_pictures import pictures_of_page
from edgeattn.validation.report_ranges import LARGEST, measure_spans, ranges_section
from edgeattn.validation.report_sensitivity import sensitivity_section

sys.path.append(str(Path(__file__).parents[1]))
from report_samples import CLASSES, LABELS, RNG, divergence, sample_parity, sensitivity

MANIFEST = {
    "target": "jetpack-6.2-orin-nx-16",
    "checkpoint": {"file": "tiny.safetensors", "sha256": "ab" * 32},
    "stages": [{"name": "export", "opset": 18}],
    "note": "<script>alert(1)</script>",
}


@pytest.fixture(scope="module")
def parity():
    return dataclasses.replace(sample_parity(), model="tiny")


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
        self.sources += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action")]
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
    figures = images_of(reader)
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
    assert {image.size for image in images_of(reader)} == {(192, 144)}
    assert path.stat().st_size < 4e6
    assert "6 of the images have no target" in "".join(reader.text)


def test_palette_has_distinct_colours():
    assert len(set(palette(21))) == 21
    assert palette(1) == palette(21)[:1]


def test_a_recorded_page_is_the_page(parity, page):
    """Drawn from `parity.json` and its own pictures, a page is byte for byte the one that was written first."""
    record = json.loads(json.dumps(parity.as_dict()))
    assert render_report(record, pictures_of_page(page), manifest=MANIFEST) == page


def test_a_page_of_whole_images_too(tmp_path, parity):
    label = np.ones((1, 1, 1), np.int64)
    picture = Picture((RNG.integers(0, 256, (8, 8, 3), np.uint8),), None, label, {"fp32": 0 * label})
    path = write_report(dataclasses.replace(parity, pictures=(picture,)), tmp_path / "report.html", manifest={})
    page = path.read_text(encoding="utf-8")
    assert "original: cat &amp; &lt;dog&gt;" in page
    assert render_report(parity.as_dict(), pictures_of_page(page), manifest={}) == page


def test_records_of_other_releases_are_refused(parity):
    assert pictures_of_page("<h2>Pictures</h2>") is None
    older = parity.as_dict()
    older["original"] = {"mean_iou": 0.8, "class_iou": []}
    with pytest.raises(UserError, match="not recorded as this release does it"):
        render_report(older, None, manifest={})
    del (shorter := parity.as_dict())["forms"][0]["facts"]["nodes"]
    with pytest.raises(UserError, match="nodes"):
        render_report(shorter, None, manifest={})


def test_axes_hold_their_numbers():
    scale = Scale.decades([3e-5, 200.0])
    assert (scale.low, scale.high) == (-5, 3)
    assert scale.at(1e-5) < scale.at(1.0) < scale.at(1e3)
    assert scale.at(0.0) == scale.at(1e-9) == scale.at(1e-5)
    assert scale.at(float("inf")) == scale.at(float("nan")) == scale.at(1e3)
    assert [text for _, text in scale.ticks] == ["1e-5", "0.001", "0.1", "10", "1000"]
    linear = Scale.linear([3.7, float("inf")])
    assert [text for _, text in linear.ticks] == ["0", "1", "2", "3"]
    assert linear.ticks[1][0] == linear.at(1)
    assert Scale.linear([]).at(0.5) == 50
    assert spread([(0, "a"), (10, "b"), (30, "c")]) == ((0, "a"), (30, "c"))


def test_numbers_are_written_without_noise():
    assert decimal(-0.001) == "0.00"
    assert points(-0.00001) == "0.00"
    assert (decimal(None), decimal("inf"), decimal("nan"), decimal(1234.5, 1, "MB")) == ("–", "inf", "–", "1,234.5 MB")


def test_sensitivity_names_modules_with_their_figures():
    body = sensitivity_section(sensitivity()).body
    assert body.index("head.broken") < body.index("backbone.layer4.2.conv3")
    assert "it does not load" in body
    assert "10 %; alone 0.50 lost, without 1.25 saved" in body  # 20 dB; 1.5 of which 0.25 remain
    assert 'class="row alarm"' in body
    assert "Measured on: accuracy: CPU, ONNX Runtime 9.9.9" in body


def test_divergence_marks_the_first_module_and_what_cannot_be_compared():
    body = divergence_section(divergence()).body
    assert "diverges from PyTorch first in head.softmax" in body
    assert body.count('class="alarm"') == 2 + 1  # two points and the legend
    table = body[body.index("<tbody>") :]
    assert table.index("head.last") < table.index("head.softmax") < table.index("backbone")
    quiet = divergence()
    quiet["points"] = []
    assert "<svg" not in divergence_section(quiet).body


def scaled_model(path, factors, quantised=()):
    """Write a chain of multiplications; each tensor is quantised, after a cast, with the scale that is given for it."""
    nodes, constants, last = [], [], "image"
    for index, factor in enumerate(factors):
        constants.append(numpy_helper.from_array(np.float32(factor), f"factor{index}"))
        node = helper.make_node("Mul", [last, f"factor{index}"], [last := f"tensor{index}"])
        scopes = node.metadata_props.add()
        scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", f"['', 'stage{index}', 'mul']"
        nodes.append(node)
    for name, step in dict(quantised).items():
        constants += [
            numpy_helper.from_array(np.float32(step), f"{name}_scale"),
            numpy_helper.from_array(np.int8(0), f"{name}_zero"),
        ]
        nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=TensorProto.FLOAT))
        nodes.append(
            helper.make_node("QuantizeLinear", [f"{name}_cast", f"{name}_scale", f"{name}_zero"], [f"{name}_int8"])
        )
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("image", last)]
    graph = helper.make_graph(nodes, "graph", value[:1], value[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_ranges_are_measured_and_judged_by_the_limits(tmp_path):
    feeds = [{"image": np.array([[0, 0.5, -2, 1]], np.float32)}, {"image": np.array([[0, 0, 0, 0.25]], np.float32)}]
    model = scaled_model(tmp_path / "model.onnx", [1.0, 3e4, 1e-4, 1e-8])
    int8 = scaled_model(tmp_path / "int8.onnx", [1.0, 3e4, 1e-4, 1e-8], {"tensor0": 1 / 127, "tensor2": 0.1})
    spans = measure_spans(model, lambda: iter(feeds), data="two vectors", int8=int8)
    found = {span.name: span for span in spans.half}
    assert (spans.samples, spans.tensors) == (2, 5)
    first = found["tensor1"]
    assert (first.module, first.peak) == ("stage1", pytest.approx(6e4))
    assert first.smallest == pytest.approx(0.25 * 3e4)
    assert first.mean == pytest.approx(3e4 * np.sqrt(((0.25 + 4 + 1) / 4 + 0.0625 / 4) / 2))
    assert "exceeds the 65504" in first.defect
    assert "loses" in found["tensor3"].defect
    assert found["tensor2"].defect is None
    assert {span.name for span in spans.half[:2]} == {"tensor1", "tensor3"}  # defects come first
    assert [span.name for span in spans.quantised] == ["tensor0", "tensor2"]  # clipped: its range ends at 128 / 127
    assert spans.quantised[0].int8.largest == pytest.approx(128 / 127)
    body = ranges_section(spans).body
    assert f"largest FP16 number {LARGEST:.0f}" in body
    assert "smallest normal FP16 number 6.1e-05" in body
    assert "two vectors" in body
    assert "INT8 step 0.1, up to 12.8" in body
    assert body.count('class="row alarm"') == 2


def test_values_that_are_passed_on_take_one_row(tmp_path):
    feeds = [{"image": np.array([[0, 0.5, -2, 1]], np.float32)}]
    spans = measure_spans(
        scaled_model(tmp_path / "model.onnx", [1.0, 1.0, 2.0]), lambda: iter(feeds), data="", int8=None
    )
    assert sorted(span.peak for span in spans.half) == [2.0, 4.0]
    assert spans.rest == (2.0, 2.0)
    assert ranges_section(spans).body.count("Quantised tensors") == 0
