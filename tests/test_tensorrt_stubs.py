"""The TensorRT bindings that other tests rely on are what they are said to be."""

from __future__ import annotations

import pytest


def test_bindings_load_as_users_import_them(bindings) -> None:
    code = "import tensorrt as trt\nresult = [trt.__version__, trt.DataType.HALF.name, factor * 2]"
    assert bindings.evaluate(code, factor=21) == [bindings.version, "HALF", 42]


def test_builder_cannot_be_created(bindings) -> None:
    code = """
import tensorrt as trt
try:
    trt.Builder(trt.Logger())
    result = "created"
except TypeError as error:
    result = str(error)
"""
    assert "nullptr" in bindings.evaluate(code)


def test_python_plugins_exist_after_10_6(bindings) -> None:
    code = """
import numpy.typing, importlib.util
result = importlib.util.find_spec("tensorrt.plugin") is not None
if result:
    import tensorrt.plugin as trtp
    result = callable(trtp.register)
"""
    assert bindings.evaluate(code) is bindings.at_least(10, 6)


def test_a_failing_evaluation_says_why(tensorrt_bindings) -> None:
    bindings = tensorrt_bindings("10.3.0")
    with pytest.raises(AssertionError, match="no_such_name"):
        bindings.evaluate("result = no_such_name")
