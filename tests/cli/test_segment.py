"""`edgeattn segment`: masks and overlays of images, whole or in windows."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgeattn.cli.main import main
from edgeattn.models import MODELS, OutputSpec
from edgeattn.models.spec import Preprocessing
from edgeattn.models.zoo.declare import class_labels, object_labels

PLAIN = Preprocessing("RGB", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Class 0, 1 or 2 where red, green or blue is strongest, at half the resolution.
WEIGHT = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)


def write_graph(path, size=(None, None), inputs=("image",), outputs=("logits",)):
    """Write a graph whose outputs are the strided colours of the inputs in turn, squashed for two inputs."""
    nodes = []
    for index, output in enumerate(outputs):
        name = "conv" if len(inputs) > 1 else output
        nodes.append(helper.make_node("Conv", [inputs[index], f"weight{index}"], [f"{name}{index}"], strides=[2, 2]))
        nodes[-1].output[0] = output if len(inputs) == 1 else f"conv{index}"
        if len(inputs) > 1:
            nodes.append(helper.make_node("Sigmoid", [f"conv{index}"], [output]))
    weights = [WEIGHT if len(inputs) == 1 else WEIGHT[:1] - 0.4 for _ in outputs]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, *size]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(weight, f"weight{index}") for index, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command in this process, knowing two tiny models: exit status, stdout, stderr."""
    base = dataclasses.replace(
        MODELS.get("ccnet-digits"), preprocessing=PLAIN, classes=("red", "green", "blue"), size=(16, 24)
    )
    tiny = dataclasses.replace(
        base, name="tiny", inputs=("image",), outputs=(OutputSpec("logits", "logits"),), labels=class_labels
    )
    pair = dataclasses.replace(
        base,
        name="pair",
        inputs=("target", "reference"),
        outputs=(OutputSpec("mask_target", "probability"), OutputSpec("mask_reference", "probability")),
        labels=object_labels,
    )
    monkeypatch.setattr(MODELS, "_members", {**MODELS._members, "tiny": tiny, "pair": pair})

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgeattn", "segment", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def images(tmp_path):
    """Two images of another size than the model's: red beside blue, and green."""
    folder = tmp_path / "images"
    folder.mkdir()
    first = np.zeros((40, 60, 3), np.uint8)
    first[:, :30, 0] = first[:, 30:, 2] = 200
    second = np.full((30, 20, 3), (0, 150, 10), np.uint8)
    for name, image in (("a", first), ("b", second)):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def mask(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


@pytest.mark.parametrize("size", [(None, None), (16, 24)], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("how", [(), ("--sliding",), ("--sliding", "--flip", "--scale", 1, "--scale", 1.5)], ids=len)
@pytest.mark.parametrize("convention", ["ccnet", "mmseg"])
def test_masks_have_the_size_of_the_images(run, images, tmp_path, size, how, convention):
    if not how and convention == "mmseg":
        return
    graph = write_graph(tmp_path / "tiny.onnx", size)
    output = tmp_path / "masks"
    options = (*how, "--convention", convention) if how else ()
    status, out, err = run(graph, images, "--model", "tiny", "-o", output, *options)
    assert status == 0, err
    assert "2 masks with overlays" in out
    assert {path.name for path in output.iterdir()} == {"a.png", "a.overlay.png", "b.png", "b.overlay.png"}
    first, second = mask(output / "a.png"), mask(output / "b.png")
    assert (first.shape, second.shape) == ((40, 60), (30, 20))
    assert (first[:, :26] == 0).all()
    assert (first[:, 34:] == 2).all()
    assert (second == 1).all()
    with Image.open(output / "b.overlay.png") as overlay:
        assert overlay.size == (20, 30)
        assert overlay.mode == "RGB"
    assert "green" in out


def test_pairs_take_the_next_image(run, images, tmp_path):
    graph = write_graph(tmp_path / "pair.onnx", (16, 24), ("target", "reference"), ("mask_target", "mask_reference"))
    output = tmp_path / "masks"
    status, _, err = run(graph, images, "--model", "pair", "-o", output)
    assert status == 0, err
    first = mask(output / "a.png")
    assert (first[:, :26] == 1).all()
    assert not first[:, 34:].any()
    assert not mask(output / "b.png").any()


def test_what_cannot_be_used(run, images, tmp_path):
    graph = write_graph(tmp_path / "tiny.onnx")

    def fails(*arguments, words):
        status, out, err = run(*arguments, "-o", tmp_path / "masks")
        assert status == 2
        assert "Traceback" not in out + err
        for word in words:
            assert word in err

    fails(graph, images, "--model", "tiny", "--flip", words=["--sliding"])
    fails(graph, images, "--model", "tiny", "--sliding", "--convention", "x", words=["'x'", "ccnet or mmseg"])
    fails(graph, images, "--model", "pair", words=["image, logits", "target, reference"])
    fails(graph, tmp_path / "absent.png", "--model", "tiny", words=["absent.png", "cannot be read"])
    fails(graph, images, images / "a.png", "--model", "tiny", words=["two images are called 'a'"])
    fixed = write_graph(tmp_path / "fixed.onnx", (16, 24))
    fails(fixed, images, "--model", "tiny", "--sliding", "--window", "16x16", words=["16x24", "16x16"])
    scores = next(spec.name for spec in MODELS if spec.metric == "top-1")
    fails(graph, images, "--model", scores, words=[scores, "no masks"])
    assert not (tmp_path / "masks").exists()
