"""`edgeattn inspect`, and the guess of `edgeattn export`."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from edgeattn.cli.main import main
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.validation.randomise import randomise

BUNDLED = str(MODELS.get("ccnet-digits").checkpoint)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command in this process: exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgeattn", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def test_inspect_prints_what_was_found(run):
    status, out, _ = run("inspect", BUNDLED)
    assert status == 0
    for part in ("safetensors", "ccnet-digits", "certain", "rcca", "logits"):
        assert part in out


def test_inspect_as_json(run):
    status, out, _ = run("inspect", BUNDLED, "--json")
    record = json.loads(out)
    assert status == 0
    assert record["certain"] == ["ccnet-digits"]
    assert record["blocks"][0]["prefix"] == "head"


def test_a_file_that_is_no_checkpoint(run, tmp_path):
    (tmp_path / "weights.pth").write_text("no")
    status, _, err = run("inspect", tmp_path / "weights.pth")
    assert status == 2
    assert "is text, not a checkpoint" in err


def test_export_guesses_the_model_and_says_how_sure_it_is(run, tmp_path, monkeypatch):
    seen = []

    class StoppedError(Exception):
        pass

    def stop(request, *rest):
        seen.append(request.model)
        raise StoppedError

    monkeypatch.setattr("edgeattn.cli.export.ExportRun", stop)
    monkeypatch.setattr(sys, "argv", ["edgeattn", "export", BUNDLED, "-o", str(tmp_path / "run")])
    with pytest.raises(StoppedError):
        main()
    assert seen == ["ccnet-digits"]


def test_export_refuses_to_guess_below_certainty(run, tmp_path):
    file = save_checkpoint({"conv1.0.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors", {})
    status, _, err = run("export", file, "-o", tmp_path / "run")
    assert status == 2
    assert "fits no declared network" in err
    assert "--model" in err
    status, _, err = run("export", "bundled", "-o", tmp_path / "run")
    assert status == 2
    assert "--model" in err
    assert not (tmp_path / "run").exists()


def test_a_layout_or_postprocessing_that_does_not_exist(run, tmp_path):
    export = ("export", "bundled", "--model", "ccnet-digits", "-o", tmp_path / "run")
    for options, words in (
        (("--layout", "timm"), ("no layout 'timm'", "official")),
        (("--with-postprocess", "argmax"), ("'argmax'", "labels or probabilities")),
    ):
        status, _, err = run(*export, *options)
        assert status == 2
        assert all(word in err for word in words)
    assert not (tmp_path / "run").exists()


def test_models_are_listed_with_task_size_and_layouts(run):
    status, out, _ = run("list", "models")
    assert status == 0
    for part in ("segmentation, 769x769, weights: official", "32x32 only", "object segmentation", "weights: mmseg"):
        assert part in out


def test_a_network_of_other_classes_is_exported_and_compared_without_naming_it(run, tmp_path):
    variant = "ccnet-digits:num_classes=4"
    weights = save_checkpoint(randomise(MODELS.get(variant).build(), seed=2), tmp_path / "own.safetensors", {})
    images = tmp_path / "images"
    images.mkdir()
    for index, sample in enumerate(MODELS.get("ccnet-digits").samples(2)):
        Image.fromarray(sample.images[0]).save(images / f"{index}.png")
    status, out, err = run("export", weights, "--images", images, "--size", "64x80", "-o", tmp_path / "run")
    assert (status, err) == (0, "")
    assert f"model: {variant}, certain" in out
    facts = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert (facts["model"], len(facts["classes"])) == (variant, 4)
    status, out, _ = run("compare", weights, tmp_path / "run" / "model.onnx", "--images", images)
    assert status == 0
    assert "PASS" in out
