"""Expressions over sizes mean the same everywhere, and nothing else is an expression."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.plugins_trt.expressions import evaluate, names_in, tokens


@given(height=st.integers(1, 10**6), width=st.integers(1, 10**4), block=st.integers(1, 512))
def test_programs_cover_every_position_once(height: int, width: int, block: int) -> None:
    sizes = {"height": height, "width": width, "BLOCK": block}
    programs = evaluate("cdiv(height * width, BLOCK)", sizes)
    assert (programs - 1) * block < height * width <= programs * block


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a - b - 1", 6),
        ("a // b * 2", 6),
        ("max(16, pow2(a))", 16),
        ("pow2(b * 12)", 64),
        ("min(a, b) + 1", 4),
        ("pow2(1)", 1),
    ],
)
def test_values(text: str, value: int) -> None:
    assert evaluate(text, {"a": 10, "b": 3}) == value


def test_names_and_postfix_order() -> None:
    assert names_in("cdiv(height * width, BLOCK) + 1") == {"height", "width", "BLOCK"}
    assert [token.value for token in tokens("a - b * 2")] == ["a", "b", 2, "*", "-"]


@pytest.mark.parametrize("text", ["a / b", "a ** 2", "f(a)", "'a'", "a.b", "a if b else 1", "1.5", "-a"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="may hold sizes"):
        tokens(text)
