"""The validator validated: parity fails on every fault, `bisect` names the module, and clean forms raise no alarm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_subjects import NAMES, Subject, make_subject
from fault_trials import Trial, injections, run_trials
from faults import FAULTS

from edgeattn.validation.divergence import OnnxForm, bisect
from edgeattn.validation.parity import Form, compare_forms

PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def subject() -> Callable[[str], Subject]:
    """Return a function that exports each network once."""
    return cache(make_subject)


@pytest.fixture(scope="module")
def trials(
    subject: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], list[Trial]]:
    """Return a function that injects every fault that is typical of a precision into a form, once."""

    @cache
    def run(name: str, precision: str) -> list[Trial]:
        kinds = [kind for kind in FAULTS.values() if precision in kind.precisions]
        damaged = injections(subject(name), precision, kinds)
        return run_trials(subject(name), precision, damaged, tmp_path_factory.mktemp("faults"))

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clean_forms_raise_no_alarm(
    name: str, precision: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    path = tmp_path / "clean.onnx"
    clean = subject(name)
    onnx.save(clean.forms[precision], path)
    parity = compare_forms(
        clean.spec,
        clean.original,
        [Form("clean", path, precision, plugin=False)],
        clean.samples(precision),
        latency_runs=0,
        pictures=0,
    )
    assert parity.passed, parity.forms[0].reasons
    found = bisect(clean.reference, OnnxForm(path, sessions=clean.sessions), clean.feeds())
    assert not found.found, found.verdict
    assert len(found.points) > 20
    assert found.unaligned == ()
    assert found.folding_error is not None
    assert found.folding_error < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_fault_is_detected_and_located(
    name: str, precision: str, trials: Callable[[str, str], list[Trial]]
) -> None:
    found = trials(name, precision)
    assert [trial.fault for trial in found if not trial.detected] == []
    assert [(trial.fault, trial.named, trial.modules) for trial in found if not trial.located] == []


def test_every_kind_of_fault_was_injected(trials: Callable[[str, str], list[Trial]]) -> None:
    injected = {trial.fault for name in NAMES for precision in PRECISIONS for trial in trials(name, precision)}
    assert injected == set(FAULTS)
    assert len(injected) >= 40
