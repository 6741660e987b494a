"""Order of the contract's tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of one variant follow each other, so that each worker exports a block once for all of them."""
    contract = [index for index, item in enumerate(items) if item.path.name == "test_contract.py"]
    callspecs = {index: getattr(items[index], "callspec", None) for index in contract}

    def case(index: int) -> str:
        callspec = callspecs[index]
        return f"{callspec.params['spec'].name}/{callspec.params['variant'].name}" if callspec else ""

    ordered = sorted((index for index in contract if case(index)), key=case)
    free = [index for index in contract if case(index)]
    chosen = [items[index] for index in ordered]
    for index, item in zip(free, chosen, strict=True):
        items[index] = item
