"""The table of targets."""

from __future__ import annotations

import pytest

from edgeattn.targets import TARGETS


@pytest.mark.parametrize(("name", "takes"), [("jetpack-6.2-orin", False), ("jetpack-7.1-thor", True)])
def test_function_bodies_are_taken_from_10_7_on(name: str, takes: bool) -> None:
    assert TARGETS.get(name).takes_function_bodies is takes


def test_every_target_is_complete() -> None:
    for target in TARGETS:
        assert 18 <= target.opset <= 22
        assert target.tensorrt >= (10, 3)
        assert target.source
