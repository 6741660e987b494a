"""The engine runner on real bindings over fakes: it computes nothing, but chooses, checks and describes."""

from __future__ import annotations


def test_it_says_where_and_how_the_numbers_were_made(engine_walk) -> None:
    assert engine_walk["runner"]["measured"] == f"TensorRT {engine_walk['version']} on Fake, TF32 on"


def test_inputs_are_declared_as_the_comparison_needs_them(engine_walk) -> None:
    assert engine_walk["runner"]["inputs"] == {"image": ["float32", [None, 3, None, None]]}


def test_it_chooses_the_profile_that_takes_the_inputs(engine_walk) -> None:
    assert engine_walk["runner"]["profiles set"] == [1]
    assert "image (1, 3, 500, 8)" in engine_walk["runner"]["too large"]


def test_it_refuses_engines_of_other_machines(engine_walk) -> None:
    runner = engine_walk["runner"]
    assert "built with SM 87, and this machine has 90" in runner["other machine"]
    assert "is gone or another one" in runner["another graph"]
    assert "record is missing or of another engine" in runner["tampered"]
    assert "does not exist" in runner["missing"]


def test_it_takes_what_the_comparison_feeds_to_onnx_runtime(engine_walk) -> None:
    assert engine_walk["runner"]["same outputs"]
    assert engine_walk["runner"]["accepts"]
