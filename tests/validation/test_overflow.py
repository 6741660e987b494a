"""Where FP16 everywhere fails, the default FP16 form is right. `benchmarks/overflow_suite.py` runs all cases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from overflow_cases import CASES, FAST, NAIVE, default_form, judge

from edgeattn.export.precision_types import FP16


@pytest.mark.parametrize("name", FAST)
def test_default_form_is_right_where_naive_ones_fail(name: str) -> None:
    case = CASES[name]()
    assert case.peak > FP16.limit
    outcome = judge(case, default_form(case, measured=True))
    assert outcome.passed, outcome
    for naive, convert in NAIVE.items():
        assert not judge(case, convert(case.model)).passed, naive


def test_declared_policies_do_not_foresee_every_range() -> None:
    """The reason for measuring: nothing in this graph is known to be large."""
    case = CASES["convolutions, activations"]()
    assert not judge(case, default_form(case, measured=False)).passed
