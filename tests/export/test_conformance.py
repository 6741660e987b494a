"""Q/DQ conformance: a good model passes, and each single violation is found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeattn.export.conformance import check_qdq

BODY = """
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    w = DequantizeLinear <axis = 0> (w_int8, w_scale, w_zero)
    c = Conv (d, w, b)
    f = Reshape (c, flat)
    t = Transpose <perm = [0, 2, 1]> (f)
    e = MatMul (t, f)
    m = Add (e, mask)
    a = Softmax <axis = -1> (m)
    y = MatMul (f, a)
"""
CONSTANTS = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "w_int8": np.arange(-4, 4, dtype=np.int8).reshape(4, 2, 1, 1),
    "w_scale": np.float32([0.1, 0.2, 0.3, 0.4]),
    "w_zero": np.zeros(4, np.int8),
    "b": np.zeros(4, np.float32),
    "mask": np.zeros((9, 9), np.float32),
    "flat": np.int64([1, 4, 9]),
}


PAIR = "    q3 = QuantizeLinear ({}, s, z)\n    d3 = DequantizeLinear (q3, s, z)\n"


def build(body: str = BODY, **changes: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]>\nnet (float[1,2,3,3] x) => (float[1,4,9] y) {{{body}}}'
    )
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    constants = CONSTANTS | changes
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items())
    return model


def replaced(*pairs: tuple[str, str], **changes: np.ndarray) -> onnx.ModelProto:
    body = BODY
    for old, new in pairs:
        assert old in body
        body = body.replace(old, new)
    return build(body, **changes)


def test_a_conforming_model() -> None:
    assert check_qdq(build()) == []


def test_a_model_without_qdq() -> None:
    body = "c = Conv (x, w_float, b)  y = Reshape (c, flat)"
    assert check_qdq(build(body, w_float=np.ones((4, 2, 1, 1), np.float32))) == []


@pytest.mark.parametrize(
    ("model", "node", "problem"),
    [
        (lambda: build(z=np.int8(3)), "node_q", "zero point is 3"),
        (lambda: build(w_zero=np.int8([0, 0, -1, 0])), "node_w", "zero point is -1"),
        (lambda: build(z=np.uint8(0)), "node_q", "UINT8 instead of INT8"),
        (lambda: replaced(("(x, s, z)", "(x, s)"), z=np.uint8(0)), "node_d", "UINT8 instead of INT8"),
        (lambda: build(s=np.float32(0)), "node_d", "finite and positive"),
        (lambda: build(w_scale=np.float32([0.1, -1, 1, 1])), "node_w", "holds -1"),
        (lambda: build(w_scale=np.float32([0.1, np.inf, 1, 1])), "node_w", "holds inf"),
        (lambda: build(s=np.float32([0.1, 0.2]), z=np.int8([0, 0])), "node_q", "an activation has 2 scales"),
        (
            lambda: build(
                BODY.replace("axis = 0", "axis = 1"), w_scale=np.float32([0.1, 0.2]), w_zero=np.zeros(2, np.int8)
            ),
            "node_w",
            "axis 1 instead of 0",
        ),
        (
            lambda: replaced(
                ("Conv (d, w, b)", "Conv (d, w, bias)"),
                ("    c =", "    bias = DequantizeLinear (b_int, s)\n    c ="),
                b_int=np.zeros(4, np.int32),
            ),
            "node_bias",
            "INT32 bias",
        ),
        (
            lambda: replaced(
                ("c = Conv (d", "q2 = QuantizeLinear (d, s2, z)  d2 = DequantizeLinear (q2, s, z)\n c = Conv (d2"),
                s2=np.float32(0.2),
            ),
            "node_d2",
            "scale differs from that of node_q2",
        ),
        (
            lambda: replaced(("c = Conv (d, ", "h = Cast <to = 10> (d)  g = Cast <to = 1> (h)\n c = Conv (g, ")),
            "node_d",
            "node_h (Cast) gives",
        ),
        (
            lambda: replaced(("y = MatMul (f, a)", "n = Identity (q)\n y = MatMul (f, a)")),
            "node_q",
            "goes to node_n",
        ),
        (
            lambda: replaced(("(q, s, z)", "(n, s, z)"), ("    d = ", "    n = Identity (q)\n    d = ")),
            "node_d",
            "neither a constant nor",
        ),
        (
            lambda: replaced(("Add (e, mask)", "Add (d3, mask)"), ("    m =", PAIR.format("e") + "    m =")),
            "node_q3",
            "path from the energies",
        ),
        (
            lambda: replaced(
                ("Softmax <axis = -1> (m)", "Softmax <axis = -1> (d3)"),
                ("    a =", PAIR.format("m") + "    a ="),
            ),
            "node_d3",
            "path from the energies",
        ),
        (
            lambda: replaced(
                ("    y = MatMul (f, a)", "    u = Identity (a)\n" + PAIR.format("u") + "    y = MatMul (f, d3)"),
            ),
            "node_q3",
            "attention map",
        ),
    ],
)  # fmt: skip
def test_violations(model: Callable[[], onnx.ModelProto], node: str, problem: str) -> None:
    found = check_qdq(model())
    assert any(entry.startswith(f"{node}: ") and problem in entry for entry in found), found


def test_a_scale_that_is_computed() -> None:
    model = replaced(("(x, s, z)", "(x, s_now, z)"), ("    q =", "    s_now = Abs (s)\n    q ="))
    assert "node_q: its scale is not constant." in check_qdq(model)


def test_constant_nodes_count_as_constants() -> None:
    model = replaced(("(q, s, z)", "(q, s_c, z)"), ("    q =", "    s_c = Constant <value = float {0.1}> ()\n    q ="))
    assert check_qdq(model) == []


def test_scales_of_another_type() -> None:
    mixed = replaced(
        ("(q, s, z)", "(q, s_half, z)"),
        ("c = Conv (d, w, b)", "h = Cast <to = 1> (d)\n c = Conv (h, w, b)"),
        s_half=np.float16(0.1),
        s=np.float32(np.float16(0.1)),
    )
    assert [entry.split(":")[0] for entry in check_qdq(mixed)] == ["node_d"]


def test_quantised_operators_and_foreign_domains() -> None:
    model = replaced(("y = MatMul (f, a)", "k, ks, kz = DynamicQuantizeLinear (f)\n y = MatMul (f, a)"))
    assert any("no DynamicQuantizeLinear" in entry for entry in check_qdq(model))
    foreign = build()
    foreign.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    foreign.graph.node[0].domain = "com.microsoft"
    assert any("com.microsoft" in entry for entry in check_qdq(foreign))


def test_scales_for_each_channel_elsewhere() -> None:
    body = """
        w = DequantizeLinear <axis = 0> (w_int8, w_scale, w_zero)
        r = Reshape (w, flat)  p = Add (x, r)  f = Flatten (p)  y = Reshape (f, out)
    """
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 19]>\nnet (float[4,2] x) => (float[8] y) {{{body}}}'
    )
    constants = CONSTANTS | {"flat": np.int64([4, 2]), "out": np.int64([8])}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items())
    assert any("(Reshape) has a scale for each channel" in entry for entry in check_qdq(model))
