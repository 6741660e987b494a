"""Fixtures for all tests: the TensorRT bindings of `tensorrt_stubs`, and what engines ask of them."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Triton's interpreter runs the kernels on the CPU. It is chosen before anything imports Triton, as parts of torch do.
os.environ["TRITON_INTERPRET"] = "1"

# What whoever runs the tests has declared for themselves is not tested.
os.environ |= {"EDGEATTN_MODELS": "", "EDGEATTN_TARGETS": ""}


def _load(name: str) -> ModuleType:
    """Import a module that lies beside this file, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(f"edgeattn_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


STUBS = _load("tensorrt_stubs")


def _bindings(version: str) -> Any:
    try:
        return STUBS.bindings_of(version)
    except STUBS.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tensorrt_bindings() -> Callable[[str], Any]:
    """Return the `Bindings` of a version, or skip the test with the reason."""
    return _bindings


@pytest.fixture(scope="session", params=STUBS.VERSIONS)
def bindings(request: pytest.FixtureRequest) -> Any:
    """The `Bindings` of each version in turn, or a skipped test with the reason."""
    return _bindings(request.param)


@pytest.fixture(scope="session")
def engine_walk(bindings: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `engine_walk.py` found on each version of the bindings."""
    here = Path(__file__).parent
    folder = tmp_path_factory.mktemp("walk")
    done = bindings.run([str(here / "engine_walk.py"), str(folder)], python_path=[here], timeout=240)
    assert done.returncode == 0, done.stderr
    return {"version": bindings.version, **json.loads(done.stdout.splitlines()[-1])}
