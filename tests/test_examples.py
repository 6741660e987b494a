"""The examples run as they stand, and the model card's claims hold."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from edgeattn.models import MODELS
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ccnet-digits", "cosnet-digits"])
def test_attention_carries_weight(name: str) -> None:
    """At least 0.80 mIoU on 200 held-out samples, and at least 3 points of it are lost without attention."""
    card = load("model_card")
    spec = MODELS.get(name)
    model = spec.build()
    assert spec.checkpoint is not None
    load_checkpoint(model, read_checkpoint(spec.checkpoint))
    score = card.mean_iou(spec, model, 200)
    assert score >= 0.80
    first_frame = card.mean_iou(spec, model, 200, first_map=True)
    assert first_frame - card.mean_iou(spec, model, 200, ablate=True) >= 0.03


def test_training_takes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = load("train_digits")
    for name in script.RECIPES:
        model = script.train(MODELS.get(name), steps=2, batch=2, learning_rate=1e-3)
        assert not model.training
